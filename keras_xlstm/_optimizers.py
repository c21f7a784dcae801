"""Lets a model that was compiled and saved under torch be loaded on JAX and TensorFlow.

Under torch, Keras saves its optimizers as classes of `keras.src.backend.torch`. Elsewhere, loading
such a file imports torch, which fails in `fit` on JAX and can abort the process on TensorFlow.
Keras looks names up among its custom objects first; these entries send them to the classes that
the names mean on any backend.
"""

import keras

_WITH_TORCH_FORM = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "Nadam",
    "RMSprop",
    "SGD",
)


def register():
    if keras.backend.backend() != "torch":
        for name in _WITH_TORCH_FORM:
            keras.saving.get_custom_objects().setdefault(name, getattr(keras.optimizers, name))
