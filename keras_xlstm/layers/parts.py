"""What the layers are made of: argument checks, soft cap, norm per head."""

import keras
from keras import ops


def check_heads(units, num_heads):
    for name, value in (("units", units), ("num_heads", num_heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}.")
    if units % num_heads:
        raise ValueError(
            f"`units` must be divisible by `num_heads`: every head has units / num_heads units. "
            f"Received: units={units}, num_heads={num_heads}."
        )


def check_use_kernel(use_kernel):
    if use_kernel != "auto" and not isinstance(use_kernel, bool):
        raise ValueError(
            '`use_kernel` must be "auto" (a kernel where one fits), True (a kernel or an error) '
            f"or False (never a kernel). Received: use_kernel={use_kernel!r}."
        )
    return use_kernel


def check_rate(name, rate):
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={rate!r}.")
    return rate


def soft_cap(x, cap):
    """cap * tanh(x / cap): x where it is small, never beyond +-cap. None does nothing."""
    # tanh(y) as y - tanh_shrink(y): keras.ops.tanh turns float64 into float32 on JAX.
    return x if cap is None else x - cap * ops.tanh_shrink(x / cap)


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
        self.gamma = self.add_weight(
            name="gamma", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, inputs):
        units = inputs.shape[-1]
        work = inputs if self.compute_dtype == "float64" else ops.cast(inputs, "float32")
        heads = (*ops.shape(inputs)[:-1], self.num_heads, units // self.num_heads)
        x = ops.reshape(work, heads)
        # Sums: keras.ops.mean turns float64 into float32 on torch.
        x = x - ops.sum(x, axis=-1, keepdims=True) / heads[-1]
        variance = ops.sum(x * x, axis=-1, keepdims=True) / heads[-1]
        x = x * (1.0 / ops.sqrt(variance + self.epsilon))
        x = ops.reshape(x, ops.shape(inputs)) * self.gamma
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads, "epsilon": self.epsilon}
