"""Fits on batches that worker processes make, started in the ways argv[1:], and on batches of
this process; prints as JSON the losses and how many other processes made batches.

python tests/workers.py spawn fork
"""

import json
import multiprocessing
import os
import pathlib
import sys
import tempfile

import keras
import numpy as np

from keras_xlstm.layers import mLSTM, sLSTM


class Batches(keras.utils.PyDataset):
    """Each process that makes one leaves a file with its number in `folder`."""

    def __init__(self, folder, **kwargs):
        super().__init__(**kwargs)
        self.folder = folder

    def __len__(self):
        return 4

    def __getitem__(self, index):
        pathlib.Path(self.folder, str(os.getpid())).touch()
        x = np.random.default_rng(index).normal(size=(2, 7, 3)).astype("float32")
        return x, x[:, :1, 0]


def fit(data):
    keras.utils.set_random_seed(0)
    layers = [sLSTM(8, num_heads=2, return_sequences=True), mLSTM(8, num_heads=2)]
    model = keras.Sequential([keras.Input((7, 3)), *layers, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model.fit(data, shuffle=False, verbose=0).history["loss"]


def loaded(method, folder):
    """What loads batches in that way, and its name: Keras's own and, on its backend, PyTorch's."""
    if method == "threads":
        yield "keras threads", Batches(folder, workers=2)
        return
    multiprocessing.set_start_method(method, force=True)
    yield f"keras {method}", Batches(folder, workers=1, use_multiprocessing=True)
    if keras.backend.backend() == "torch":
        from torch.utils.data import DataLoader

        options = {"batch_size": None, "multiprocessing_context": method}
        yield f"torch {method}", DataLoader(Batches(folder), num_workers=1, **options)


if __name__ == "__main__":
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        said["torch none"] = fit(Batches(folder)), 0
        for method in ("threads", *sys.argv[1:]):
            for name, data in loaded(method, folder):
                before = len(os.listdir(folder))
                said[name] = fit(data), len(os.listdir(folder)) - before
    print(json.dumps(said))
