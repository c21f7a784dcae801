"""What the native forms need from JAX: scans, and a function with a gradient of its own."""

import functools

import jax
import keras
import numpy as np
from keras_xlstm.backends import exports, sizes
from keras_xlstm.backends.jax import machine

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = jax.numpy.tanh, jax.numpy.maximum, jax.numpy.max
minimum, log1p, cumsum = jax.numpy.minimum, jax.numpy.log1p, jax.numpy.cumsum
total, swapaxes, exp = jax.numpy.sum, jax.numpy.swapaxes, jax.numpy.exp
constant = jax.lax.stop_gradient
# Products with both halves of a kernel, not one that is cut in two: XLA puts the gradient of both
# halves together in passes over the largest array of a block.
by_halves = True
# Whether sum(x * y) is one pass over x, so that a product with a vector y is slower.
fuses_sums = True
# Modules here: of each implementation, by op; the first that fits is picked.
own = {
    "triton": {"mlstm": "mlstm_triton", "slstm": "slstm_triton"},
    "pallas": {"mlstm": "mlstm", "slstm": "slstm"},
}
by_region = False  # whole steps are compiled
recorded = False


def export_of(x):
    """What x is traced for, if it is for a file, or None."""
    return exports.current() if isinstance(x, jax.core.Tracer) else None


def changes(variable, x):
    """Whether a new value of a variable can leave what x is traced in."""
    return isinstance(variable.value, jax.core.Tracer) and isinstance(x.shape[0], int)


def check_export(x):
    """Refuses x where it is traced for a file that Keras could not write."""
    export = export_of(x)
    if export and export.format == "openvino":
        raise ValueError(
            "OpenVINO's converter cannot read what Keras hands to it from JAX. Received: "
            "model.export(..., format='openvino'). Use keras_xlstm.export.export_model(model, "
            "folder, 'openvino'), which goes by way of ONNX (docs/export.md)."
        )


def unsorted(x):
    """Whether the length (the second axis of x) is a symbol, while a file is written."""
    return not isinstance(x.shape[1], int)


def apart(x):
    """x, computed by a kernel of its own on a GPU.

    XLA makes one Triton kernel of a row's sums and all that is done to the row; for the rows of a
    norm per head it was ten times slower than the sums by themselves (benchmarks/RESULTS.md).
    """
    return x if machine.platform() == "cpu" else jax.lax.optimization_barrier(x)


def turned(x):
    """x with its last two axes swapped, to be multiplied by something on the right. XLA on CPUs has
    no fast product of which the first operand is turned: it is turned before."""
    x = jax.numpy.swapaxes(x, -1, -2)
    return jax.lax.optimization_barrier(x) if machine.platform() == "cpu" else x


def narrow_product(x, kernel):
    """x (B, T, D) of bfloat16 times kernel (D, 2, H) of float32, as exact as in float32; None where
    that is not worth it.

    XLA would make a float32 copy of x, read it in every product and round the kernel to tf32.
    Instead the kernel is cut into three bfloat16 numbers, whose sum it is: products of bfloat16 are
    summed in float32. So is the gradient.
    """
    if machine.platform() == "cpu" or x.dtype != "bfloat16" or x.shape[1] == 1:
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
    if machine.platform() == "cpu":  # in tests; it has no such product
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


def alone(x, kernel):
    """Both, for a product that XLA leaves by itself. Several products of one x it makes one of, and
    cuts the result, and in the gradient joins what it multiplies: copies of all of it."""
    if machine.platform() == "cpu":
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


def host_values(x):
    """As `backends.host_values`."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    at_hand = x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
    return np.asarray(x) if at_hand else None


def chunk_size(key_dim, value_dim, time):
    """As `sizes.chunk_size`; 64 steps on a GPU."""
    return sizes.chunk_size(key_dim, value_dim, time) if machine.platform() == "cpu" else 64


def multiplies_inside(batch, time, features, units):
    """As `sizes.multiplies_inside`; not on a GPU, nor for sizes that are symbols."""
    known = isinstance(batch, int) and isinstance(time, int)
    known = known and machine.platform() == "cpu"
    return known and sizes.multiplies_inside(batch, time, features, units)


# Up to how many units the sLSTM's heads are multiplied as one kernel.
joined_heads = 128


def alone_on_device():
    """Whether no other device holds some of the heads."""
    return keras.distribution.distribution() is None


def once(function):
    """Marks a function without tensors, which is run when the caller is traced."""
    return function


def scan(step, init, xs, reverse=False):
    """`step(carry, x) -> (carry, y)` over the first axis of every array in `xs`."""
    return jax.lax.scan(step, init, xs, reverse=reverse)


def scan_chunks(step, init, long, short, reverse=False):
    """`step(carry, (*chunks of long, *entries of short)) -> (carry, chunks, entries)`.

    `long` arrays (B, N * L, ...) are cut along time, `short` ones (N, ...) are taken apart; what
    the step returns is put together likewise. A slice in the loop spares a transposed copy of the
    whole.
    """
    count = short[0].shape[0]
    L = long[0].shape[1] // count

    def chunk(index):
        return [jax.lax.dynamic_slice_in_dim(x, index * L, L, axis=1) for x in long]

    _, shapes, _ = jax.eval_shape(
        lambda: step(init, (*chunk(0), *(jax.numpy.zeros(x.shape[1:], x.dtype) for x in short)))
    )
    outputs = [jax.numpy.zeros((y.shape[0], L * count, *y.shape[2:]), y.dtype) for y in shapes]

    def body(carry, xs):
        (carry, outputs), (index, short) = carry, xs
        carry, chunks, entries = step(carry, (*chunk(index), *short))
        outputs = [
            jax.lax.dynamic_update_slice_in_dim(o, y, index * L, axis=1)
            for o, y in zip(outputs, chunks, strict=True)
        ]
        return (carry, outputs), entries

    xs = (jax.numpy.arange(count), tuple(short))
    (carry, outputs), entries = jax.lax.scan(body, (init, outputs), xs, reverse=reverse)
    return carry, tuple(outputs), entries


@functools.cache
def _differentiable(forward, backward, alone, options):
    """One compiled function per set of options, so that eager calls compile once per shape."""
    options = dict(options)

    @jax.custom_vjp
    def function(*tensors):
        return alone(*tensors, **options) if alone else forward(*tensors, **options)[0]

    function.defvjp(
        lambda *tensors: forward(*tensors, **options),
        lambda residuals, gradients: backward(residuals, gradients, **options),
    )
    return jax.jit(function)


def differentiable(forward, backward, tensors, alone=None, **options):
    """Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.

    `tensors` may hold None; `options` are hashable. `alone(*tensors, **options) -> outputs` is
    called in place of `forward` where no gradient is asked for.
    """
    return _differentiable(forward, backward, alone, tuple(sorted(options.items())))(*tensors)


def compiled(function, variables, jit_compile="auto", repeated=False):
    """`function(state, *tensors)`, compiled, without gradients. It reads `variables` as they are at
    each call; the buffers of `state` go into what it returns."""
    if jit_compile is False:
        return function

    def stateless(state, values, *tensors):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(state, *tensors)

    jitted = jax.jit(stateless, donate_argnums=0)
    return lambda state, *tensors: jitted(state, [v.value for v in variables], *tensors)
