"""Functions as PyTorch operators, and launches of Triton kernels."""

import torch

_LIBRARY = torch.library.Library("keras_xlstm", "FRAGMENT")


def operator(name):
    """Decorates a function of tensors that returns new tensors: torch.compile takes it whole.

    As torch.library.custom_op, without its check at every call that no result aliases another:
    that took 0.3 ms to 0.7 ms a call for the mLSTM's dozen results, more than the kernels.
    """

    def decorate(function):
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        return _Operator(name, function)

    return decorate


class _Operator:
    """Called with plain tensors and outside a compiler, the function itself: the way through
    PyTorch's dispatcher and its Python autograd takes longer than a small sequence's kernels."""

    def __init__(self, name, function):
        self.name, self.function = f"keras_xlstm::{name}", function
        self.call = getattr(torch.ops.keras_xlstm, name).default
        self.differentiable = None

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or not _plain(arguments):
            return self.call(*arguments)
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(*arguments)
        return self.differentiable.apply(*arguments)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward, setup_context):
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )
        function = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(*inputs):
                return tuple(function(*inputs))

            @staticmethod
            def setup_context(ctx, inputs, output):
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx, *gradients):
                return backward(ctx, gradients)

        self.differentiable = Differentiable


def _plain(arguments):
    """Not what stands for a tensor while something is traced."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(not isinstance(a, torch.Tensor) or type(a) in plain for a in arguments)


def no_second_derivative(operator, name):
    """Without it a gradient of a gradient would be silently wrong."""

    def backward(ctx, gradients):
        raise RuntimeError(
            f"The {name} has first derivatives only, here as in its native form: its gradient is "
            "a kernel of its own. Received: a gradient of a gradient."
        )

    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


@torch.compiler.assume_constant_result
def exporting():
    # As a constant: PyTorch 2.11 takes torch.compile for an export where it traces this.
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def launch(kernel, programs, *arguments, **constants):
    """kernel[(programs,)](*arguments, **constants), on the device of the first argument."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, programs, device, arguments, constants)
    else:
        _launch(kernel, programs, device, arguments, constants)


_COMPILED = {}


def _launch(kernel, programs, device, arguments, constants):
    # Triton looks at every argument to find the compiled kernel: for some thirty that takes longer
    # than a small kernel runs. Its whole numbers are not specialised (see the kernels), so that
    # dtypes and alignments tell.
    key = kernel.fn, device, *constants.items(), *map(_kind, arguments)
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[programs,](*arguments, **constants)
        if hasattr(compiled, "result"):  # it may be compiled in the background
            compiled = compiled.result()
        if device.type == "cuda":  # not where it is interpreted
            names = [p.name for p in kernel.params[len(arguments) :]]
            _COMPILED[key] = compiled, [constants[name] for name in names]
    else:
        compiled, values = found
        compiled[programs, 1, 1](*arguments, *values)


def _kind(argument):
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return None if argument is None else type(argument)
