"""What blocks compute around the memory, where nobody asks for gradients: a kernel each on a GPU,
where PyTorch's own operators would take up to twenty.

Each function returns None where layers are to compute as they are written.
"""

import torch
from keras_xlstm.backends.kernels.block import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.launch import bound
from keras_xlstm.backends.torch.tracing import PLAIN


def _fits(*tensors):
    """Whether the kernels may run on these tensors."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(type(x) not in PLAIN or not x.is_contiguous() for x in tensors):
        return False
    return device.unsupported(tensors[0]) is None


def _head_norm_plan(where, *call, aligned):
    return plan.head_norm(*call)


def head_norm(x, gamma, heads, epsilon, gate=None):
    """Every head of x (..., units) normalised by itself, times the variable gamma (units,), and
    times sigmoid(gate), if there is one."""
    gates = [] if gate is None else [gate]
    gamma = gamma.value
    if x.shape[-1] > plan.WIDEST * heads:
        return None
    if not _fits(x, gamma, *gates) or any(gate.dtype != x.dtype for gate in gates):
        return None
    dtypes = device.name(x.dtype), device.name(gamma.dtype)
    call = tuple(x.shape), heads, *dtypes, bool(gates), epsilon
    return bound(_head_norm_plan, x.device, *call)(x, gamma, *gates)[0][0]


def _gated_unit_plan(where, *call, aligned):
    return plan.gated_unit(*call)


def gated_unit(x, up, activation):
    """activation(first half of up(x)) * second half, where up(x) is (..., 2 * units)."""
    if activation not in plan.ACTIVATIONS or not _fits(x):
        return None
    y = up(x)
    call = tuple(y.shape), device.name(y.dtype), plan.ACTIVATIONS[activation]
    return bound(_gated_unit_plan, y.device, *call)(y)[0][0]


def _gate_pair_plan(where, *call, aligned):
    return plan.gate_pair(*call)


def gate_pair(x, first, second, cap):
    """first(x) and second(x) of x (..., D) for two Dense layers in float32, bounded by `cap`, if it
    is not None, to cap * tanh(gate / cap)."""
    if x.numel() > plan.GATE_ROWS * x.shape[-1] or not _fits(x):
        return None
    weights = first.kernel.value, second.kernel.value, first.bias.value, second.bias.value
    if not _fits(*weights) or any(w.dtype != torch.float32 for w in weights):
        return None
    call = tuple(x.shape), weights[0].shape[1], device.name(x.dtype), cap
    return tuple(bound(_gate_pair_plan, x.device, *call)(x, *weights)[0])


def _rms_norm_plan(where, *call, aligned):
    return plan.rms_norm(*call)


def rms_norm(x, scale, epsilon):
    """x over the root of its mean square along the last axis, times scale, a variable."""
    scale = scale.value
    if x.shape[-1] > plan.WIDEST or not _fits(x, scale) or x.dtype != scale.dtype:
        return None
    call = tuple(x.shape), device.name(x.dtype), epsilon
    return bound(_rms_norm_plan, x.device, *call)(x, scale)[0][0]


def _kernels_of(x, layers):
    """Of Dense layers, where few steps x (..., K) had better be multiplied by our own kernels."""
    rows = x.numel() // x.shape[-1]
    if rows > plan.ROWS or any(layer.bias is not None for layer in layers) or not _fits(x):
        return None
    if x.dtype == torch.float32 and not device.interpreted():
        return None
    kernels = [layer.kernel.value for layer in layers]
    widths = [kernel.shape[1] for kernel in kernels]
    if plan.unsupported_product(rows, x.shape[-1], widths):
        return None
    fits = _fits(*kernels) and all(kernel.dtype == x.dtype for kernel in kernels)
    return kernels if fits else None


def _products_plan(where, shape, widths, dtype, aligned):
    of = device.of(where, dtype)
    return plan.products(of, shape, widths, device.name(dtype))


def products(x, layers):
    """[layer(x) for layer in layers], up to four plain Dense layers, for few steps x (..., K)."""
    kernels = _kernels_of(x, layers)
    if kernels is None:
        return None
    widths = tuple(kernel.shape[1] for kernel in kernels)
    return bound(_products_plan, x.device, tuple(x.shape), widths, x.dtype)(x, *kernels)[0]


def _added_product_plan(where, shape, K, dtype, aligned):
    return plan.added_product(device.of(where, dtype), shape, K, device.name(dtype))


def added_product(x, h, layer):
    """x + layer(h), of a plain Dense layer, for few steps."""
    kernels = _kernels_of(h, [layer])
    if kernels is None or not _fits(x) or x.dtype != h.dtype:
        return None
    call = tuple(x.shape), h.shape[-1], x.dtype
    return bound(_added_product_plan, x.device, *call)(x, h, *kernels)[0][0]
