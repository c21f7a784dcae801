"""Functions as PyTorch operators."""

import itertools

import torch
from keras_xlstm.backends.torch.tracing import PLAIN

_KNOWN_TYPES = {*PLAIN, type(None), bool, int, float}
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
        self.differentiable = self.transformable = None

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or not _KNOWN_TYPES.issuperset(map(type, arguments)):
            return self.call(*arguments)  # some tensor stands for one while something is traced
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(*arguments)
        if torch._C._functorch.peek_interpreter_stack():
            return self.transformable.apply(*arguments)
        are_tensors = [type(a) in PLAIN for a in arguments]
        tensors = list(itertools.compress(arguments, are_tensors))
        if not any([t.requires_grad for t in tensors]):
            return self.function(*arguments)
        return self.differentiable.apply(arguments, are_tensors, *tensors)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward, setup_context, hidden=0):
        """As PyTorch's, but for `backward`, which is given the context and all gradients. `hidden`:
        so many outputs, the last, are for `setup_context` alone, where the function is called
        itself; their gradients are left out."""
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )
        function = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, arguments, are_tensors, *tensors):
                # PyTorch does something for each input and output: only the tensors among them.
                output = tuple(function(*arguments))
                setup_context(ctx, arguments, output)
                ctx.are_tensors = are_tensors
                return output[: len(output) - hidden]

            @staticmethod
            def backward(ctx, *gradients):
                found = itertools.compress(backward(ctx, gradients), ctx.are_tensors)
                return None, None, *found

        def transformable(*inputs):
            return tuple(function(*inputs))

        # For torch.func, in which PyTorch looks at every argument of every call.
        members = {
            "forward": staticmethod(transformable),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(lambda ctx, *gradients: backward(ctx, gradients)),
        }  # fmt: skip
        self.transformable = type("Transformable", (torch.autograd.Function,), members)
        self.differentiable = Differentiable


def no_second_derivative(operator, name):
    """Without it a gradient of a gradient would be silently wrong."""

    def backward(ctx, gradients):
        raise RuntimeError(
            f"The {name} has first derivatives only, here as in its native form: its gradient is "
            "a kernel of its own. Received: a gradient of a gradient."
        )

    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)
