"""The loss of a language model without all logits at once: the same loss, the same gradients."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_xlstm.backends import head_loss
from tools import BACKEND, array, assert_close

from keras_xlstm.models import token_loss, xLSTMLanguageModel

V, B, T = 37, 4, 13
Loss = keras.losses.SparseCategoricalCrossentropy


@pytest.fixture
def used(monkeypatch):
    """The numbers of parts of all losses that were computed so."""
    found, own = [], head_loss.loss_sum

    def loss_sum(*arguments):
        found.append(arguments[6])
        return own(*arguments)

    monkeypatch.setattr(head_loss, "loss_sum", loss_sum)
    monkeypatch.setattr(head_loss, "_LOGITS", 4 * V * B)
    monkeypatch.setattr(head_loss, "_FEW", 1)
    return found


def model_of(kind=xLSTMLanguageModel, loss=None, reduction="sum_over_batch_size", metrics=None,
             optimizer="sgd", rate=0.1, **options):  # fmt: skip
    keras.utils.set_random_seed(0)
    model = kind(V, 16, 1, num_heads=2, architecture="large", **options)
    optimizer = keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": rate}})
    model.compile(optimizer, loss or Loss(from_logits=True, reduction=reduction), metrics=metrics)
    return model


def fitted(model, mask=False, weights=False, time=T):
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, V, (2, 2 * B, time))
    x = {"token_ids": x, "padding_mask": rng.random(x.shape) > 0.3} if mask else x
    weights = rng.random(y.shape).astype("float32") if weights else None
    given = {"batch_size": B, "epochs": 2, "shuffle": False, "verbose": 0}
    return model.fit(x, y, sample_weight=weights, **given).history["loss"]


CASES = {
    "plain": {},
    "tied, capped": {"tie_embeddings": True, "logit_soft_cap": 3.0},
    "no final norm": {"final_norm": False, "reduction": "sum", "rate": 1e-3},
    "half precision": {"dtype": "mixed_bfloat16", "logit_soft_cap": 3.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("mask", "weights"), [(False, False), (True, True)])
def test_training_is_the_same(case, mask, weights, used, monkeypatch):
    model = model_of(**CASES[case])
    losses = fitted(model, mask, weights)
    assert set(used) == {4}  # of three steps, and a rest of one
    monkeypatch.undo()
    want = model_of(**CASES[case])
    wanted, before = fitted(want, mask, weights), model_of(**CASES[case])
    half = case == "half precision"
    np.testing.assert_allclose(losses, wanted, rtol=1e-2 if half else 1e-5)
    for got, w, start in zip(model.weights, want.weights, before.weights, strict=True):
        moved, should = array(got) - array(start), array(w) - array(start)
        # In half precision, single tokens' gradients are rounded where the gates' sums cancel.
        assert_close(moved, should, 5e-2 if half else 1e-3, name=got.path, least=1e-2)


def test_equal_parts(used):
    assert head_loss.parts(1, 8, V) == 1
    fitted(model_of(), time=12)
    assert set(used) == {3}
    assert head_loss.parts(B, 14, V) == 7  # rather than 4


def test_logits_are_what_anybody_else_gets(used):
    """Metrics, other losses, subclasses that look at them, and every call outside of training."""
    seen = []

    class Looks(xLSTMLanguageModel):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            seen.append(y_pred.shape)
            return super().compute_metrics(x, y, y_pred, sample_weight)

    fitted(model_of(metrics=["accuracy"]))
    fitted(model_of(loss=Loss(from_logits=True, ignore_class=3)))
    fitted(model_of(kind=Looks))
    assert seen
    assert all(shape[-1] == V for shape in seen)
    assert not used
    model = model_of(metrics=[])
    fitted(model)
    assert used
    del used[:]
    x = np.zeros((B, T), "int32")
    model.evaluate(x, x, verbose=0)
    assert model(x, training=True).shape == model.predict(x, verbose=0).shape == (B, T, V)
    assert not used
    assert token_loss._PARTS.get() == 0


def test_a_model_that_was_saved_and_one_with_lora(used, tmp_path):
    model = model_of()
    fitted(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.zeros((1, 3), "int32")
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))
    before = array(model.get_layer("head").kernel)
    model.get_layer("head").enable_lora(2)
    model.compile("sgd", Loss(from_logits=True))
    del used[:]
    fitted(model)
    assert used
    assert np.abs(array(model.get_layer("head").kernel) - before).max() > 0


# ------------------------------------------------------------------------------------ the function


def inputs(rng, scale=1.0, turned=False):
    features = scale * rng.normal(size=(2, 7, 5)).astype("float32")
    weight = rng.normal(size=(V, 5) if turned else (5, V)).astype("float32")
    return features, weight, rng.integers(0, V, (2, 7)), rng.random((2, 7)).astype("float32")


def reference(features, weight, y, weights, cap, turned):
    """The loss, and its gradients by features and weight, in float64."""
    features, w = np.float64(features), np.float64(weight.T if turned else weight)
    z = features @ w
    x, slope = (z, 1.0) if cap is None else (cap * np.tanh(z / cap), 1 - np.tanh(z / cap) ** 2)
    top = x.max(-1, keepdims=True)
    total = np.log(np.exp(x - top).sum(-1, keepdims=True)) + top
    own, known = np.arange(V) == y[..., None], (y >= 0) & (y < V)
    weights = np.where(known, weights, 0)[..., None]
    loss = (weights[..., 0] * (total[..., 0] - (own * x).sum(-1))).sum()
    d = weights * slope * (np.exp(x - total) - own)
    dw = np.einsum("btd,btv->dv", features, d)
    return loss, d @ w.T, dw.T if turned else dw


def by_framework(features, weight, y, weights, cap, turned, count):
    """The same by ours; the loss doubled, so that its gradient enters."""

    def loss(features, weight):
        return 2 * head_loss.loss_sum(
            features, weight, ops.convert_to_tensor(y), ops.convert_to_tensor(weights), cap, turned,
            count, head_loss.cross_entropy, "float32",
        )  # fmt: skip

    features, weight = map(ops.convert_to_tensor, (features, weight))
    if BACKEND == "jax":
        import jax

        value, found = jax.value_and_grad(loss, (0, 1))(features, weight)
    elif BACKEND == "torch":
        import torch

        leaves = [x.requires_grad_() for x in (features, weight)]
        value = loss(*leaves)
        found, value = torch.autograd.grad(value, leaves), value.detach()
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([features, weight])
            value = loss(features, weight)
        found = tape.gradient(value, [features, weight])
    return [array(x) / 2 for x in (value, *found)]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(("cap", "turned"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_and_gradients(scale, cap, turned, count, rng):
    given = inputs(rng, scale, turned)
    given[2][0, :2] = -1, V  # beyond the vocabulary
    for got, want in zip(
        by_framework(*given, cap, turned, count), reference(*given, cap, turned), strict=True
    ):
        # Far beyond the cap, its slope of 1 - tanh**2 cancels.
        assert_close(got, want, 1e-4 if cap and scale > 1 else 2e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA alone says what memory a program takes")
def test_memory(rng):
    """A part of the logits is what is there, not all of them."""
    import jax

    features, y = np.zeros((2, 512, 8), "float32"), np.zeros((2, 512), "int32")
    weights, size = np.ones(y.shape, "float32"), 4096

    def bytes_of(count):
        def loss(features, weight):
            return head_loss.loss_sum(
                features, weight, y, weights, None, False, count, head_loss.cross_entropy, "float32"
            )

        run = jax.jit(jax.grad(loss, (0, 1)))
        compiled = run.lower(features, np.zeros((8, size), "float32")).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * y.size * size
    assert bytes_of(1) >= logits
    assert bytes_of(16) < logits / 4


@pytest.mark.skipif(BACKEND != "jax", reason="JAX shares devices out in one process")
def test_rows_on_several_devices(used):
    losses = []
    for count in (1, 4):
        devices = keras.distribution.list_devices()[:count]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        try:
            losses.append(fitted(model_of()))
        finally:
            keras.distribution.set_distribution(None)
    assert set(used) == {4}
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
