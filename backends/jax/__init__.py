"""What the native forms need from JAX: a scan, and a function with a hand-written gradient."""

import functools

import jax

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum = jax.numpy.tanh, jax.numpy.maximum


def scan(step, init, xs, reverse=False):
    """`step(carry, x) -> (carry, y)` over the first axis of every array in `xs`."""
    return jax.lax.scan(step, init, xs, reverse=reverse)


@functools.cache
def _differentiable(forward, backward, options):
    """One compiled function per set of options, so that eager calls compile once per shape."""
    options = dict(options)

    @jax.custom_vjp
    def function(*tensors):
        return forward(*tensors, **options)[0]

    function.defvjp(
        lambda *tensors: forward(*tensors, **options),
        lambda residuals, gradients: backward(residuals, gradients, **options),
    )
    return jax.jit(function)


def differentiable(forward, backward, tensors, **options):
    """Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.

    `tensors` may hold None; `options` are hashable.
    """
    return _differentiable(forward, backward, tuple(sorted(options.items())))(*tensors)
