"""Time shared out among devices: the outputs, states and gradients of one device."""

import keras
import numpy as np
import oracle
import pytest
import stretches
from tools import BACKEND, HAS_PALLAS, array, assert_close, call, perturbed, tensor, vjp

import keras_xlstm
from keras_xlstm.distribution import ContextParallel, context_parallel
from keras_xlstm.layers import mLSTM, mLSTMBlock, sLSTM, sLSTMBlock, xLSTMLargeBlock
from keras_xlstm.models import xLSTMLanguageModel

pytestmark = pytest.mark.skipif(BACKEND == "tensorflow", reason="JAX and torch share out time")
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="of torch's processes")

B, T, H, K, V = 2, 12, 2, 3, 5


def patterns(rng):
    """A mask that leaves out a whole stretch of four, and documents across borders."""
    mask = rng.random((B, T)) < 0.6
    mask[0, 3:6], mask[1, :4] = False, False
    ids = np.cumsum(rng.random((B, T)) < 0.25, axis=1).astype("int32") % 3
    ids[1] = [5, 5, 5, 5, 5, 5, 7, 7, 7, 5, 5, 5]
    return mask, ids


CASES = {  # devices, a mask, documents, an initial state, the size of gates
    "two": (2, False, False, False, 1.0),
    "four": (4, True, True, True, 1.0),
    "documents": (4, False, True, True, 1.0),
    "large gates": (4, True, False, True, 1e4),
}
if HAS_PALLAS:
    CASES["kernels"] = 2, True, True, True, 1.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_op(name, input_gate, rng, monkeypatch):
    count, masked, packed, starts, size = CASES[name]
    monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")
    mask, ids = patterns(rng)
    mask, ids = mask if masked else None, ids if packed else None
    inputs = [rng.normal(size=(B, T, H, n)) for n in (K, K, V)]
    inputs += [size * rng.normal(size=(B, T, H)) for _ in "if"]
    state = [rng.normal(size=s) for s in ((B, H, K, V), (B, H, K), (B, H))]
    state[2] *= size
    inputs = [x.astype("float32") for x in inputs + state * starts]
    cotangents = [rng.normal(size=s) for s in ((B, T, H, V), (B, H, K, V), (B, H, K))]
    run = stretches.shared_out(
        lambda q, k, v, i, f, mask, ids, **options: flat(
            keras_xlstm.ops.mlstm(
                q, k, v, i, f, mask=mask, segment_ids=ids, return_state=True,
                input_gate=input_gate, implementation="pallas" if name == "kernels" else "native",
                **options,
            )
        ), count, monkeypatch,
    )  # fmt: skip
    given = [None if x is None else keras.ops.convert_to_tensor(x) for x in (mask, ids)]

    def function(*inputs):
        return run(*inputs[:5], *given, initial_state=inputs[5:] or None)

    found, gradients = vjp(function, [tensor(x) for x in inputs], [*map(tensor, cotangents), None])
    options = {"mask": mask, "segment_ids": ids, "input_gate": input_gate}
    h, (C, n, m), want = oracle.mlstm(
        *inputs[:5], state=inputs[5:] or None, gradients=cotangents, **options
    )
    assert_close(found[0], h, 1e-5, "h")
    scale = np.exp(array(found[3]).astype("float64") - m)  # m is any number near the largest
    assert_close(array(found[1]) * scale[..., None, None], C, 1e-5, "C")
    assert_close(array(found[2]) * scale[..., None], n, 1e-5, "n")
    for letter, gradient in zip("qkvifCnm", gradients, strict=False):
        # Where one step outweighs all others, q's gradient is a difference of equal numbers.
        assert_close(gradient, want[letter], 1e-5, f"d{letter}", least=0.1)


def flat(outputs):
    h, state = outputs
    return h, *state


# ------------------------------------------------------------------------------------- layers

