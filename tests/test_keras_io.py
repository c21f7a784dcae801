"""The recurrent examples of keras.io, small, on made-up data, with one word changed.

Each trains a step, in which every weight moves, is saved, loaded, and predicts the same.
"""

import keras
import numpy as np
import pytest
from keras import ops
from tools import BACKEND, HERE, array, run_blocks, tensor

from keras_xlstm.layers import mLSTM, sLSTM

BATCH = 4


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def integers(high, *shape, low=0):
    return np.random.default_rng(1).integers(low, high, shape)


def one_hot(classes, *shape):
    return np.eye(classes, dtype="float32")[integers(classes, *shape)]


# ------------------------------------------------------------------ numbers over time


def weather_forecast(LSTM):
    """A day of seven measurements to the temperature twelve hours later."""
    pytest.importorskip(
        "tensorflow", reason="timeseries_dataset_from_array makes a tf.data.Dataset"
    )
    series = draw(55, 7)
    dataset = keras.utils.timeseries_dataset_from_array(
        series[:-12], series[24 + 12 - 1 :, 1], sequence_length=24, batch_size=10
    )
    x, _ = next(iter(dataset))
    inputs = keras.layers.Input(shape=(x.shape[1], x.shape[2]))
    outputs = keras.layers.Dense(1)(LSTM(32)(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.001), loss="mse")
    return model, x.numpy(), dataset


@keras.saving.register_keras_serializable(package="test_keras_io")
class GraphConvolution(keras.layers.Layer):
    """Each road with the mean of its neighbours: (batch, roads, steps, features)."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.project = keras.layers.Dense(units, activation="relu")

    def build(self, input_shape):
        self.project.build((*input_shape[:-1], 2 * input_shape[-1]))

    def call(self, x):
        beside = (ops.roll(x, 1, axis=1) + ops.roll(x, -1, axis=1)) / 2
        return self.project(ops.concatenate([x, beside], axis=-1))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def traffic_forecast(LSTM):
    """Speeds on roads: a convolution over the graph, then the LSTM over every road's steps."""
    roads, steps, ahead = 5, 12, 3
    inputs = keras.layers.Input((roads, steps, 1))
    x = GraphConvolution(10)(inputs)
    x = ops.reshape(x, (-1, steps, 10))
    x = keras.layers.Dense(ahead)(LSTM(64)(x))
    model = keras.Model(inputs, ops.reshape(x, (-1, roads, ahead)))
    model.compile(keras.optimizers.RMSprop(0.0002), loss=keras.losses.MeanSquaredError())
    return model, draw(BATCH, roads, steps, 1), draw(BATCH, roads, ahead)


def anomaly_autoencoder(LSTM):
    x = draw(BATCH, 10, 1)
    model = keras.Sequential(
        [
            keras.layers.Input((10, 1)),
            LSTM(16),
            keras.layers.Dropout(0.2),
            keras.layers.RepeatVector(10),
            LSTM(16, return_sequences=True),
            keras.layers.Dropout(0.2),
            keras.layers.TimeDistributed(keras.layers.Dense(1)),
        ]
    )
    model.compile("adam", loss="mse")
    return model, x, x


def video_features(LSTM):
    """Features of up to 12 frames, and which of them are frames."""
    frames = keras.layers.Input((12, 32))
    mask = keras.layers.Input((12,), dtype="bool")
    x = LSTM(16, return_sequences=True)(frames, mask=mask)
    x = LSTM(8)(x)
    x = keras.layers.Dropout(0.4)(x)
    x = keras.layers.Dense(8, activation="relu")(x)
    model = keras.Model([frames, mask], keras.layers.Dense(5, activation="softmax")(x))
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    real = np.arange(12) < np.array([[12], [3], [7], [1]])
    return model, [draw(BATCH, 12, 32), real], integers(5, BATCH)


# ------------------------------------------------------------------ text


