"""Products that several blocks share: gates in float32, and Dense layers that stay unfused."""

import keras
from keras import ops

from keras_xlstm import backends
from keras_xlstm.layers.soft_cap import soft_cap


def are_plain(*layers):
    """Whether Dense layers are kernels and biases alone: no low-rank updates, not quantised."""
    return not any(layer.lora_enabled or layer.quantization_mode for layer in layers)


class Gate(keras.layers.Dense):
    """A Dense whose weights are read as they are, also where the block around computes in half
    precision: a gate is an exponent."""

    def add_weight(self, *args, **kwargs):
        return super().add_weight(*args, **{**kwargs, "autocast": False})


def gate_pair(x, first, second, cap=None):
    """first(x) and second(x) for two `Gate`s of as many units, each bounded by `cap`: where the
    backend has a faster way, by one product."""
    both = None
    if are_plain(first, second):
        both = backends.gate_pair(x, first, second, cap)
        if both is not None:
            return both
        if backends.float32_gate_product is not None:
            # Heads last, where model parallelism divides them.
            kernel = ops.stack([first.kernel, second.kernel], axis=1)
            both = backends.float32_gate_product(x, kernel)
    if both is None:
        return soft_cap(first(x), cap), soft_cap(second(x), cap)
    pair = both[:, :, 0] + first.bias, both[:, :, 1] + second.bias
    return tuple(soft_cap(gate, cap) for gate in pair)


def unfused_dense(x, *layers):
    """[layer(x) for layer in layers], for Dense layers without activation."""
    few = backends.products_of_few(x, layers)
    if few is not None:
        return few
    if backends.keep_unfused is None or x.shape[1] == 1 or not are_plain(*layers):
        return [layer(x) for layer in layers]

    def product(layer):
        dtype = layer.compute_dtype
        y = backends.matmul(
            *backends.keep_unfused(ops.cast(x, dtype), ops.cast(layer.kernel, dtype))
        )
        return y + ops.cast(layer.bias, dtype) if layer.use_bias else y

    return [product(layer) for layer in layers]


def added_dense(x, h, layer):
    """x + layer(h), for a Dense layer without activation."""
    y = backends.added_product(x, h, layer)
    return x + layer(h) if y is None else y


class BlockDiagonal(keras.layers.EinsumDense):
    """(B, T, blocks, size) to the same, each of the blocks by a kernel of its own."""

    def __init__(self, blocks, size, use_bias, **kwargs):
        super().__init__(
            "bthi,hio->btho",
            output_shape=(None, blocks, size),
            bias_axes="ho" if use_bias else None,
            **kwargs,
        )

    def quantize(self, mode=None, type_check=True, config=None):
        # EinsumDense quantises its own class alone, unless told otherwise.
        return super().quantize(mode, type_check=False, config=config)

    def call(self, inputs, training=None):
        y, shape = None, ops.shape(inputs)
        if are_plain(self):
            x = ops.reshape(inputs, (*shape[:2], inputs.shape[2] * inputs.shape[3]))
            y = backends.block_diagonal(x, ops.cast(self.kernel, x.dtype))
        if y is None:
            return super().call(inputs, training=training)
        y = ops.reshape(y, shape)
        return y if self.bias is None else y + ops.cast(self.bias, y.dtype)
