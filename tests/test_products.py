"""Products and losses that a backend has of its own, beside Keras's and float64."""

import keras
import numpy as np
import pytest
from keras import ops
from tools import BACKEND, array

from keras_xlstm import backends
from keras_xlstm.layers import large_block, mlstm, mlstm_block
from keras_xlstm.layers.projections import Gate, gate_pair, unfused_dense
from keras_xlstm.models import xLSTMLanguageModel


def dense(units, dim, use_bias=True, dtype="float32", kind=keras.layers.Dense):
    layer = kind(units, use_bias=use_bias, bias_initializer="random_normal", dtype=dtype)
    layer.build((None, None, dim))
    return layer


@pytest.fixture
def by_one_product(monkeypatch):
    """On JAX one product is for GPUs alone, and torch's by parts too."""
    if BACKEND == "jax":
        from keras_xlstm.backends.jax import products

        monkeypatch.setattr(backends, "float32_gate_product", products._by_parts)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="calls both")
@pytest.mark.usefixtures("by_one_product")
@pytest.mark.parametrize("dtype", ["bfloat16"] if BACKEND == "jax" else ["float32", "bfloat16"])
@pytest.mark.parametrize("time", [1, 7])
def test_gates_are_those_of_both_layers(dtype, time, rng):
    x = ops.cast(rng.normal(size=(2, time, 16)), dtype)
    layers = dense(4, 16, kind=Gate), dense(4, 16, kind=Gate)
    for lora in (False, True):
        if lora:
            layers[1].enable_lora(2)
            layers[1].lora_kernel_b.assign(rng.normal(size=(2, 4)))
        for got, layer in zip(gate_pair(x, *layers), layers):
            assert keras.backend.standardize_dtype(got.dtype) == "float32"
            np.testing.assert_allclose(array(got), array(layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("by_one_product")
@pytest.mark.parametrize(
    ("make", "module"),
    [
        (lambda: mlstm.mLSTM(8, num_heads=2, dtype="mixed_bfloat16"), mlstm),
        (lambda: mlstm_block.mLSTMBlock(num_heads=2, dtype="mixed_bfloat16"), mlstm_block),
        (lambda: large_block.xLSTMLargeBlock(num_heads=2, dtype="mixed_bfloat16"), large_block),
    ],
)
def test_gates_are_float32_in_half_precision(make, module, rng, monkeypatch):
    """Inside a layer that computes in bfloat16 Keras reads other layers' weights as such."""
    seen = []

    def spy(x, first, second, cap=None):
        gates = gate_pair(x, first, second, cap)
        seen.append((x, (first, second), cap, gates))
        return gates

    monkeypatch.setattr(module, "gate_pair", spy)
    layer = make()
    layer.build((2, 5, 16))
    for gate in (layer.input_gate, layer.forget_gate):
        gate.kernel.assign(rng.normal(size=gate.kernel.shape))
    layer(ops.convert_to_tensor(rng.normal(size=(2, 5, 16)), "bfloat16"))
    [(x, layers, cap, gates)] = seen
    x = array(ops.cast(x, "float32")).astype("float64")
    for gate, got in zip(layers, gates):
        want = x @ array(gate.kernel).astype("float64") + array(gate.bias)
        want = want if cap is None else cap * np.tanh(want / cap)
        np.testing.assert_allclose(array(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="calls each")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_each_product_alone(dtype, use_bias, rng):
    x = ops.cast(rng.normal(size=(2, 5, 16)), dtype)
    layers = [dense(units, 16, use_bias, dtype) for units in (4, 8)]
    for got, layer in zip(unfused_dense(x, *layers), layers):
        assert keras.backend.standardize_dtype(got.dtype) == dtype
        want = ops.cast(layer(x), "float32")
        np.testing.assert_allclose(array(ops.cast(got, "float32")), array(want), rtol=1e-2)


def by_parts(x, kernel, dy):
    """y, dx and dkernel by products of bfloat16 parts."""
    if BACKEND == "jax":
        import jax
        from keras_xlstm.backends.jax import products

        y, vjp = jax.vjp(jax.jit(products._by_parts), x, kernel)
        return y, *vjp(dy)
    import torch
    from keras_xlstm.backends.torch import products

    x, kernel = (t.requires_grad_() for t in (x, kernel))
    y = products._ByParts.apply(x, kernel)
    return y, *torch.autograd.grad(y, (x, kernel), dy)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="has none")
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_products_by_parts_are_float32s(scale, rng):
    x = ops.cast(rng.normal(size=(2, 50, 64)), "bfloat16")
    kernel, dy = (
        ops.cast(rng.normal(size=shape) * s, "float32")
        for shape, s in (((64, 2, 4), scale), ((2, 50, 2, 4), 1.0))
    )
    y, dx, dkernel = by_parts(x, kernel, dy)
    assert keras.backend.standardize_dtype(dx.dtype) == "bfloat16"
    X, K, D = (array(ops.cast(t, "float32")).astype("float64") for t in (x, kernel, dy))
    for got, want, error in (
        (y, np.einsum("btd,dgh->btgh", X, K), 2e-7),
        (dkernel, np.einsum("btd,btgh->dgh", X, D), 2e-7),
        (dx, np.einsum("btgh,dgh->btd", D, K), 2.5e-3),  # rounded to bfloat16
    ):
        got = array(ops.cast(got, "float32")).astype("float64")
        assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


@pytest.mark.skipif(BACKEND != "jax", reason="Keras's own, or compiled: test_training.py")
def test_losses_of_tokens(rng):
    """Ids outside the vocabulary, too, which count as nothing."""
    import jax

    logits = rng.normal(size=(3, 5, 11)).astype("float32") * 10
    y = rng.integers(0, 11, (3, 5))
    y[0, 0], y[1, 2] = -1, 11
    d = rng.normal(size=(3, 5)).astype("float32")

    def keras_losses(x):
        return ops.sparse_categorical_crossentropy(y, x, from_logits=True)

    want, want_vjp = jax.vjp(keras_losses, logits)
    got, vjp = jax.vjp(lambda x: backends.token_losses(x, y, "float32"), logits)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(d)[0], want_vjp(d.astype(want.dtype))[0], atol=1e-5)
    low, vjp = jax.vjp(
        lambda x: backends.token_losses(x, y.astype("float32"), "float32"),
        logits.astype("bfloat16"),
    )
    np.testing.assert_allclose(low, want, rtol=2e-2, atol=2e-2)
    assert vjp(d)[0].dtype == "bfloat16"


@pytest.mark.skipif(BACKEND != "jax", reason="Keras's own, or compiled: test_training.py")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_language_model_trains_by_kerass_loss(weighted, reduction, rng):
    ids = rng.integers(0, 20, (8, 6))
    weights = rng.random((8, 5)) if weighted else None
    histories = []
    for own in (True, False):
        keras.utils.set_random_seed(0)
        model = xLSTMLanguageModel(20, 16, 2, num_heads=2, architecture="large")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], jit_compile=False)
        if not own:
            model._token_losses = None
        fit = model.fit(
            ids[:, :-1], ids[:, 1:], sample_weight=weights, batch_size=4, epochs=2, verbose=0,
            shuffle=False,
        )  # fmt: skip
        histories.append(
            {**fit.history, "evaluated": model.evaluate(ids[:, :-1], ids[:, 1:], verbose=0)}
        )
    assert histories[0].keys() == histories[1].keys()
    for key, want in histories[1].items():
        np.testing.assert_allclose(histories[0][key], want, rtol=1e-4, err_msg=key)


