"""Run in a process of its own, under any backend: writes a trained model and what it predicts.

KERAS_BACKEND=torch python tests/exchange.py FOLDER
"""

import pathlib
import sys

import keras
import numpy as np

from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.losses import PinballLoss
from keras_xlstm.models import xLSTMForecaster, xLSTMLanguageModel


def build():
    inputs = keras.Input((None, 3), name="inputs")
    x = keras.layers.Masking()(inputs)
    x = sLSTM(8, num_heads=2, return_sequences=True, forget_activation="exponential", name="s")(x)
    x = keras.layers.Bidirectional(
        mLSTM(8, num_heads=2, key_dim=3, value_dim=5, gate_soft_cap=15.0)
    )(x)
    return keras.Model(inputs, keras.layers.Dense(1, name="head")(x))


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 11, 3)).astype("float32")
    x[0, 7:] = x[1, :4] = 0  # masked
    return x, rng.normal(size=(6, 1)).astype("float32")


PROMPTS = [[1, 2, 3], list(range(20)), [7]]


def build_language_model():
    """Both of the paper's blocks, moved away from their initial zeros."""
    model = xLSTMLanguageModel(23, 16, 2, num_heads=2, pattern="1:1", logit_soft_cap=30.0)
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(keras.ops.convert_to_numpy(v) + 0.2 * rng.normal(size=v.shape))
    return model


def windows():
    """Inputs of every kind, with gaps, and targets with one."""
    rng = np.random.default_rng(0)
    shapes = {"history": (5, 9, 2), "future": (5, 4, 1), "static": (5, 2)}
    inputs = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    inputs["mask"] = rng.random((5, 9)) > 0.3
    y = rng.normal(size=(5, 4, 2)).astype("float32")
    inputs["history"][0, :3, 1] = y[0, 0] = np.nan
    return inputs, y


def build_forecaster():
    model = xLSTMForecaster(4, [0.2, 0.5, 0.9], patch_size=3, units=8, num_heads=2)
    model.compile("adam", PinballLoss(model.quantiles))
    return model


def write(folder):
    keras.utils.set_random_seed(0)
    x, y = data()
    model = build()
    model.compile("adam", "mse")
    model.jit_compile = keras.backend.backend() == "jax"  # elsewhere it takes long
    model.fit(x, y, epochs=3, verbose=0)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    np.save(folder / "outputs.npy", model.predict(x, verbose=0))
    model = build_forecaster()
    model.jit_compile = keras.backend.backend() == "jax"
    model.fit(*windows(), epochs=3, verbose=0)
    model.save(folder / "forecaster.keras")
    np.save(folder / "forecasts.npy", model.predict(windows()[0], verbose=0))
    model = build_language_model()
    model.save(folder / "language_model.keras")
    np.save(folder / "tokens.npy", np.concatenate(model.generate(PROMPTS, 12, temperature=0)))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
