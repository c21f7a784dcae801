"""Functions with a gradient of their own."""

import functools

import jax


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


def differentiable(forward, backward, tensors, **options):
    """`options` are hashable."""
    return differentiable_with_inference(forward, backward, None, tensors, **options)


def differentiable_with_inference(forward, backward, inference, tensors, **options):
    """`differentiable`, by `inference(*tensors, **options) -> outputs`, if it is not None, in place
    of `forward` where no gradient is asked for."""
    return _differentiable(forward, backward, inference, tuple(sorted(options.items())))(*tensors)
