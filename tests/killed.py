"""Fits with a backup in the folder argv[1]; killed in batch argv[2], counted over all epochs."""

import os
import pathlib
import signal
import sys

import keras
import numpy as np

from keras_xlstm.layers import mLSTM, sLSTM

EPOCHS, BATCHES = 4, 3
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # either ends a process at once on Windows


class Kill(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self.left = batch

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), KILL)


def fit(folder=None, kill=None):
    """The loss of each epoch that was run, and the model."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 7, 3)).astype("float32"), rng.normal(size=(6, 1))
    layers = [sLSTM(8, num_heads=2, return_sequences=True), mLSTM(8, num_heads=2)]
    model = keras.Sequential([keras.Input((7, 3)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.03), "mse", jit_compile=keras.backend.backend() == "jax")
    callbacks = [Kill(kill)] if kill is not None else []
    if folder is not None:
        folder = pathlib.Path(folder)
        callbacks += [
            keras.callbacks.BackupAndRestore(folder / "backup"),
            keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        ]
    size = len(x) // BATCHES
    history = model.fit(
        x, y, batch_size=size, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=callbacks
    )
    return history.history["loss"], model


if __name__ == "__main__":
    fit(sys.argv[1], int(sys.argv[2]))