def test_calls_alike_are_checked_once_and_others_again(rng):
    """Torch skips the checks of a call like one before; not of any that differs."""
    from keras_xlstm.ops import mlstm

    q, k, v = (ops.convert_to_tensor(rng.normal(size=(2, 3, 2, 4)), "float32") for _ in "qkv")
    i = f = ops.convert_to_tensor(rng.normal(size=(2, 3, 2)), "float32")
    want = array(mlstm(q, k, v, i, f))
    np.testing.assert_array_equal(array(mlstm(q, k, v, i, f)), want)
    with pytest.raises(ValueError, match="`k` must have shape"):
        mlstm(q, k[:, :2], v, i, f)
    with pytest.raises(ValueError, match="`i` must have shape"):
        mlstm(q, k, v, i[:, :, :1], f)
    with pytest.raises(ValueError, match="must have one dtype"):
        mlstm(q, ops.cast(k, "float16"), v, i, f)
    with pytest.raises(ValueError, match="floating-point"):
        mlstm(q, k, v, ops.cast(i, "int32"), f)
    with pytest.raises(ValueError, match="`input_gate`"):
        mlstm(q, k, v, i, f, input_gate="exponential")
    mlstm(q, k, v, i, f, eps=1, chunk_size=1)
    for wrong in ({"eps": True}, {"eps": np.ones(2)}, {"eps": i}, {"chunk_size": True}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            mlstm(q, k, v, i, f, **{"eps": 1, "chunk_size": 1, **wrong})
    mask = ops.ones((2, 4), "bool")
    with pytest.raises(ValueError, match="`mask` must have shape"):
        mlstm(q, k, v, i, f, mask=mask)
    h, state = mlstm(q, k, v, i, f, return_state=True)
    np.testing.assert_array_equal(array(h), want)
    assert [tuple(s.shape) for s in state] == [(2, 2, 4, 4), (2, 2, 4), (2, 2)]


def test_calls_alike_of_the_slstm(rng):
    from keras_xlstm.ops import slstm

    x, R, bias = (
        ops.convert_to_tensor(rng.normal(size=shape), "float32")
        for shape in ((2, 3, 4, 1, 5), (1, 5, 4, 5), (4, 1, 5))
    )
    for given in ((x, R, bias), (x, R)):
        want = array(slstm(*given))
        np.testing.assert_array_equal(array(slstm(*given)), want)
    with pytest.raises(ValueError, match="`recurrent_kernel` must have shape"):
        slstm(x, R[:, :4], bias)
    with pytest.raises(ValueError, match="`bias` must have shape"):
        slstm(x, R, bias[:3])
    with pytest.raises(ValueError, match="floating-point"):
        slstm(x, R, ops.cast(bias, "int32"))
    with pytest.raises(ValueError, match="`recurrent_scale` must have shape"):
        slstm(x, R, bias, recurrent_scale=ops.ones((2, 1, 4)))
    with pytest.raises(ValueError, match="`forget_gate`"):
        slstm(x, R, bias, forget_gate="relu")
    h, state = slstm(x, R, return_state=True)
    np.testing.assert_array_equal(array(h), want)
    assert [tuple(s.shape) for s in state] == [(2, 1, 5)] * 4
