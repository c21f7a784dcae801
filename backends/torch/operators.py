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
        return _Operator(name)

    return decorate


class _Operator:
    def __init__(self, name):
        self.name = f"keras_xlstm::{name}"
        self.call = getattr(torch.ops.keras_xlstm, name).default

    def __call__(self, *arguments):
        return self.call(*arguments)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward, setup_context):
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )


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
            kernel[programs,](*arguments, **constants)
    else:
        kernel[programs,](*arguments, **constants)
