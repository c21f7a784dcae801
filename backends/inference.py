"""What blocks compute around the memory where nobody asks for gradients: a kernel of
kernels/block/ each, in place of up to twenty of a framework's.

Each function returns None where layers are to compute as they are written.
"""

import math

import keras
from keras_xlstm.backends.kernels.block import plan

_ACTIVATIONS = {keras.activations.silu: False, keras.activations.gelu: True}  # whether it is gelu


def _rows(x):
    return math.prod(x.shape[:-1])


class Inference:
    """By what a framework gives: `fits(*tensors)`, whether kernels may run on them; `run(name of a
    plan, dtype, its arguments, tensors)`, the plan's outputs; `name(dtype)`; `by_interpreter()`,
    whether they run on a CPU; `rows`, for how many steps they are better at most (None: any)."""

    def __init__(self, fits, run, name, by_interpreter, rows=None):
        self._fits, self._run, self._name, self._rows = fits, run, name, rows
        self._by_interpreter = by_interpreter

    def __call__(self, name, *arguments):
        return getattr(self, name)(*arguments)

    def _may(self, x, *others, widest=None):
        # First: in a file's trace a size may be none that can be compared.
        if not self._fits(x, *others):
            return False
        few = self._rows is None or _rows(x) <= self._rows
        return few and (widest is None or widest <= plan.WIDEST)

    def head_norm(self, x, gamma, heads, epsilon, gate=None):
        """Every head of x (..., units) normalised by itself, times the variable gamma (units,), and
        times sigmoid(gate), if there is one."""
        gates, gamma = [] if gate is None else [gate], gamma.value
        if not self._may(x, gamma, *gates, widest=x.shape[-1] // heads):
            return None
        if any(gate.dtype != x.dtype for gate in gates):
            return None
        dtypes = self._name(x.dtype), self._name(gamma.dtype)
        call = tuple(x.shape), heads, *dtypes, bool(gates), epsilon
        return self._run("head_norm", x.dtype, call, (x, gamma, *gates))[0]

    def rms_norm(self, x, scale, epsilon):
        """x over the root of its mean square along the last axis, times the variable scale."""
        scale = scale.value
        if not self._may(x, scale, widest=x.shape[-1]) or x.dtype != scale.dtype:
            return None
        call = tuple(x.shape), self._name(x.dtype), epsilon
        return self._run("rms_norm", x.dtype, call, (x, scale))[0]

    def gated_unit(self, x, up, activation):
        """activation(first half of up(x)) * second half, where up(x) is (..., 2 * units)."""
        if activation not in _ACTIVATIONS or not self._may(x):
            return None
        y = up(x)
        call = tuple(y.shape), self._name(y.dtype), _ACTIVATIONS[activation]
        return self._run("gated_unit", y.dtype, call, (y,))[0]

    def gate_pair(self, x, first, second, cap):
        """first(x) and second(x) of x (..., D) for two Dense layers in float32, bounded by `cap`,
        if it is not None, to cap * tanh(gate / cap)."""
        if not self._fits(x) or _rows(x) > plan.GATE_ROWS:
            return None
        weights = first.kernel.value, second.kernel.value, first.bias.value, second.bias.value
        if not self._fits(*weights) or any(self._name(w.dtype) != "float32" for w in weights):
            return None
        call = tuple(x.shape), weights[0].shape[1], self._name(x.dtype), cap
        return tuple(self._run("gate_pair", x.dtype, call, (x, *weights)))

    def _weights(self, x, layers):
        """Of Dense layers, where few steps x (..., K) had better be multiplied by our kernels:
        (their kernels and, of bytes, the scales; what a plan is told of those)."""
        modes = {layer.quantization_mode for layer in layers}
        in_bytes = modes == {"int8"}
        if not self._fits(x) or _rows(x) > (1 if in_bytes else plan.ROWS):
            return None
        if any(layer.bias is not None or layer.lora_enabled for layer in layers):
            return None
        if in_bytes:
            return self._bytes(x, layers)
        if modes != {None}:
            return None
        if self._name(x.dtype) == "float32" and not self._by_interpreter():
            return None
        kernels = [layer.kernel.value for layer in layers]
        if plan.unsupported_product(x.shape[-1], [kernel.shape[1] for kernel in kernels], False):
            return None
        same = all(kernel.dtype == x.dtype for kernel in kernels)
        return (kernels, ()) if same and self._fits(*kernels) else None

    def _bytes(self, x, layers):
        if any(layer.compute_dtype != self._name(x.dtype) for layer in layers):
            return None
        kernels = [layer._kernel.value for layer in layers]
        scales = [layer.kernel_scale.value for layer in layers]
        if plan.unsupported_product(x.shape[-1], [kernel.shape[1] for kernel in kernels], True):
            return None
        told = set()
        for layer, scale in zip(layers, scales, strict=True):
            quantizer = layer.inputs_quantizer  # None: weights alone are bytes
            if type(quantizer) is not keras.quantizers.AbsMaxQuantizer:
                return None
            told.add((self._name(scale.dtype), quantizer.epsilon, *quantizer.value_range))
        dtype, eps, *bounds = told.pop()
        alike = not told and bounds == [-127, 127]
        fit = alike and self._fits(x, *kernels, *scales)
        return ((*kernels, *scales), (dtype, eps)) if fit else None

    def products_of_few(self, x, layers):
        """[layer(x) for layer in layers], up to four Dense layers, for few steps x."""
        found = self._weights(x, layers)
        if found is None:
            return None
        weights, options = found
        widths = tuple(weight.shape[1] for weight in weights[: len(layers)])
        call = tuple(x.shape), widths, self._name(x.dtype), *options
        return self._run("products", x.dtype, call, (x, *weights))

    def added_product(self, x, h, layer):
        """x + layer(h), of a Dense layer, for few steps."""
        found = self._weights(h, [layer])
        if found is None or not self._fits(x) or x.dtype != h.dtype:
            return None
        weights, options = found
        call = tuple(x.shape), h.shape[-1], self._name(x.dtype), *options
        return self._run("added_product", x.dtype, call, (x, h, *weights))[0]
