"""What blocks compute around the memory while texts are generated, by the Triton kernels that
PyTorch has too (torch/inference.py).

Each function returns None where layers are to compute as they are written.
"""

import contextvars
import functools
import math

import keras
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.kernels.block import plan

_generates = contextvars.ContextVar("generates", default=False)


def generating(function):
    """`function`, inside which these kernels may run: they have no gradients."""

    @functools.wraps(function)
    def run(*arguments):
        token = _generates.set(True)
        try:
            return function(*arguments)
        finally:
            _generates.reset(token)

    return run


def _fits(*arrays):
    """Whether the kernels may run on these arrays. XLA cannot split them among devices."""
    if not _generates.get() or keras.distribution.distribution() is not None:
        return False
    interpreted = device.triton_interpreted()
    if interpreted and any(x.dtype.name != "float32" for x in arrays):
        return False
    if not interpreted and device.capability() // 10 != 9:  # where nothing was measured
        return False
    reason = device.unsupported(arrays[0], device.missing_triton, interpreted)
    return reason is None and all(isinstance(size, int) for x in arrays for size in x.shape)


def _run(steps, *arrays):
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch.run(steps, arrays)[0]


def gate_pair(x, first, second, cap):
    weights = first.kernel.value, second.kernel.value, first.bias.value, second.bias.value
    if math.prod(x.shape[:-1]) > plan.GATE_ROWS or not _fits(x, *weights):
        return None
    if any(w.dtype.name != "float32" for w in weights):
        return None
    return tuple(_run(plan.gate_pair(x.shape, weights[0].shape[1], x.dtype.name, cap), x, *weights))


def _kernels_of(x, layers):
    """Of Dense layers, where few steps x (..., K) had better be multiplied by our own kernels."""
    rows = math.prod(x.shape[:-1])
    if rows > plan.ROWS or any(layer.bias is not None for layer in layers) or not _fits(x):
        return None
    if x.dtype.name == "float32" and not device.triton_interpreted():
        return None
    kernels = [layer.kernel.value for layer in layers]
    widths = [kernel.shape[1] for kernel in kernels]
    if plan.unsupported_product(rows, x.shape[-1], widths):
        return None
    return kernels if all(kernel.dtype == x.dtype for kernel in kernels) else None


def products(x, layers):
    kernels = _kernels_of(x, layers)
    if kernels is None:
        return None
    widths = tuple(kernel.shape[1] for kernel in kernels)
    steps = plan.products(device.of(x.dtype.name), x.shape, widths, x.dtype.name)
    return _run(steps, x, *kernels)


def added_product(x, h, layer):
    kernels = _kernels_of(h, [layer])
    if kernels is None or x.dtype != h.dtype:
        return None
    of = device.of(x.dtype.name)
    return _run(plan.added_product(of, x.shape, h.shape[-1], x.dtype.name), x, h, *kernels)[0]


def of_few_steps(function):
    """`function(x, ...)`, for as few steps x (..., D) as the products."""

    @functools.wraps(function)
    def run(x, *arguments):
        few = math.prod(x.shape[:-1]) <= plan.ROWS
        return function(x, *arguments) if few else None

    return run


@of_few_steps
def head_norm(x, gamma, heads, epsilon, gate=None):
    gates = [] if gate is None else [gate]
    gamma = gamma.value
    if x.shape[-1] > plan.WIDEST * heads or not _fits(x, gamma, *gates):
        return None
    if any(gate.dtype != x.dtype for gate in gates):
        return None
    dtypes = x.dtype.name, gamma.dtype.name
    return _run(plan.head_norm(x.shape, heads, *dtypes, bool(gates), epsilon), x, gamma, *gates)[0]


@of_few_steps
def gated_unit(x, up, activation):
    if activation not in plan.ACTIVATIONS or not _fits(x):
        return None
    y = up(x)
    return _run(plan.gated_unit(y.shape, y.dtype.name, plan.ACTIVATIONS[activation]), y)[0]


@of_few_steps
def rms_norm(x, scale, epsilon):
    scale = scale.value
    if x.shape[-1] > plan.WIDEST or not _fits(x, scale) or x.dtype != scale.dtype:
        return None
    return _run(plan.rms_norm(x.shape, x.dtype.name, epsilon), x, scale)[0]
