"""The gated feed-forward block."""

import math

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm.layers.projections import added_dense, are_plain, unfused_dense
from keras_xlstm.validation import check_positive, freeze


def rounded_up(size, multiple):
    """The least multiple that is no smaller than size."""
    return multiple * math.ceil(size / multiple)


@keras.saving.register_keras_serializable(package="keras_xlstm")
class GatedFeedForward(keras.layers.Layer):
    """activation(x W_gate) * (x W_up), projected back: one Dense makes both, the gate first.

    Args:
        hidden_dim: size of the gate and of what it gates.
        activation: of the gate: `"gelu"` (the exact one) in the paper's models, `"silu"` in the 7B.
        kernel_initializer, output_initializer: of the projections up and down.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: (..., features).

    Output shape: that of the inputs.

    Example:

    >>> keras_xlstm.layers.GatedFeedForward(64)(np.ones((2, 5, 16))).shape
    (2, 5, 16)
    """

    def __init__(
        self,
        hidden_dim,
        activation="gelu",
        kernel_initializer="small_init",
        output_initializer="wang_init",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive("hidden_dim", hidden_dim)
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.output_initializer = initializers.get(output_initializer)

    def build(self, input_shape):
        self.up_projection = keras.layers.Dense(
            2 * self.hidden_dim, use_bias=False, kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy, name="up_projection",
        )  # fmt: skip
        self.down_projection = keras.layers.Dense(
            input_shape[-1], use_bias=False, kernel_initializer=self.output_initializer,
            dtype=self.dtype_policy, name="down_projection",
        )  # fmt: skip
        self.up_projection.build(input_shape)
        self.down_projection.build((*input_shape[:-1], self.hidden_dim))
        freeze(self)

    def call(self, inputs):
        y = backends.gated_unit(inputs, self._up, self.activation)
        if y is not None:
            return self.down_projection(y)
        many = len(inputs.shape) > 2 and backends.size(inputs.shape[-2]) != 1
        if backends.split_gate_and_up and many and are_plain(self.up_projection):
            # Not for a single step, where the kernel is the largest array, not what it makes.
            kernel = ops.cast(self.up_projection.kernel, self.compute_dtype)
            gate, up = (backends.matmul(inputs, half) for half in ops.split(kernel, 2, axis=-1))
        else:
            gate, up = ops.split(self.up_projection(inputs), 2, axis=-1)
        return self.down_projection(backends.activated(self.activation, gate) * up)

    def added(self, x, inputs):
        """x + self(inputs), in a block of the same compute dtype."""
        y = backends.gated_unit(inputs, self._up, self.activation)
        return x + self(inputs) if y is None else added_dense(x, y, self.down_projection)

    def _up(self, inputs):
        return unfused_dense(inputs, self.up_projection)[0]

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "output_initializer": initializers.serialize(self.output_initializer),
        }
