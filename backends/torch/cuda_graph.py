"""CUDA graphs: hundreds of small kernels launched as one, where Python would take longer to launch
them than they run.
"""

import contextlib
import contextvars
import gc

import keras
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

_FEW = 8  # numbers for a kernel each; a shape has fewer
# Whether a step may write a new state over the old one, which nobody reads again.
overwrites = contextvars.ContextVar("overwrites", default=False)


def can_capture(tensor):
    return tensor.device.type == "cuda"


class CapturedGraph:
    """A CUDA graph of `function(*inputs)`, with a buffer for every tensor that goes in.

    The function runs on the buffers, and may write into them what the next replay is to read.
    Graphs that run one after another, never at once, may share a `pool` of memory.
    """

    def __init__(self, function, *inputs, pool=None):
        inputs = keras.tree.map_structure(lambda x: None if x is None else x.clone(), inputs)
        self.buffers = keras.tree.flatten(inputs)
        # Keras's walks over arguments leave cycles behind, which keep gradients' nodes of earlier
        # steps. Those belong to another stream, by which a recording would fail.
        gc.collect()
        self._graph = torch.cuda.CUDAGraph()
        with _capture(self._graph, pool):
            self._run(function, inputs)

    def _run(self, function, inputs):
        with NumbersAsKernels():
            self._outputs = function(*inputs)

    @torch.no_grad()
    def replay(self, inputs):
        """The function's outputs for new inputs, flat; None stands for what is in a buffer."""
        for buffer, value in zip(self.buffers, inputs, strict=True):
            if value is not None:
                buffer.copy_(value)
        self._graph.replay()
        return keras.tree.map_structure(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self._outputs
        )


@contextlib.contextmanager
def _capture(graph, pool):
    """What runs inside is not run, but recorded as this CUDA graph."""
    stream = torch.cuda.current_stream()
    draws = torch.cuda.default_generators[stream.device_index]
    before = draws.clone_state()
    try:
        # Only this thread must keep from what cannot be recorded.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except BaseException:
        # Where a recording fails PyTorch leaves its generator as if in one: dropout would fail.
        draws.graphsafe_set_state(before)
        raise
    finally:
        torch.cuda.set_stream(stream)  # likewise it stays on another one


class NumbersAsKernels(TorchFunctionMode):
    """Python numbers become tensors by a kernel, and tensors stay tensors: a copy between host and
    device waits for the device, and cannot be recorded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.as_tensor and not isinstance(args[0], torch.Tensor):
            numbers = np.asarray(args[0])
            if 0 < numbers.size <= _FEW:
                parts = [torch.full((), x, **kwargs) for x in numbers.ravel().tolist()]
                return torch.stack(parts).reshape(numbers.shape)
        if func is torch._foreach_add_ and isinstance(kwargs.get("alpha"), torch.Tensor):
            # As Keras's SGD gives its rate: PyTorch would ask the device for the number.
            values, added = args
            return func(values, torch._foreach_mul(added, kwargs["alpha"]))
        return func(*args, **kwargs)
