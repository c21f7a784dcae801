"""What the layers are made of: argument checks, soft cap, norm per head."""

import math
import numbers

import keras
from keras import ops

from keras_xlstm import initializers
from keras_xlstm._checks import freeze
from keras_xlstm.backends import (
    activated,
    alone,
    apart,
    by_halves,
    matmul,
    narrow_product,
    size,
)


def check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}.")


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


def check_cap(name, cap):
    number = isinstance(cap, numbers.Real) and not isinstance(cap, bool)
    if cap is not None and not (number and 0 < cap < math.inf):
        raise ValueError(
            f"`{name}` must be a positive number, or None for no bound. Received: {name}={cap!r}."
        )
    return cap


def rounded_up(size, multiple):
    """The least multiple that is no smaller than size."""
    return multiple * math.ceil(size / multiple)


def check_heads(units, num_heads):
    check_positive("units", units)
    check_positive("num_heads", num_heads)
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
    if cap is None:
        return x
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        # keras.ops.tanh turns float64 into float32 on JAX.
        return ops.clip(x - cap * ops.tanh_shrink(x / cap), -cap, cap)
    return cap * ops.tanh(x / cap)


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
        units = inputs.shape[-1]
        work = inputs if self.compute_dtype == "float64" else ops.cast(inputs, "float32")
        heads = (*ops.shape(inputs)[:-1], self.num_heads, units // self.num_heads)
        x = ops.reshape(work, heads)
        # Sums: keras.ops.mean turns float64 into float32 on torch.
        x = x - apart(ops.sum(x, axis=-1, keepdims=True) / heads[-1])
        variance = ops.sum(x * x, axis=-1, keepdims=True) / heads[-1]
        x = x * apart(1.0 / ops.sqrt(variance + self.epsilon))
        x = ops.reshape(x, ops.shape(inputs)) * self.gamma
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads, "epsilon": self.epsilon}


def are_plain(*layers):
    """Whether Dense layers are kernels and biases alone: no low-rank updates, not quantised."""
    return not any(layer.lora_enabled or layer.quantization_mode for layer in layers)


class Gate(keras.layers.Dense):
    """A Dense whose weights are read as they are, also where the block around computes in half
    precision: a gate is an exponent."""

    def add_weight(self, *args, **kwargs):
        return super().add_weight(*args, **{**kwargs, "autocast": False})


def both_gates(x, first, second):
    """first(x) and second(x) for two `Gate`s of as many units: where the backend has a faster way,
    by one product."""
    both = None
    if narrow_product is not None and are_plain(first, second):
        # Heads last, where model parallelism divides them.
        both = narrow_product(x, ops.stack([first.kernel, second.kernel], axis=1))
    if both is None:
        return first(x), second(x)
    return both[:, :, 0] + first.bias, both[:, :, 1] + second.bias


def each_alone(x, *layers):
    """[layer(x) for layer in layers], for Dense layers without activation."""
    if alone is None or x.shape[1] == 1 or not are_plain(*layers):
        return [layer(x) for layer in layers]

    def product(layer):
        dtype = layer.compute_dtype
        y = matmul(*alone(ops.cast(x, dtype), ops.cast(layer.kernel, dtype)))
        return y + ops.cast(layer.bias, dtype) if layer.use_bias else y

    return [product(layer) for layer in layers]


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
        many = len(inputs.shape) > 2 and size(inputs.shape[-2]) != 1
        if by_halves and many and are_plain(self.up_projection):
            # Not for a single step, where the kernel is the largest array, not what it makes.
            kernel = ops.cast(self.up_projection.kernel, self.compute_dtype)
            gate, up = (matmul(inputs, half) for half in ops.split(kernel, 2, axis=-1))
        else:
            gate, up = ops.split(self.up_projection(inputs), 2, axis=-1)
        return self.down_projection(activated(self.activation, gate) * up)

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
        self.compute = soft_cap  # or the same, compiled: models/stack.py

    def call(self, inputs):
        # Apart from the products around it: XLA would make its gradient part of theirs, in kernels
        # slower than the library's.
        return self.compute(apart(inputs), self.cap)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "cap": self.cap}
