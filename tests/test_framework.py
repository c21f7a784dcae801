"""Each framework provides what backends/framework.py lists: no less, no more, called alike."""

import ast
import inspect
import pathlib
import symtable
import types

import keras
import numpy as np
import pytest
from keras_xlstm.backends.framework import ARITHMETIC, OPTIONAL, Contract, framework
from tools import BACKEND, array

from keras_xlstm import backends

ROOT = pathlib.Path(__file__).parent.parent
FUNCTIONS = {name: f for name, f in vars(Contract).items() if inspect.isfunction(f)}
FLAGS = Contract.__annotations__


def test_no_more_and_no_less():
    source = pathlib.Path(framework.__file__).read_text()  # torch.compile adds names of its own
    symbols = symtable.symtable(source, framework.__name__, "exec").get_symbols()
    found = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    found = {
        name
        for name in found
        if not name.startswith("_") and not isinstance(vars(framework)[name], types.ModuleType)
    }
    assert found == {*ARITHMETIC, *FUNCTIONS, *FLAGS}
    assert {*OPTIONAL} <= {*FUNCTIONS}
    for name, kind in FLAGS.items():
        assert type(getattr(framework, name)) is kind, name


def called(function):
    """What a caller sees: how many positional arguments, and the names that it may spell."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    return len(plain), [(p.name, p.kind, p.default) for p in parameters if p not in plain]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_call_signatures(name):
    own = getattr(framework, name)
    if own is None:
        assert name in OPTIONAL
    elif getattr(own, "__module__", "").startswith("keras_xlstm"):
        assert called(own) == called(FUNCTIONS[name])
    else:  # Keras's or the framework's own, which takes one
        assert callable(own)
        assert called(FUNCTIONS[name]) == (1, [])


def test_implementations():
    for modules in backends.loaded.values():
        assert {*modules} == {"mlstm", "slstm"}
        for op, module in modules.items():
            assert callable(getattr(module, op))
            call = {"mlstm": ["q", "v", "chunk_size"], "slstm": ["x"]}[op]
            for name in ("unsupported", "not_preferred"):
                assert list(inspect.signature(getattr(module, name)).parameters) == call, module


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, ()) for name in ("tanh", "exp", "log1p", "log_sigmoid", "constant")),
        ("minimum", (0.5,)),
        ("maximum", ("x",)),
        ("largest", (-1,)),
        ("total", (-1,)),
        ("total", (-2,)),
        ("total", ((-2, -1),)),
        ("cumsum", (1,)),
        ("swapaxes", (-1, -2)),
        ("matmul", ("x",)),
    ],
)
def test_float64_stays_float64(name, arguments, rng):
    x = np.abs(rng.normal(size=(2, 3, 3)))
    numpy = {
        "log_sigmoid": lambda x: -np.log1p(np.exp(-x)), "largest": np.max, "total": np.sum,
        "constant": lambda x: x,
    }.get(name) or getattr(np, name)  # fmt: skip
    want = numpy(x, *(x if a == "x" else a for a in arguments))
    given = keras.ops.convert_to_tensor(x, dtype="float64")
    got = getattr(framework, name)(
        keras.ops.copy(given), *(given if a == "x" else a for a in arguments)
    )
    assert keras.backend.standardize_dtype(got.dtype) == "float64"
    np.testing.assert_allclose(array(got), want, rtol=1e-14)


def test_arithmetic_is_tested():
    cases = test_float64_stays_float64.pytestmark[0].args[1]
    assert {name for name, _ in cases} == {*ARITHMETIC}


@pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend: run on torch")
def test_all_of_it_is_used_and_nothing_is_looked_up_by_name():
    used = set()
    for path in [*(ROOT / "backends").rglob("*.py"), *(ROOT / "keras_xlstm").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("framework", "active"):
                    used.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                assert ast.unparse(node.args[0]) not in ("framework", "active"), path
    assert used == {*ARITHMETIC, *FUNCTIONS, *FLAGS}
