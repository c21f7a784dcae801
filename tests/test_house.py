"""What makes the package longer, or ties its rooms together, counted. Limits only go down."""

import ast
import functools
import pathlib

import pytest
import sweeps
from tools import BACKEND

once = pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend: run on torch")
ROOT = pathlib.Path(__file__).parent.parent

LIMITS = {
    # Lines. The core is what one reads; the wing is what one need not enter.
    "core": 9278,
    "tools": 1930,
    "wing": 10881,
    "tests": 15634,
    # Lines of the longest function, its docstring aside; parameters of the longest signature.
    "longest kernel": 136,
    "longest other function": 116,
    "kernels over 100 lines": 1,
    "other functions over 60 lines": 11,
    "longest signature": 43,
    "signatures over 25": 12,
    # Kernel files may have 400 lines, all others 300.
    "files over their limit": 1,
    # What crosses borders.
    "imports upwards": 0,
    "imports by a string": 1,
    "private names used by another module": 0,
}

CORE = (
    "keras_xlstm/*.py", "keras_xlstm/layers/*.py", "keras_xlstm/models/*.py", "backends/*.py",
    "backends/tensorflow/*.py",
)  # fmt: skip
TOOLS = "keras_xlstm/convert/*.py", "keras_xlstm/export/*.py", "keras_xlstm/distribution.py"
WING = "backends/kernels/**/*.py", "backends/torch/**/*.py", "backends/jax/**/*.py"
KERNELS = "backends/kernels", "backends/jax/pallas"

# From the ground up: a module imports those of its own floor and of the floors below.
FLOORS = [
    ["backends.kernels"],
    [f"backends.{n}" for n in ("log_space", "sizes", "export_context", "common", "inference")],
    ["backends.torch", "backends.jax", "backends.tensorflow"],
    ["backends.framework"],
    ["backends.choice"],
    ["backends.chunkwise"],
    ["backends.mixing"],
    ["backends.reference"],
    ["backends.stretches"],
    ["backends.tensorflow.mlstm", "backends.tensorflow.slstm"],  # XLA compiles the reference
    ["backends"],
    ["validation", "initializers", "compat", "_version"],
    ["masks", "losses", "windows"],
    ["ops"],
    ["layers"],
    ["models"],
    ["convert", "export", "distribution"],
    [""],
]


FRAMEWORKS = "backends.torch", "backends.jax", "backends.tensorflow"


@functools.cache
def files(*patterns):
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def product():
    return files(*CORE, *TOOLS, *WING)


def lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def is_kernel_file(path):
    return path.relative_to(ROOT).as_posix().startswith(KERNELS)


@functools.cache
def functions():
    """(place, whether it runs on the device, lines without its docstring, parameters)."""
    found = []
    for path in product():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                text = node.body[0]
                length -= text.end_lineno - text.lineno + 1
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            jitted = any("jit" in ast.unparse(d) or "kernel" in ast.unparse(d)
                         for d in node.decorator_list)  # fmt: skip
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            found.append((place, jitted and is_kernel_file(path), length, count))
    return found


def module_of(path):
    """Its name within keras_xlstm: "layers.base", "backends.torch"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "backends" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module):
    best, found = -1, None
    for height, names in enumerate(FLOORS):
        for name in names:
            inside = module == name or module.startswith(f"{name}.") or not name
            if inside and len(name) > best:
                best, found = len(name), height
    return found


def loaded(path):
    """Names that a file gives to `load` of backends/framework.py, or lists for it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("load", "backends.load"):
            yield from (ast.literal_eval(name) for name in node.args if is_text(name))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "implementations":
            for modules in ast.literal_eval(node.value).values():
                yield from modules.values()


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def targets(path, modules):
    """The modules of ours that a file imports, each as far down as it goes."""
    module = module_of(path)
    if module == "backends.framework":
        yield from FRAMEWORKS
    listers = [] if module in FRAMEWORKS else [path]
    if module == "backends":  # it loads what the frameworks list
        listers += [ROOT.joinpath(*f.split("."), "__init__.py") for f in FRAMEWORKS]
    for name in (name for lister in listers for name in loaded(lister)):
        yield from {f"{f}.{name}" for f in FRAMEWORKS} & modules
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for package, name in names:
            if package.split(".")[0] == "keras_xlstm":
                package = package.removeprefix("keras_xlstm").removeprefix(".")
                inner = f"{package}.{name}".removeprefix(".")
                yield inner if inner in modules else package


def imports_upwards():
    modules = {module_of(path) for path in product()}
    return sorted(
        {
            f"{path.relative_to(ROOT)} {target}"
            for path in product()
            for target in targets(path, modules)
            if floor(target) > floor(module_of(path))
        }
    )


def imports_by_a_string():
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in product()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("import_module", "__import__"))
    ]


def private_names_used():
    """`from a import _b`, and `a._b` of a module a of ours."""
    found = set()
    for path in product():
        ours = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("keras_xlstm"):
                for alias in node.names:
                    ours.add(alias.asname or alias.name)
                    if alias.name.startswith("_") and alias.name != "__version__":
                        found.add(f"{path.relative_to(ROOT)} {alias.name}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ours and node.attr.startswith("_") and node.attr[1] != "_":
                    found.add(f"{path.relative_to(ROOT)} {node.value.id}.{node.attr}")
    return sorted(found)


def over(limit, column, kernels=None):
    return [f for f in functions() if f[column] > limit and kernels in (None, f[1])]


MEASURES = {
    "core": lambda: lines(set(files(*CORE)) - set(files(*TOOLS))),
    "tools": lambda: lines(files(*TOOLS)),
    "wing": lambda: lines(files(*WING)),
    "tests": lambda: lines(files("tests/**/*.py")),
    "longest kernel": lambda: max(length for _, kernel, length, _ in functions() if kernel),
    "longest other function": lambda: max(
        length for _, kernel, length, _ in functions() if not kernel
    ),
    "kernels over 100 lines": lambda: over(100, 2, kernels=True),
    "other functions over 60 lines": lambda: over(60, 2, kernels=False),
    "longest signature": lambda: max(count for *_, count in functions()),
    "signatures over 25": lambda: over(25, 3),
    "files over their limit": lambda: [
        str(path.relative_to(ROOT))
        for path in product()
        if lines([path]) > (400 if is_kernel_file(path) else 300)
    ],
    "imports upwards": imports_upwards,
    "imports by a string": imports_by_a_string,
    "private names used by another module": private_names_used,
}


@once
def test_every_file_has_its_floor():
    assert {floor(module_of(path)) for path in product()} == set(range(len(FLOORS)))
    assert set(product()) == set(files("keras_xlstm/**/*.py", "backends/**/*.py"))


@once
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    found = MEASURES[name]()
    count = found if isinstance(found, int) else len(found)
    assert count <= LIMITS[name], found


@once
def test_sweeps_are_of_tests_that_are_there():
    for file, _, names in sweeps.SWEEPS:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        contract = "".join(path.read_text() for path in files("tests/contract/*.py"))
        source = ast.unparse(tree) + contract
        for name in names:
            name = name.split("::")[-1].split("[")[0]
            assert f"def {name}" in source, (file, name)
