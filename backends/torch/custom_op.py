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
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # on any device
        return _Operator(name, function)

    return decorate


class _Operator:
    """Called with plain tensors and outside a compiler, the function itself: the way through
    PyTorch's dispatcher and its Python autograd takes longer than a small sequence's kernels."""

    def __init__(self, name, function):
        self.name, self.function = f"keras_xlstm::{name}", function
        self.call = getattr(torch.ops.keras_xlstm, name).default
        self.differentiable = self.transformable = None

    def __call__(self, *arguments, native=None):
        """`native`: the same function of the tensors, made of PyTorch's own operators, which
        autograd differentiates in a call with create_graph=True. None: that is an error."""
        if (
            torch.compiler.is_compiling()
            or not _KNOWN_TYPES.issuperset(map(type, arguments))
            or arguments[0].is_meta
        ):
            return self.call(*arguments)  # some tensor stands for one while something is traced
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(*arguments)
        if torch._C._functorch.peek_interpreter_stack():
            return self.transformable.apply(*arguments)
        are_tensors = [type(a) in PLAIN for a in arguments]
        tensors = list(itertools.compress(arguments, are_tensors))
        if not any([t.requires_grad for t in tensors]):
            return self.function(*arguments)
        return self.differentiable.apply(native, arguments, are_tensors, *tensors)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward, setup_context, hidden=0, inputs=None):
        """As PyTorch's, but for `backward`, which is given the context and all gradients. `hidden`:
        so many outputs, the last, are for `setup_context` alone, where the function is called
        itself; their gradients are left out. `inputs(context)`: the tensors that came first among
        the arguments."""
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )
        function = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, native, arguments, are_tensors, *tensors):
                # PyTorch does something for each input and output: only the tensors among them.
                output = tuple(function(*arguments))
                setup_context(ctx, arguments, output)
                ctx.native, ctx.are_tensors = native, are_tensors
                return output[: len(output) - hidden]

            @staticmethod
            def backward(ctx, *gradients):
                if ctx.native is None or not torch.is_grad_enabled():
                    found = backward(ctx, gradients)
                else:
                    found = gradients_of(ctx.native, inputs(ctx), gradients)
                return None, None, None, *itertools.compress(found, ctx.are_tensors)

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


def gradients_of(function, inputs, gradients):
    """Gradients by `inputs`, tensors or None, of `function(*inputs)`, whose results have these
    `gradients`. They can be differentiated again."""

    def trained(x):
        return x is not None and x.requires_grad

    # Views: one of the inputs may have been made of another, whose gradient is not asked for here.
    inputs = [x.view_as(x) if trained(x) else x for x in inputs]
    pairs = zip(function(*inputs), gradients, strict=True)
    pairs = [(y, d) for y, d in pairs if d is not None and trained(y)]
    if not pairs:
        return [None] * len(inputs)
    sources = list(filter(trained, inputs))
    results, gradients = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(results, sources, gradients, create_graph=True, allow_unused=True)
    )
    return [next(found) if trained(x) else None for x in inputs]


def no_second_derivative(operator, name):
    """Without it a gradient of a gradient would be silently wrong."""

    def backward(ctx, gradients):
        raise RuntimeError(
            f"The {name}'s kernels have first derivatives only where they are asked for by name, "
            "or compiled. Received: a gradient of a gradient. Use implementation=None, "
            'use_kernel="auto" or keras_xlstm.backends.use("native"), without torch.compile.'
        )

    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)
