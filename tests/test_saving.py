"""Files written on any backend load on any other, compiled models too; old files keep loading."""

import importlib.util

import exchange
import keras
import numpy as np
import pytest
from tools import HERE, array, jit, made

import keras_xlstm
from keras_xlstm import models

GOLDEN = HERE / "golden"


@pytest.fixture(scope="module", params=["jax", "tensorflow", "torch"])
def written(request, tmp_path_factory):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    name = f"exchange-{request.param}"
    return made(name, "exchange.py", tmp_path_factory, KERAS_BACKEND=request.param)


def test_every_backend_reads_every_backend(written):
    x, y = exchange.data()
    want = np.load(written / "outputs.npy")
    model = keras.models.load_model(written / "model.keras")
    model.jit_compile = jit()  # JAX's files ask for compilation
    np.testing.assert_allclose(model.predict(x, verbose=0), want, atol=1e-5)
    model.fit(x, y, verbose=0)  # compiled: the optimizer came along
    assert int(array(model.optimizer.iterations)) == 4
    goes_on_as_written(written, continues_as_written(written))
    model = exchange.build()
    model.jit_compile = jit()
    model.load_weights(written / "model.weights.h5")
    np.testing.assert_allclose(model.predict(x, verbose=0), want, atol=1e-5)


def test_both_directions_on_every_backend(written):
    tagger = keras.models.load_model(written / "tagger.keras")
    got = tagger.predict_on_batch(exchange.TAGGED)
    # Six blocks deep, backends add float32 numbers in other orders, and processors have other
    # instructions for it: up to 1.8e-5 was seen.
    np.testing.assert_allclose(got, np.load(written / "tags.npy"), rtol=1e-5, atol=4e-5)


def test_every_backend_reads_forecasters_of_every_backend(written):
    inputs, y = exchange.windows()
    model = keras.models.load_model(written / "forecaster.keras")
    model.jit_compile = jit()
    got = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(got, np.load(written / "forecasts.npy"), atol=1e-5)
    model.fit(inputs, y, verbose=0)
    assert int(array(model.optimizer.iterations)) == 4


def test_golden_file():
    """Written by version 0.1: attribute names, class names and weight order are the file format."""
    model = keras.models.load_model(GOLDEN / "model.keras", compile=False)
    model.jit_compile = jit()
    got = model.predict(exchange.data()[0], verbose=0)
    np.testing.assert_allclose(got, np.load(GOLDEN / "outputs.npy"), atol=1e-5)
    continues_as_written(GOLDEN)


def test_old_files_keep_their_initial_values():
    """The file says them: drawn anew, its sLSTM starts as in version 0.1, not as sLSTM() does now."""
    model = keras.models.clone_model(keras.models.load_model(GOLDEN / "model.keras", compile=False))
    layer = next(x for x in model.layers if isinstance(x, keras_xlstm.layers.sLSTM))
    assert not array(layer.cell.recurrent_kernel).any()
    heads, units = layer.num_heads, layer.units // layer.num_heads
    want = 5 - 12 * np.linspace(0, 1, units) ** 0.3
    np.testing.assert_allclose(array(layer.cell.bias)[1], [want] * heads, rtol=1e-6)
    memory = model.get_layer("bidirectional").forward_layer
    np.testing.assert_allclose(array(memory.forget_gate.bias), [3, 6], rtol=1e-6)


def continues_as_written(folder):
    """Greedy decoding gives the same tokens on every backend."""
    model = keras.models.load_model(folder / "language_model.keras")
    got = np.concatenate(model.generate(exchange.PROMPTS, 12, temperature=0))
    np.testing.assert_array_equal(got, np.load(folder / "tokens.npy"))
    return model


def goes_on_as_written(folder, model):
    """From the state of a text that another backend wrote."""
    found = models.load_state(folder / "state.npz")
    got = np.concatenate(exchange.replies(model, found["state"]))
    np.testing.assert_array_equal(got, np.load(folder / "replies.npy"))
    pairs = [keras.tree.flatten(x) for x in (found["state"]["blocks"], found["half"])]
    for whole, half in zip(*pairs, strict=True):
        assert keras.backend.standardize_dtype(half.dtype) == "bfloat16"
        np.testing.assert_array_equal(array(half), array(keras.ops.cast(whole, "bfloat16")))


@pytest.mark.parametrize("Layer", [keras_xlstm.layers.sLSTM, keras_xlstm.layers.mLSTM])
def test_states_are_not_saved(Layer, tmp_path):
    """A stateful model's file does not hold the batch's states, and loads at another batch size."""

    def build(batch):
        layer = Layer(4, stateful=True, name="layer")
        return keras.Sequential([keras.Input(batch_shape=(batch, 5, 2)), layer])

    one, two = build(3), build(2)
    one(np.ones((3, 5, 2), "float32"))
    one.save_weights(tmp_path / "x.weights.h5")
    two.load_weights(tmp_path / "x.weights.h5")
    assert not any(array(s).any() for s in two.layers[0].states)
    a, b = (m.layers[0].trainable_weights for m in (one, two))
    for v, w in zip(a, b, strict=True):
        np.testing.assert_array_equal(array(v), array(w))


def test_missing_weight_is_an_error(tmp_path):
    layer = keras_xlstm.layers.sLSTM(4)
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match=r"must hold .*recurrent_kernel.*Received: \[\]"):
        layer.cell.load_own_variables({})
