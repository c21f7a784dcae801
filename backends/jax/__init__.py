"""What the native forms need from JAX: scans, and a function with a gradient of its own."""

import functools

import jax
import keras

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = jax.numpy.tanh, jax.numpy.maximum, jax.numpy.max
total, swapaxes, exp = jax.numpy.sum, jax.numpy.swapaxes, jax.numpy.exp
constant = jax.lax.stop_gradient
# Products with both halves of a kernel, not one that is cut in two: XLA puts the gradient of both
# halves together in passes over the largest array of a block.
by_halves = True
# Whether sum(x * y) is one pass over x, so that a product with a vector y is slower.
fuses_sums = True
# Modules here: of each implementation, by op; the first that fits is picked.
own = {"triton": {"mlstm": "mlstm_triton"}, "pallas": {"mlstm": "mlstm", "slstm": "slstm"}}
by_region = False  # whole steps are compiled
recorded = False


def apart(x):
    """x, computed by a kernel of its own on a GPU.

    XLA makes one Triton kernel of a row's sums and all that is done to the row; for the rows of a
    norm per head it was ten times slower than the sums by themselves (benchmarks/RESULTS.md).
    """
    return x if jax.default_backend() == "cpu" else jax.lax.optimization_barrier(x)


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
