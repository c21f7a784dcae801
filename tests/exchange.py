"""Run in a process of its own, under any backend: writes a trained model and what it predicts.

KERAS_BACKEND=torch python tests/exchange.py FOLDER
"""

import pathlib
import sys

import keras
import numpy as np

from keras_xlstm.layers import mLSTM, sLSTM, sLSTMBlock
from keras_xlstm.losses import PinballLoss
from keras_xlstm.models import save_state, xLSTMForecaster, xLSTMLanguageModel, xLSTMStack


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


def build_tagger():
    """Blocks and stacks that read from both ends."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Embedding(9, 8, mask_zero=True)(ids)
    x = keras.layers.Bidirectional(sLSTMBlock(num_heads=2), merge_mode="ave")(x)
    for direction in ("alternate", "both"):
        x = xLSTMStack(8, 2, num_heads=2, pattern="1:1", direction=direction)(x)
    return moved(keras.Model(ids, keras.layers.Dense(3)(x)))


# Padded in every way: zeros are masked.
TAGGED = np.array([[1, 2, 3, 4, 5, 6, 7], [0, 0, 8, 1, 2, 0, 0], [3, 0, 4, 0, 5, 6, 0]])
PROMPTS = [[1, 2, 3], list(range(20)), [7]]
REPLIES = [[5], [], [6, 7, 8]]  # what comes next


def build_language_model():
    """Both of the paper's blocks."""
    return moved(xLSTMLanguageModel(23, 16, 2, num_heads=2, pattern="1:1", logit_soft_cap=30.0))


def moved(model):
    """Away from its initial weights."""
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(keras.ops.convert_to_numpy(v) + 0.2 * rng.normal(size=v.shape))
    return model


def replies(model, state):
    """Greedy and drawn."""
    options = {"state": state, "repetition_penalty": 1.2}
    greedy = model.generate(REPLIES, 8, temperature=0, **options)
    return [*greedy, *model.generate(REPLIES, 8, seed=1, min_p=0.02, num_samples=2, **options)]


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
    model = build_tagger()
    model.save(folder / "tagger.keras")
    np.save(folder / "tags.npy", model.predict_on_batch(TAGGED))
    model = build_forecaster()
    model.jit_compile = keras.backend.backend() == "jax"
    model.fit(*windows(), epochs=3, verbose=0)
    model.save(folder / "forecaster.keras")
    np.save(folder / "forecasts.npy", model.predict(windows()[0], verbose=0))
    model = build_language_model()
    model.save(folder / "language_model.keras")
    np.save(folder / "tokens.npy", np.concatenate(model.generate(PROMPTS, 12, temperature=0)))
    _, state = model.generate(PROMPTS, 4, temperature=0, return_state=True)
    half = keras.tree.map_structure(lambda x: keras.ops.cast(x, "bfloat16"), state["blocks"])
    save_state(folder / "state.npz", {"state": state, "half": half})
    np.save(folder / "replies.npy", np.concatenate(replies(model, state)))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
