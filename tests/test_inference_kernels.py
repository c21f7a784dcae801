"""What blocks compute around the memory without gradients, by kernels and as layers are written."""

import importlib.util

import keras
import numpy as np
import pytest
from tools import BACKEND, GPU, perturbed

if BACKEND == "tensorflow" or not importlib.util.find_spec("triton"):
    pytest.skip("runs on torch and jax, by Triton", allow_module_level=True)

import keras_xlstm
from keras_xlstm import backends
from keras_xlstm.layers import GatedFeedForward, MultiHeadNorm, xLSTMLargeBlock
from keras_xlstm.layers.norms import RMSNormalization
from keras_xlstm.layers.projections import Gate, added_dense, gate_pair, unfused_dense

device, inference = backends.load("device"), backends.load("inference")
if BACKEND == "torch" and not GPU and not device.interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
DTYPES = ("float32", "bfloat16", "float16") if GPU else ("float32",)
each = pytest.mark.parametrize("dtype", DTYPES)
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Names of the plans that were launched."""
    found, run = [], inference.inference._run
    if BACKEND == "jax" and not GPU:
        pytest.importorskip("torch")  # whose tensors the interpreter takes
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        import triton_interpreter  # noqa: F401  registers the lowering for CPUs

    def ran(name, *arguments):
        found.append(name)
        return run(name, *arguments)

    monkeypatch.setattr(inference.inference, "_run", ran)
    return found


def without_gradients(function):
    """As generation calls it."""
    if BACKEND == "jax":
        return inference.generating(function)
    import torch

    return torch.no_grad()(function)


def compare(function, dtype, *tensors):
    function = without_gradients(function)
    with backends.use("native"):
        want = function(*tensors)
    got = function(*tensors)
    for x, y in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y = (keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in (x, y))
        assert np.linalg.norm(x - y) <= TOLERANCE[dtype] * np.linalg.norm(y)


def tensor(rng, *shape, dtype="float32", scale=1.0):
    x = keras.ops.convert_to_tensor(scale * rng.normal(size=shape).astype("float32"))
    return keras.ops.cast(x, dtype)


@each
@pytest.mark.parametrize(("heads", "units"), [(2, 10), (3, 192)])
def test_head_norms(heads, units, dtype, rng, used):
    norm = MultiHeadNorm(heads, dtype=dtype)
    norm.build((None, None, units))
    norm.gamma.assign(rng.normal(size=units))
    x, gate = (tensor(rng, 2, 3, units, dtype=dtype, scale=s) for s in (3, 30))
    compare(norm, dtype, x + 5)
    compare(norm.gated, dtype, x, gate)
    assert used == ["head_norm"] * 2


@each
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_feed_forward(activation, dtype, rng, used):
    layer = GatedFeedForward(40, activation, dtype=dtype)
    layer.build((None, None, 24))
    perturbed(layer, rng, 0.3)
    compare(layer, dtype, tensor(rng, 2, 3, 24, dtype=dtype, scale=5))
    assert used == ["gated_unit"]


def test_other_activations_stay_as_they_are(rng, used):
    layer = GatedFeedForward(40, "tanh")
    compare(layer, "float32", tensor(rng, 2, 3, 24))
    assert not used


@each
@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (3, 700)])
def test_gate_pairs(heads, width, cap, dtype, rng, used):
    gates = []
    for bias in (-10.0, 3.0):
        gate = Gate(heads, bias_initializer=keras.initializers.Constant(bias), dtype="float32")
        gate.build((None, None, width))
        gate.kernel.assign(rng.normal(size=(width, heads)) / 8)
        gates.append(gate)
    x = tensor(rng, 2, 3, width, dtype=dtype, scale=1.0)
    compare(lambda x: gate_pair(x, *gates, cap), "float32", x)
    assert used == ["gate_pair"]


HALVES = DTYPES[1:] or DTYPES  # on a GPU


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "K", "widths"), [(1, 64, [64, 128, 64, 128]), (20, 192, [64])])
def test_products_of_few(rows, K, widths, dtype, rng, used):
    layers = []
    for width in widths:
        layer = keras.layers.Dense(width, use_bias=False, dtype=dtype)
        layer.build((None, None, K))
        layers.append(layer)
    x, h = (tensor(rng, rows, 1, size, dtype=dtype) for size in (widths[0], K))
    compare(lambda h: unfused_dense(h, *layers), dtype, h)
    compare(lambda x, h: added_dense(x, h, layers[0]), dtype, x, h)
    assert used == ["products", "added_product"]


@each
@pytest.mark.parametrize(("K", "widths"), [(64, [64, 128, 64, 128]), (192, [64])])
def test_products_of_bytes(K, widths, dtype, rng, used):
    """As Keras's quantised layers: of one step, whose numbers become bytes, too."""
    layers = []
    for width in widths:
        layer = keras.layers.Dense(width, use_bias=False, dtype=dtype)
        layer.build((None, None, K))
        layer.quantize("int8")
        layers.append(layer)
    x, h = (tensor(rng, 1, 1, size, dtype=dtype) for size in (widths[0], K))
    compare(lambda h: unfused_dense(h, *layers), dtype, h)
    compare(lambda x, h: added_dense(x, h, layers[0]), dtype, x, h)
    assert used == ["products", "added_product"]
    compare(lambda h: unfused_dense(h, *layers), dtype, tensor(rng, 2, 1, K, dtype=dtype))
    assert used == ["products", "added_product"]


