"""The norms: one per head, and Keras's, which PyTorch exports to ONNX too.

The latter have the names of Keras's: a .keras file calls the layers of a model by their classes.
"""

import keras
from keras import ops

from keras_xlstm import backends
from keras_xlstm.validation import check_heads


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
        y = backends.rms_norm(inputs, self.scale, self.epsilon)
        if y is not None:
            return y
        if not backends.scripting():
            return super().call(inputs)
        return ops.cast(_scaled(inputs, self.scale, self.epsilon, False), self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_xlstm")
class MultiHeadNorm(keras.layers.Layer):
    """Layer normalisation of every head by itself, over the last axis alone.

    `keras.layers.GroupNormalization` is not this: it also averages over time, so that the future
    reaches the past.

    Args:
        num_heads: the last axis is split into this many heads.
        epsilon: added to the variance.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: (..., units), of the layer's compute dtype; computed in float32.

    Output shape: that of the inputs.

    Example:

    >>> x = np.random.normal(size=(2, 5, 8))
    >>> keras_xlstm.layers.MultiHeadNorm(num_heads=2)(x).shape
    (2, 5, 8)
    """

    def __init__(self, num_heads, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        check_heads(num_heads, num_heads)
        self.num_heads = num_heads
        self.epsilon = epsilon
        self.supports_masking = True

    def build(self, input_shape):
        check_heads(input_shape[-1], self.num_heads)
        if input_shape[-1] == self.num_heads:
            raise ValueError(
                "A head of one unit is 0 after its own normalisation, whatever came in. Received: "
                f"{input_shape[-1]} units in num_heads={self.num_heads} heads. Take fewer heads or "
                "more units; mLSTM also takes use_head_norm=False."
            )
        self.gamma = self.add_weight(
            name="gamma", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, inputs):
        return self.gated(inputs, None)

    def gated(self, inputs, gate):
        """The output times sigmoid(gate), of the same shape; None does not gate."""
        if keras.backend.standardize_dtype(inputs.dtype) == self.compute_dtype:
            y = backends.head_norm(inputs, self.gamma, self.num_heads, self.epsilon, gate)
            if y is not None:
                return y
        y = self._normalised(inputs)
        return y if gate is None else y * ops.sigmoid(backends.fusion_barrier(gate))

    def _normalised(self, inputs):
        units = inputs.shape[-1]
        work = inputs if self.compute_dtype == "float64" else ops.cast(inputs, "float32")
        heads = (*ops.shape(inputs)[:-1], self.num_heads, units // self.num_heads)
        x = ops.reshape(work, heads)
        # Sums: keras.ops.mean turns float64 into float32 on torch.
        x = x - backends.fusion_barrier(ops.sum(x, axis=-1, keepdims=True) / heads[-1])
        variance = ops.sum(x * x, axis=-1, keepdims=True) / heads[-1]
        x = x * backends.fusion_barrier(1.0 / ops.sqrt(variance + self.epsilon))
        x = ops.reshape(x, ops.shape(inputs)) * self.gamma
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads, "epsilon": self.epsilon}
