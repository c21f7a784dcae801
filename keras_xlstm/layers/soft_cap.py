"""Smooth bounds of gates and logits."""

import keras
from keras import ops

from keras_xlstm import backends
from keras_xlstm.validation import check_cap


def soft_cap(x, cap):
    """cap * tanh(x / cap): x where it is small, never beyond +-cap. None does nothing."""
    if cap is None:
        return x
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        # keras.ops.tanh turns float64 into float32 on JAX.
        return ops.clip(x - cap * ops.tanh_shrink(x / cap), -cap, cap)
    return cap * ops.tanh(x / cap)


@keras.saving.register_keras_serializable(package="keras_xlstm")
class SoftCap(keras.layers.Layer):
    """cap * tanh(inputs / cap): bounds logits, smoothly.

    Args:
        cap: the bound, positive.
        **kwargs: `name`, `dtype`.

    Example:

    >>> keras.ops.convert_to_numpy(keras_xlstm.layers.SoftCap(30.0)(np.array([0.0, 1e9])))
    array([ 0., 30.], dtype=float32)
    """

    def __init__(self, cap, **kwargs):
        super().__init__(**kwargs)
        self.cap = check_cap("cap", cap)
        self.supports_masking = True
        self.runner = soft_cap  # or the same, compiled: models/training.py

    def call(self, inputs):
        # Apart from the products around it: XLA would make its gradient part of theirs, in kernels
        # slower than the library's.
        return self.runner(backends.fusion_barrier(inputs), self.cap)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "cap": self.cap}
