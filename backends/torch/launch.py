"""Launches of Triton kernels on PyTorch tensors, and what is kept for calls alike."""

import math

import torch
from keras_xlstm.backends.torch import driver


class Recording:
    """In place of a stream (repeated.py)."""

    def __init__(self):
        self.buffers, self.launches = [], []

    def add(self, launch, arguments):
        if not isinstance(launch, driver.Launch):
            raise NotRecorded
        self.launches.append((launch, arguments))


class NotRecorded(Exception):
    """A kernel is not compiled yet, or is not launched by the driver itself."""


class Launch:
    """A kernel with its programs and constants, called with a stream and its other arguments.

    The first call finds the compiled kernel, for which Triton looks at every argument: for some
    thirty that takes longer than a small kernel runs. Further calls must be alike in dtypes and in
    alignment to 16 bytes, and may give addresses in place of tensors. Triton's whole numbers are
    not specialised (see the kernels).
    """

    def __init__(self, kernel, programs, cluster=1, **constants):
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.cluster = cluster  # programs that hear each other
        self.known = None

    def __call__(self, stream, *arguments):
        if isinstance(stream, Recording):
            stream.add(self.known, arguments)
        elif self.known:
            self.known(stream, arguments)
        else:
            self._first(stream, arguments)

    def _first(self, stream, arguments):
        if self.cluster > 1:  # of which Triton's launcher knows nothing
            compiled = self.kernel.warmup(*arguments, grid=(1,), **self.constants)
            compiled[1, 1, 1]  # loads it
            self.known = driver.launcher(compiled, self.programs, self.cluster)
            if self.known is None:
                raise RuntimeError(
                    "This version of Triton compiles what is not known how to launch in clusters. "
                    'Use implementation="native", and please report it.'
                )
            self.known(stream, arguments)
            return
        compiled = self.kernel[self.programs,](*arguments, **self.constants)
        if hasattr(compiled, "result"):  # it may be compiled in the background
            compiled = compiled.result()
        if compiled is not None:  # it is not interpreted
            self.known = driver.launcher(compiled, self.programs) or self._by_triton(
                compiled[self.programs, 1, 1], len(arguments)
            )

    def _by_triton(self, run, count):
        values = [self.constants[p.name] for p in self.kernel.params[count:]]
        return lambda stream, arguments: run(*arguments, *values, stream=stream)


class Parts:
    """Tensors side by side in one allocation: each shape, or a pair of shape and dtype."""

    def __init__(self, *parts):
        self.parts, self.offsets, self.size = [], [], 0
        for part in parts:
            shape, dtype = part if isinstance(part[0], tuple) else (part, torch.float32)
            self.parts.append((shape, dtype, math.prod(shape) * dtype.itemsize))
            self.offsets.append(self.size)
            self.size += -(-self.parts[-1][-1] // 128) * 128  # aligned, as allocations are

    def new(self, like):
        return like.new_empty(self.size, dtype=torch.uint8)

    def of(self, buffer, known):
        """The tensors; their addresses, where kernels are `known`."""
        if known:
            start = buffer.data_ptr()
            return [start + offset for offset in self.offsets]
        return [
            buffer[offset : offset + size].view(dtype).view(shape)
            for offset, (shape, dtype, size) in zip(self.offsets, self.parts, strict=True)
        ]


_KNOWN = {}


def cached_plan(kind, tensors, *options):
    """`kind(tensors, *options)`, once for all tensors alike."""
    alike = [None if t is None else (t.shape, t.dtype, t.data_ptr() % 16) for t in tensors]
    key = kind, options, tensors[0].device, *alike
    return _once(key, kind, tensors, *options)


def launch(kernel, programs, *arguments, **constants):
    """kernel[(programs,)](*arguments, **constants), on the device of the first argument."""
    key = kernel.fn, programs, *constants.items(), *map(_alike, arguments)
    found = _once(key, Launch, kernel, programs, **constants)
    on_stream(arguments[0].device, found, *arguments)


def _once(key, kind, *arguments, **options):
    found = _KNOWN.get(key)
    if found is None:
        if len(_KNOWN) >= 1000:  # as many lengths as there are may come
            _KNOWN.clear()
        found = _KNOWN[key] = kind(*arguments, **options)
    return found


def _alike(argument):
    """What kernels are compiled for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.device, argument.data_ptr() % 16
    return None if argument is None else type(argument)


def on_stream(device, function, *arguments):
    """`function(stream, *arguments)` on that device and its current stream; None on a CPU."""
    if device.type != "cuda":
        return function(None, *arguments)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return on_stream(device, function, *arguments)
    return function(_stream(device.index), *arguments)


# PyTorch's own compiler calls it; the public way makes an object first.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