def sentiment(LSTM, **embedding):
    inputs = keras.Input(shape=(None,), dtype="int32")
    embed = keras.layers.Embedding(50, 16, **embedding)
    x = keras.layers.Bidirectional(LSTM(8, return_sequences=True))(embed(inputs))
    # From Keras 3.16 on it does not come by itself.
    x = keras.layers.Bidirectional(LSTM(8))(x, mask=embed.compute_mask(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x))
    model.compile("adam", loss="binary_crossentropy", metrics=["accuracy"])
    ids = keras.utils.pad_sequences([[3, 4, 5, 6, 7], [8, 9], [1], [2, 3, 4]], maxlen=9)
    return model, ids, np.array([0, 1, 1, 0])


def sentiment_masked(LSTM):
    return sentiment(LSTM, mask_zero=True)


def addition(LSTM):
    """ "12+345" to "357 ", a character at a time."""
    characters, digits = 12, 3
    model = keras.Sequential(
        [
            keras.layers.Input((2 * digits + 1, characters)),
            LSTM(16),
            keras.layers.RepeatVector(digits + 1),
            LSTM(16, return_sequences=True),
            keras.layers.Dense(characters, activation="softmax"),
        ]
    )
    model.compile("adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model, one_hot(characters, BATCH, 7), one_hot(characters, BATCH, 4)


def character_text(LSTM):
    """The character after 40 others."""
    model = keras.Sequential(
        [
            keras.Input(shape=(40, 30)),
            LSTM(128),
            keras.layers.Dense(30, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.RMSprop(0.01), loss="categorical_crossentropy")
    return model, one_hot(30, BATCH, 40), one_hot(30, BATCH)


def translation(LSTM):
    """The states of the encoder start the decoder, which is fed the translation so far."""
    encoder_inputs = keras.Input(shape=(None, 11), name="source")
    _, *states = LSTM(16, return_state=True, name="encoder")(encoder_inputs)
    decoder_inputs = keras.Input(shape=(None, 13), name="target")
    decoder = LSTM(16, return_sequences=True, return_state=True, name="decoder")
    outputs, *_ = decoder(decoder_inputs, initial_state=states)
    outputs = keras.layers.Dense(13, activation="softmax", name="dense")(outputs)
    model = keras.Model([encoder_inputs, decoder_inputs], outputs)
    model.compile("rmsprop", loss="categorical_crossentropy", metrics=["accuracy"])
    target = one_hot(13, BATCH, 7)
    return model, [one_hot(11, BATCH, 6), target[:, :-1]], target[:, 1:]


# ------------------------------------------------------------------ images of text


def captcha(LSTM):
    """The columns of a picture as steps, and a loss that aligns them with the letters."""
    inputs = keras.layers.Input((24, 8, 1))
    x = keras.layers.Conv2D(4, 3, activation="relu", padding="same")(inputs)
    x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.Reshape((12, 4 * 4))(x)
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.Dropout(0.2)(x)
    x = keras.layers.Bidirectional(LSTM(16, return_sequences=True, dropout=0.25))(x)
    x = keras.layers.Bidirectional(LSTM(8, return_sequences=True, dropout=0.25))(x)
    model = keras.Model(inputs, keras.layers.Dense(20)(x))
    model.compile("adam", loss=keras.losses.CTC())
    return model, draw(BATCH, 24, 8, 1), integers(20, BATCH, 5, low=1)


EXAMPLES = {
    example.__name__: example
    for example in (
        weather_forecast, traffic_forecast, anomaly_autoencoder, video_features, sentiment,
        sentiment_masked, addition, character_text, translation, captcha,
    )
}  # fmt: skip
# Of an mLSTM whose states alone are read: what makes its outputs.
UNUSED = {"query", "output_gate", "head_norm"}


@pytest.fixture(params=[sLSTM, mLSTM], ids=["sLSTM", "mLSTM"])
def layer(request):
    return request.param


def predicted(model, x):
    """model.predict_on_batch(x): on JAX alone compiled, which costs the others seconds."""
    if BACKEND == "jax":
        return model.predict_on_batch(x)
    outputs = model([tensor(part, part.dtype) for part in x] if isinstance(x, list) else x)
    return keras.tree.map_structure(array, outputs)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, layer, tmp_path):
    model, x, y = EXAMPLES[name](layer)
    model.optimizer.build(model.trainable_weights)  # or TensorFlow traces the step twice
    before = [array(weight) for weight in model.trainable_weights]
    data = (y,) if name == "weather_forecast" else (x, y)
    history = model.fit(*data, batch_size=None if len(data) == 1 else BATCH, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for weight, old in zip(model.trainable_weights, before, strict=True):
        if not (name == "translation" and UNUSED & set(weight.path.split("/"))):
            assert np.isfinite(array(weight)).all(), weight.path
            assert (array(weight) != old).any(), weight.path
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    want = predicted(model, x)
    np.testing.assert_allclose(predicted(loaded, x), want, atol=1e-5)
    if name in AFTER:
        AFTER[name](loaded, x, want)


# ------------------------------------------------------------------ what follows the training


def translate(model, x, want):
    """Encoder and decoder as models of their own: token by token what the model says at once."""
    source, target = x
    encoder = keras.Model(model.get_layer("source").output, model.get_layer("encoder").output[1:])
    states = predicted(encoder, source)
    token = keras.Input(shape=(None, target.shape[-1]))
    inputs = [keras.Input(shape=state.shape[1:]) for state in states]
    outputs, *carried = model.get_layer("decoder")(token, initial_state=inputs)
    decoder = keras.Model([token, *inputs], [model.get_layer("dense")(outputs), *carried])
    for step in range(target.shape[1]):
        given = [target[:, step : step + 1], *states]
        probabilities, *states = predicted(decoder, given)
        np.testing.assert_allclose(probabilities[:, 0], want[:, step], atol=1e-5)


def write_text(model, x, want):
    """Each character goes to the end of the next input."""
    window, text = x[:1], []
    for _ in range(3):
        (probabilities,) = predicted(model, window)
        assert abs(probabilities.sum() - 1) < 1e-5
        text.append(int(probabilities.argmax()))
        window = np.concatenate([window[:, 1:], np.eye(30, dtype="float32")[None, text[-1:]]], 1)
    assert window[0, -3:].argmax(-1).tolist() == text


def read_letters(model, x, want):
    lengths = np.full(BATCH, want.shape[1], "int32")
    decoded, _ = ops.nn.ctc_decode(want, lengths, strategy="greedy")
    assert array(decoded)[0].shape[0] == BATCH


# ------------------------------------------------------------------ stateful training


def test_callback_of_the_docs_resets_states(layer, monkeypatch, tmp_path):
    """At a rate of 0 every pass over the same data has the same loss, if each begins empty."""
    monkeypatch.chdir(tmp_path)
    callback = run_blocks(HERE.parent / "docs" / "states.md")["ResetStates"]()
    inputs = keras.Input(batch_shape=(BATCH, 2, 3))
    keras.utils.set_random_seed(0)
    memory = layer(8, stateful=True, forget_gate_bias_initializer=keras.initializers.Constant(5.0))
    model = keras.Sequential([inputs, memory, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=BACKEND == "jax")
    x = draw(5 * BATCH, 2, 3)
    data = {"x": x, "y": x.sum((1, 2)), "batch_size": BATCH, "verbose": 0}
    options = {"epochs": 2, "shuffle": False, "validation_data": (x, data["y"])}
    reset = model.fit(**data, **options, callbacks=[callback]).history
    want = model.evaluate(**data, callbacks=[callback])
    np.testing.assert_allclose([*reset["loss"], *reset["val_loss"]], want, rtol=1e-5)
    carried = model.fit(**data, **options).history
    assert abs(carried["val_loss"][0] / want - 1) > 1e-3


AFTER = {"translation": translate, "character_text": write_text, "captcha": read_letters}