@pytest.mark.parametrize("case", ["rows", "bias", "width", "lora"])
def test_other_products_stay_as_they_are(case, rng, used):
    layer = keras.layers.Dense(100 if case == "width" else 64, use_bias=case == "bias")
    layer.build((None, None, 64))
    if case == "lora":
        layer.enable_lora(2)
    x = tensor(rng, 65 if case == "rows" else 2, 1, 64)
    compare(lambda x: unfused_dense(x, layer), "float32", x)
    assert not used


@each
def test_rms_norms(dtype, rng, used):
    norm = RMSNormalization(dtype=dtype)
    norm.build((None, None, 48))
    norm.scale.assign(rng.normal(size=48))
    compare(norm, dtype, tensor(rng, 2, 3, 48, dtype=dtype, scale=7))
    assert used == ["rms_norm"]


@each
@pytest.mark.parametrize("time", [1, 5])
def test_a_block(time, dtype, rng, used):
    block = xLSTMLargeBlock(num_heads=2, dtype=dtype, return_state=True, key_dim_factor=1.0)
    block.build((None, None, 64))
    perturbed(block, rng, 0.1)
    x = tensor(rng, 2, time, 64, dtype=dtype)
    state = block.get_initial_state(2)
    compare(lambda x: block(x, initial_state=state), dtype, x)
    product, added = ([], []) if dtype == "float32" and GPU else (["products"], ["added_product"])
    assert used == [
        "rms_norm", "gate_pair", *product, "head_norm", *added, "rms_norm", *product, "gated_unit",
        *added,
    ]  # fmt: skip
    used.clear()
    outputs = block(x)[0]  # with gradients: as layers are written
    assert not used
    if BACKEND == "torch":
        keras.ops.sum(outputs).backward()


def test_a_user_who_asks_for_the_native_form(rng, used):
    block = xLSTMLargeBlock(num_heads=2, use_kernel=False)
    without_gradients(block)(tensor(rng, 2, 3, 32))
    assert not used


@pytest.mark.parametrize("mode", [None, "int8"])
def test_generated_tokens(mode, rng, used):
    model = keras_xlstm.models.xLSTMLanguageModel(
        64, 128, 2, num_heads=2, architecture="large", logit_soft_cap=3.0
    )
    perturbed(model, rng, 0.2)
    prompts = [[3, 4, 5]]
    if mode:
        model.quantize(mode)
    else:
        prompts.append([6])
    texts = model.generate(prompts, 6, temperature=0)
    kernels = used.count("products") + used.count("added_product")
    # JAX traces two functions. Of bytes those of one row alone, and of the logits.
    assert kernels >= (10 if mode else 16)
    with backends.use("native"):
        want = model.generate(prompts, 6, temperature=0)
    for x, y in zip(texts, want, strict=True):
        np.testing.assert_array_equal(x, y)