FEATURES = 8
LAYERS = {
    "paper": lambda: mLSTMBlock(num_heads=2, use_bias=True, return_state=True),
    "large": lambda: xLSTMLargeBlock(num_heads=2, return_state=True),
    "mLSTM": lambda: mLSTM(8, 2, return_sequences=True, return_state=True),
    "last": lambda: mLSTM(8, 2, return_state=True),
}
if BACKEND == "jax":  # threads cannot wait for each other in a backward pass: tests/devices.py
    LAYERS["remat"] = lambda: mLSTMBlock(num_heads=2, remat=True, return_state=True)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, rng, monkeypatch):
    """Outputs, states and the gradients of inputs, states and all weights."""
    layer = LAYERS[name]()
    layer.build((B, T, FEATURES))
    perturbed(layer, rng)
    mask, ids = map(keras.ops.convert_to_tensor, patterns(rng))
    ids = ids if hasattr(layer, "block_index") else None
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    states = [tensor(rng.normal(size=s)) for s in layer._state_shapes(B)]
    number = len(states)

    def run_layer(x, mask, ids, state, weights):
        options = {} if ids is None else {"segment_ids": ids}
        options |= {"initial_state": state, "mask": mask, "training": True}
        outputs, _ = layer.stateless_call(weights, others, x, **options)
        return outputs if len(outputs[0].shape) == 3 else (x, *outputs)

    def by(run):
        return lambda x, *given: run(x, mask, ids, state=given[:number], weights=given[number:])

    arguments = [tensor(rng.normal(size=(B, T, FEATURES))), *states, *weights]
    cotangents = [tensor(rng.normal(size=y.shape)) for y in by(run_layer)(*arguments)]
    cotangents[-1] = None  # of m
    if name == "last":
        cotangents[0] = None  # of x
    outputs, gradients = vjp(by(run_layer), arguments, cotangents)
    found = vjp(by(stretches.shared_out(run_layer, 4, monkeypatch)), arguments, cotangents)
    for a, b in zip(found[0], outputs, strict=True):
        assert_close(a, array(b), 1e-5)
    for index, (a, b) in enumerate(zip(found[1], gradients, strict=True)):
        # m's is a difference of large numbers, those of C and n are small behind many steps.
        assert_close(a, array(b), 1e-5, index, least=1.0 if index == number else 0.1)


# --------------------------------------------------------------------------------- what is refused


@pytest.fixture
def shared(monkeypatch):
    """Time shared out among two devices, as far as a call that fails at once can tell."""
    if BACKEND == "jax":
        with stretches.context_parallel(2).scope():
            yield
    else:
        from keras_xlstm.backends.torch import context

        group = stretches.Threads(2)
        group.own.rank = 0
        token = context._group.set(group)
        yield
        context._group.reset(token)


@pytest.mark.parametrize("make", [lambda: sLSTM(4), lambda: sLSTMBlock(num_heads=2)])
def test_slstm_is_refused(make, shared):
    with pytest.raises(ValueError, match=r"sLSTM reads steps one after another.*Take mLSTM alone"):
        make()(np.ones((2, 4, 8)))


def test_generation_is_refused(shared):
    model = xLSTMLanguageModel(16, 8, num_blocks=1)
    for method in (model.generate, model.stream):
        with pytest.raises(ValueError, match="time cannot be shared out.*Call it outside"):
            method([[1, 2]], 2)


@jax_only
def test_lengths_that_devices_do_not_divide_are_refused(shared):
    """Whichever of the layer's ways reads the sequence; a single step is every device's."""
    for layer in (mLSTM(4), mLSTM(4, return_sequences=True)):
        layer.build((2, None, 3))
        assert call(layer, np.ones((2, 1, 3))).shape[0] == 2
        with pytest.raises(
            ValueError, match=r"among the 2 devices along 'time'.*Received: 5 steps"
        ):
            layer(np.ones((2, 5, 3)))


@torch_only
def test_backwards_is_refused(shared):
    with pytest.raises(ValueError, match=r"go_backwards=True. On JAX, ContextParallel can"):
        mLSTM(4, go_backwards=True)(np.ones((2, 4, 3)))


@torch_only
def test_groups():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        with context_parallel():
            pass


@jax_only
def test_a_mesh_of_one_axis_is_refused():
    mesh = keras.distribution.DeviceMesh((2,), ("time",), keras.distribution.list_devices()[:2])
    with pytest.raises(ValueError, match=r"must have two axes.*share out time.*\('time',\)"):
        ContextParallel(mesh)


@jax_only
def test_data_layouts():
    """Time is axis 1 of all that has one that the devices divide."""
    distribution = stretches.context_parallel(4)
    for shape, want in {
        (2, 8, 3): ("batch", "time", None), (2, 8): ("batch", "time"),
        (2, 1): ("batch", None), (2, 6, 3): ("batch", None, None), (2,): ("batch",),
    }.items():  # fmt: skip
        assert distribution.get_data_layout(shape).axes == want


@jax_only
def test_backwards(rng):
    x = rng.normal(size=(2, 8, 3)).astype("float32")
    layer = mLSTM(4, go_backwards=True, return_sequences=True)
    layer.build(x.shape)
    want = array(call(layer, x))
    with stretches.context_parallel(4).scope():
        assert_close(call(layer, x), want, 1e-5)
