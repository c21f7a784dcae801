"""What files of other backends, and other versions of this package and of Keras, need.

A model that was compiled and saved under torch loads on JAX and TensorFlow: there Keras saves its
optimizers as classes of `keras.src.backend.torch`. Elsewhere, loading that file imports torch,
which fails in `fit` on JAX and can abort the process on TensorFlow. Keras looks names up among its
custom objects first; these entries send them to the classes that the names mean on any backend.
"""

import functools

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


class _NoCell:
    state_size = 1

    def call(self): ...


@functools.cache
def hands_masks_on():
    """Whether this Keras's recurrent layers give their outputs the mask of their inputs: up to 3.15
    they do, from 3.16 on they do not."""
    return keras.layers.RNN(_NoCell(), name="asked_for_masks").supports_masking


def forget_bias(initializer, kwargs, default):
    """`forget_gate_bias_initializer`, which older files and code name `forget_bias_initializer`."""
    if "forget_bias_initializer" not in kwargs:
        return initializer
    if initializer != default:
        raise ValueError(
            "`forget_bias_initializer` is an older name of `forget_gate_bias_initializer`. "
            f"Received: both, {kwargs['forget_bias_initializer']!r} and {initializer!r}. Give the "
            "newer alone."
        )
    return kwargs.pop("forget_bias_initializer")
