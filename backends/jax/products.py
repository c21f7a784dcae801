"""Products and sums, and how XLA is kept from fusing them with what is around them."""

import functools

import jax
import numpy as np
from keras_xlstm.backends.jax import device


def fusion_barrier(x):
    """x, computed by a kernel of its own on a GPU.

    XLA makes one Triton kernel of a row's sums and all that is done to the row; for the rows of a
    norm per head it was ten times slower than the sums by themselves (docs/notebook).
    """
    return x if device.platform() == "cpu" else jax.lax.optimization_barrier(x)


def turned(x):
    """x with its last two axes swapped, to be multiplied by something on the right. XLA on CPUs has
    no fast product of which the first operand is turned: it is turned before."""
    x = jax.numpy.swapaxes(x, -1, -2)
    return jax.lax.optimization_barrier(x) if device.platform() == "cpu" else x


def float32_gate_product(x, kernel):
    """x (B, T, D) of bfloat16 times kernel (D, 2, H) of float32, as exact as in float32; None where
    that is not worth it.

    XLA would make a float32 copy of x, read it in every product and round the kernel to tf32.
    Instead the kernel is cut into three bfloat16 numbers, whose sum it is: products of bfloat16 are
    summed in float32. So is the gradient.
    """
    if device.platform() == "cpu" or x.dtype != "bfloat16" or x.shape[1] == 1:
        return None
    return _by_parts(x, kernel)


def _parts(x, count):
    """bfloat16 numbers that sum up to x, in float32 still."""
    found = []
    for _ in range(count):
        # Not two casts, which XLA may leave out.
        found.append(jax.lax.reduce_precision(x, 8, 7))
        x = x - found[-1]
    return found


def _stacked(parts, axis):
    return jax.numpy.stack(parts, axis).astype("bfloat16")


def _sum_of_three(x, axis):
    high, middle, low = jax.numpy.moveaxis(x, axis, 0)
    return high + (middle + low)


def _product(x, y, axes, batch=()):
    """The product over axes[0] of x and axes[1] of y, of bfloat16, in float32."""
    if device.platform() == "cpu":  # in tests; it has no such product
        x, y = x.astype("float32"), y.astype("float32")
    return jax.lax.dot_general(x, y, (axes, (batch, batch)), preferred_element_type="float32")


@jax.custom_vjp
def _by_parts(x, kernel):
    return _sum_of_three(_product(x, _stacked(_parts(kernel, 3), 1), ((2,), (0,))), 2)


def _by_parts_backward(residuals, dy):
    x, kernel = residuals
    high, middle, low = _parts(dy, 3)
    # Sums over time alone first: over all steps at once few programs would do the work.
    dkernel = _product(x, _stacked([high, middle, low], 2), ((1,), (1,)), (0,)).sum(0)
    # dx is bfloat16: high by high and both high by middle are more than it holds.
    columns, rest = _parts(kernel, 2)
    rows, columns = [high, middle, high], [columns, columns, rest]
    dx = _product(_stacked(rows, 2), _stacked(columns, 1), ((2, 3, 4), (1, 2, 3)))
    return dx.astype(x.dtype), _sum_of_three(dkernel, 1)


_by_parts.defvjp(lambda x, kernel: (_by_parts(x, kernel), (x, kernel)), _by_parts_backward)


def keep_unfused(x, kernel):
    """Both, for a product that XLA leaves by itself. Several products of one x it makes one of, and
    cuts the result, and in the gradient joins what it multiplies: copies of all of it."""
    if device.platform() == "cpu":
        return x, kernel
    return jax.lax.optimization_barrier((x, kernel))


def token_losses(logits, y, dtype):
    """Cross-entropy of every token, (B, T), of logits (B, T, vocabulary) and ids (B, T), numbers of
    any dtype; of ids beyond the vocabulary zero, as Keras has it. Its sum over one-hot vectors XLA
    works out where it makes the gradient, in a kernel that then takes twice as long."""
    return _cross_entropy(logits, y.astype("int32"), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits, y, dtype):
    return _token_losses(logits, y, dtype)[0]


def _token_losses(logits, y, dtype):
    x = logits.astype(dtype)
    most = x.max(-1)
    total = jax.numpy.log(jax.numpy.exp(x - most[..., None]).sum(-1)) + most
    known = (y >= 0) & (y < logits.shape[-1])
    own = jax.numpy.take_along_axis(x, jax.numpy.where(known, y, 0)[..., None], -1)[..., 0]
    return jax.numpy.where(known, total - own, 0.0), (logits, y, total, known)


def _token_losses_backward(dtype, residuals, d):
    logits, y, total, known = residuals
    p = jax.numpy.exp(logits.astype(dtype) - total[..., None])
    d = jax.numpy.where(known, d, 0.0)[..., None]
    vocabulary = jax.lax.broadcasted_iota("int32", logits.shape, logits.ndim - 1)
    dlogits = jax.numpy.where(vocabulary == y[..., None], p - 1.0, p) * d
    return dlogits.astype(logits.dtype), np.zeros(y.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_token_losses, _token_losses_backward)
