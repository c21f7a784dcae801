"""What the native forms need from JAX: scans, and a function with a gradient of its own."""

import functools

import jax
import keras
import numpy as np
from keras_xlstm.backends import export_context, sizes
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.products import (  # noqa: F401  found by backends
    float32_gate_product,
    fusion_barrier,
    keep_unfused,
    token_losses,
    turned,
)

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = jax.numpy.tanh, jax.numpy.maximum, jax.numpy.max
minimum, log1p, cumsum = jax.numpy.minimum, jax.numpy.log1p, jax.numpy.cumsum
total, swapaxes, exp = jax.numpy.sum, jax.numpy.swapaxes, jax.numpy.exp
constant = jax.lax.stop_gradient
# Products with both halves of a kernel, not one that is cut in two: XLA puts the gradient of both
# halves together in passes over the largest array of a block.
split_gate_and_up = True
# Whether sum(x * y) is one pass over x, so that a product with a vector y is slower.
fuses_row_sums = True
# Modules here: of each implementation, by op; the first that fits is picked.
implementations = {
    "triton": {"mlstm": "mlstm_triton", "slstm": "slstm_triton"},
    "pallas": {"mlstm": "pallas.mlstm", "slstm": "pallas.slstm"},
}
compiles_blocks = False  # whole steps are compiled
captures_steps = False


def export_of(x):
    """What x is traced for, if it is for a file, or None."""
    return export_context.current() if isinstance(x, jax.core.Tracer) else None


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


def host_values(x):
    """As `backends.host_values`."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    at_hand = x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
    return np.asarray(x) if at_hand else None


def chunk_size(key_dim, value_dim, time):
    """As `sizes.chunk_size`; 64 steps on a GPU."""
    return sizes.chunk_size(key_dim, value_dim, time) if device.platform() == "cpu" else 64


def multiplies_inside(batch, time, features, units):
    """As `sizes.multiplies_inside`; not on a GPU, nor for sizes that are symbols."""
    known = isinstance(batch, int) and isinstance(time, int)
    known = known and device.platform() == "cpu"
    return known and sizes.multiplies_inside(batch, time, features, units)


# Up to how many units the sLSTM's heads are multiplied as one kernel.
joined_heads = 128


def joined_blocks():
    """Up to what width a projection in blocks is one product with zeros between them: on CPUs
    XLA turns x and y for one product a block, which takes longer than operations on zeros."""
    return 512 if device.platform() == "cpu" else 0


def alone_on_device():
    """Whether no other device holds some of the heads."""
    return keras.distribution.distribution() is None


def trace_time(function):
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
def _differentiable(forward, backward, inference, options):
    """One compiled function per set of options, so that eager calls compile once per shape."""
    options = dict(options)

    @jax.custom_vjp
    def function(*tensors):
        return inference(*tensors, **options) if inference else forward(*tensors, **options)[0]

    function.defvjp(
        lambda *tensors: forward(*tensors, **options),
        lambda residuals, gradients: backward(residuals, gradients, **options),
    )
    return jax.jit(function)


def differentiable(forward, backward, tensors, inference=None, **options):
    """Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.

    `tensors` may hold None; `options` are hashable. `alone(*tensors, **options) -> outputs` is
    called in place of `forward` where no gradient is asked for.
    """
    return _differentiable(forward, backward, inference, tuple(sorted(options.items())))(*tensors)


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
