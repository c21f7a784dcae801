"""Keras's norms, in the blocks and behind them, exported to ONNX from PyTorch too.

They have the names of Keras's: a .keras file calls the layers of a model by their classes.
"""

import keras
from keras import ops

from keras_xlstm import backends


def _scaled(x, scale, epsilon, centred):
    """Normalised over the last axis and scaled, in float32."""
    x = ops.cast(x, "float32")
    if centred:
        x = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.mean(x * x, axis=-1, keepdims=True)
    return x / ops.sqrt(variance + epsilon) * ops.cast(scale, "float32")


@keras.saving.register_keras_serializable(package="keras_xlstm")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization` without a bias, over the last axis.

    Example:

    >>> keras_xlstm.layers.norms.LayerNormalization(center=False)(np.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def call(self, inputs):
        # What Keras calls on torch the older exporter to ONNX, which Keras uses, cannot read.
        if not backends.scripting():
            return super().call(inputs)
        return ops.cast(_scaled(inputs, self.gamma, self.epsilon, True), self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_xlstm")
class RMSNormalization(keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization`, over the last axis.

    Example:

    >>> keras_xlstm.layers.norms.RMSNormalization()(np.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def call(self, inputs):
        if not backends.scripting():
            return super().call(inputs)
        return ops.cast(_scaled(inputs, self.scale, self.epsilon, False), self.compute_dtype)
