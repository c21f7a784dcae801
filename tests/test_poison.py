"""NaN, inf and extreme numbers stay where they stand, in every implementation.

Of the Triton kernels without a GPU: test_triton.py runs this file in a process that interprets them.
"""

import os

import keras
import numpy as np
import pytest
from keras import ops
from test_blocks import B, D, T, built
from test_ops import both, make_mask, make_segments, mLSTMCase
from tools import BACKEND, HAS_PALLAS, array, assert_close, tensor, vjp

from keras_xlstm import layers, models

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OWN = {"jax": "pallas", "tensorflow": "xla", "torch": "triton"}[BACKEND]
IMPLEMENTATIONS = ["native", OWN] if OWN != "pallas" or HAS_PALLAS else ["native"]
if BACKEND == "torch":
    import torch

    IMPLEMENTATIONS = ["triton"] if INTERPRETED else ["native"]
    if torch.cuda.is_available():
        IMPLEMENTATIONS = ["native", "triton"]
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
once = pytest.mark.skipif(INTERPRETED, reason="the kernels are below")
# What the oracle and NumPy say about the NaN that they are given.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")


def poison(x, where, rng):
    x[where] = rng.choice([np.nan, np.inf, -np.inf], x[where].shape)


def names_of(case):
    """Inputs over time, states."""
    return (case.names[:5], case.names[5:]) if case is mLSTMCase else (("x",), case.names[3:])


def run(c, implementation, dtype="float32", **options):
    """(name, got, the oracle's) of outputs, states and gradients."""
    options |= {"chunk_size": 16} if isinstance(c, mLSTMCase) else {}
    options |= {"implementation": implementation, "xla": False}
    (outputs, gradients), (h, state, wanted) = c.run(dtype, **options)
    names = ("h", *(f"last {name}" for name in names_of(type(c))[1]))
    yield from zip(names, outputs, (h, *state), strict=True)
    for name, got in zip(c.names, gradients, strict=True):
        yield f"gradient of {name}", got, wanted[name]


@every
@both
@pytest.mark.parametrize("mask", ["holes", "rows"])
def test_masked_steps(case, mask, implementation, rng):
    """The oracle never reads a masked step."""
    mask = make_mask(mask, 4, 21, rng)
    c = case(rng, B=4, T=21, H=1)
    for name in names_of(case)[0]:
        poison(c.inputs[name], ~mask, rng)
    ids = make_segments("returning", 4, 21, rng)
    for name, got, want in run(c, implementation, mask=mask, segment_ids=ids):
        assert_close(got, want, 1e-4, name)


@every
@both
def test_other_rows(case, implementation, rng):
    """Inputs, states and incoming gradients of one row are nothing to the others."""
    c = case(rng, B=4, T=21, H=1)
    timed, states = names_of(case)
    for x in (*(c.inputs[name] for name in (*timed, *states)), *c.cotangents):
        poison(x, 1, rng)
    others, shared = [0, 2, 3], {"gradient of R", "gradient of bias"}
    for name, got, want in run(c, implementation, mask=make_mask("holes", 4, 21, rng)):
        if name not in shared:
            assert_close(array(got)[others], want[others], 1e-4, name)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter computes float32 alone")
@every
@both
def test_the_edge_of_float16(case, implementation, rng):
    """What float16 can hold comes out finite, whatever the gates."""
    largest = 65504.0
    c = case(rng, B=2, T=21, H=1)
    gates = [c.inputs[name] for name in ("if" if case is mLSTMCase else "x")]
    if case is mLSTMCase:
        for name in "qk":  # of one sign: then h is a mean of v, which float16 can hold
            c.inputs[name] = largest * rng.choice([1.0, 0.5, 1e-8], c.inputs[name].shape)
        c.inputs["v"] = largest * rng.choice([1.0, -1.0, 1e-8, 0.0], c.inputs["v"].shape)
        for name in "Cn":
            c.inputs[name] = np.abs(c.inputs[name])
    for gate in gates:
        gate[...] = rng.choice([1e4, -1e4, largest, -largest, 1.0, -1.0], gate.shape)
    for name, got, want in run(c, implementation, "float16"):
        half = keras.backend.standardize_dtype(got.dtype) == "float16"
        held = np.abs(want) < (0.99 * largest if half else 1e37)
        assert np.isfinite(array(ops.cast(got, "float32")))[held].all(), name


# ------------------------------------------------------------------------- layers and models


def stack(architecture):
    model = models.xLSTMStack(D, num_blocks=2, num_heads=2, architecture=architecture)
    return model, lambda x, mask: model({"sequences": x, "padding_mask": mask})


def stack_run(architecture):
    model, _ = stack(architecture)
    return model, lambda x, mask: model.run(x, model.get_initial_state(B), padding_mask=mask)[0]


def stack_in_a_model():
    model, _ = stack("paper")
    sequences, mask = keras.Input((T, D)), keras.Input((T,), dtype="bool")
    # Keras's own way: a mask that comes with the tensor.
    masked = keras.layers.Lambda(lambda x: x[0], mask=lambda x, mask: x[1])([sequences, mask])
    outer = keras.Model([sequences, mask], model(masked))
    return outer, lambda x, mask: outer([x, mask])


def alone(make, **options):
    layer = make(**options)
    return layer, lambda x, mask: layer(x, mask=mask)


def convolution():
    layer = layers.CausalConv1D(4)
    layer.build((B, T, D))
    return layer, lambda x, mask: layer(x, np.zeros((B, 3, D), "float32"), mask=mask)[0]


def block(case):
    layer = built(case, np.random.default_rng(1))
    return layer, lambda x, mask: layer(x, mask=mask)


WHOLES = {
    "mlstm": lambda: alone(layers.mLSTM, units=8, return_sequences=True, go_backwards=True),
    "slstm": lambda: alone(layers.sLSTM, units=8, return_sequences=True),
    "convolution": convolution,
    "mlstm_block": lambda: block("mlstm"),
    "slstm_block": lambda: block("slstm"),
    "large_block": lambda: block("large"),
    "stack": lambda: stack("paper"),
    "large_stack": lambda: stack("large"),
    "run": lambda: stack_run("paper"),
    "stack_in_a_model": stack_in_a_model,
}


@once
@pytest.mark.parametrize("whole", WHOLES)
def test_padding_of_layers(whole, rng):
    """Outputs at real steps and the gradients of inputs and of every weight."""
    layer, call = WHOLES[whole]()
    mask = make_mask("holes", B, T, rng)
    mask[1] = False
    x = rng.normal(size=(B, T, D)).astype("float32")
    call(x, mask)
    variables = layer.trainable_variables

    def real(x, *weights):
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            y = call(x, tensor(mask, "bool"))
        return (ops.where(mask[:, ::-1, None] if whole == "mlstm" else mask[..., None], y, 0.0),)

    weights = [ops.convert_to_tensor(v.value) for v in variables]
    cotangent = [tensor(rng.normal(size=call(x, mask).shape))]

    def found():
        (y,), gradients = vjp(real, [tensor(x), *weights], cotangent, xla=False)
        return [array(a) for a in (y, *gradients)]

    clean = found()
    poison(x, ~mask, rng)
    for a, b in zip(found(), clean, strict=True):
        assert_close(a, b, 1e-5)
