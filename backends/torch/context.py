"""Time shared out among processes: which ones, and what they gather (context parallelism)."""

import contextlib
import contextvars
import sys

import keras
import torch
from keras_xlstm.backends.common import Stretches

_group = contextvars.ContextVar("keras_xlstm_context_group", default=None)


class _Gather(torch.autograd.Function):
    """x of all processes, one after another in the order of their ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        gathered = x.new_empty(group.size() * x.numel())  # flat: gloo compares shapes
        torch.distributed.all_gather_into_tensor(gathered, x.flatten(), group=group)
        return gathered.view(group.size(), *x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        own = gradient.new_empty(gradient[0].numel())
        torch.distributed.reduce_scatter_tensor(own, gradient.flatten(), group=ctx.group)
        return own.view(gradient[0].shape), None


@contextlib.contextmanager
def among(group):
    """See `keras_xlstm.distribution.context_parallel`."""
    if not torch.distributed.is_initialized():
        raise ValueError(
            "context_parallel needs processes. Received: torch.distributed is not initialised. "
            "Call torch.distributed.init_process_group() under torchrun first."
        )
    group = torch.distributed.group.WORLD if group is None else group
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            "`group` must be a torch.distributed.ProcessGroup that this process belongs to, or "
            f"None for all processes. Received: {group!r}. A DeviceMesh gives its groups by "
            "mesh.get_group(name)."
        )
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled outside knows of no processes
    with _within(group if group.size() > 1 else None):
        yield


@contextlib.contextmanager
def _within(group):
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


@torch.compiler.assume_constant_result  # torch.compile would break its graph at a context variable
def shares_time():
    return _group.get() is not None


def own_stretch():
    if not shares_time():
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "context_parallel does not go together with jit_compile=True. Compile the model with "
            "jit_compile=False."
        )

    group = _group.get()

    def gather(x):
        if x.is_meta:  # Keras asks for shapes
            return torch.stack([x] * group.size())
        return _Gather.apply(x, group)

    return Stretches(group.size(), group.rank(), gather)


def over_stretches(function, *tensors):
    stretches = own_stretch()
    return None if stretches is None else function(stretches, *tensors)


def remat(function):
    """`keras.remat`; what it computes again, in a thread of its own, is for the same processes."""
    if not shares_time():
        return keras.remat(function)
    group = _group.get()

    def run(*tensors):
        with _within(group):
            return function(*tensors)

    return keras.remat(run)
