"""Plans (backends/kernels/plan.py) on PyTorch tensors.

For a small sequence Python takes longer than the kernels. What is worked out once for a signature
is therefore kept in `BOUND`, the one cache of this side: of each signature the compiled kernels,
and parameter memory for the addresses that came last, which a model's blocks and an allocator give
again and again. A call like one before then allocates, looks its addresses up, and makes one call
of CUDA's driver a kernel. At other addresses NumPy writes those into the memory that came first.

Outputs and scratch are allocated on the current stream, where the kernels run: PyTorch hands their
memory on only to what that stream does later, so scratch may go as soon as all is launched.
"""

import functools
import operator
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from keras_xlstm.backends.kernels.plan import Matrix, buffer_of, packed, parameters
from keras_xlstm.backends.torch import device, driver

BOUND = {}  # {signature: Bound}
_SIGNATURES = 1000  # as many lengths as there are may come
# Sets of addresses of a signature: for all blocks of a model, or few where signatures are many.
_SETS, _FEW, _MANY = 64, 4, 16
_LAUNCHES = 1024  # of a signature, in all of its sets


def bound(build, *signature):
    """The `Bound` of `build(*signature, aligned=)`."""
    key = build, *signature
    found = BOUND.get(key)
    if found is None:
        if len(BOUND) >= _SIGNATURES:
            BOUND.clear()
        found = BOUND[key] = Bound(functools.partial(build, *signature))
    return found


class Bound:
    """`bound(*inputs)`: a list of a plan's outputs, and the memory of what a forward pass saves.

    `inputs` are contiguous tensors in the order of the plan's; for a backward pass, behind them
    what the forward pass saved. `build(aligned=)` makes the plan: TMA wants memory aligned to 16
    bytes. Inputs that are not are compiled for apart, for each pattern of those that are,
    `aligned`.
    """

    def __init__(self, build, aligned=None):
        self.build, self.aligned, self.others = build, aligned, {}
        self.plan = plan = build(aligned=aligned is None)
        written = set().union(*(step.written for step in plan.steps))
        self.saves = any(b.name in written for b in plan.saved)
        # Of each output an input of its shape and dtype, as PyTorch is quickest to make its like.
        alike = {b[1:3]: n for n, b in enumerate(plan.inputs)}
        self.outputs = [(alike.get(b[1:3]), b.shape, getattr(torch, b.dtype)) for b in plan.outputs]
        saved, self.saved_bytes = packed(plan.saved)
        scratch, self.scratch_bytes = packed(plan.scratch)
        # Pieces of memory: inputs, what was saved, outputs, what is saved, scratch.
        pieces = [{b.name: 0} for b in plan.inputs] + [saved] * bool(saved and not self.saves)
        self.inputs = len(pieces)
        pieces += [{b.name: 0} for b in plan.outputs]
        pieces += [saved] * self.saves + [scratch] * bool(scratch)
        self.places = {b: (n, at) for n, places in enumerate(pieces) for b, at in places.items()}
        self.filled = [b for b in plan.buffers if b.bit is not None]
        self.kernels, self.memories, self.lock = None, {}, threading.Lock()

    def __call__(self, *inputs):
        first = inputs[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self(*inputs)
        addresses = [t.data_ptr() for t in inputs]
        if self.aligned is None and functools.reduce(operator.or_, addresses) & 15:
            return self._of_alignment(tuple(a & 15 == 0 for a in addresses))(*inputs)
        new, saved = first.new_empty, None
        outputs = [
            new(shape, dtype=dtype) if n is None else torch.empty_like(inputs[n])
            for n, shape, dtype in self.outputs
        ]
        made = outputs.copy()
        if self.saves:
            made.append(saved := new(self.saved_bytes, dtype=torch.uint8))
        if self.scratch_bytes:
            made.append(new(self.scratch_bytes, dtype=torch.uint8))
        if self.filled:
            self._fill((*inputs, *made))
        if device.interpreted():
            self._interpret((*inputs, *made))
        else:
            addresses += [t.data_ptr() for t in made]
            self._launch(current_stream(first.device.index), tuple(addresses))
        return outputs, saved

    def _launch(self, stream, addresses):
        with self.lock:  # the memory is one for all threads
            memory = self.memories.get(addresses) or self._memory(addresses)
            if stream != memory.stream:
                memory.run_on(stream)
            for call in memory.calls:
                call()

    def _memory(self, addresses):
        """Parameter memory with these addresses; once there is enough, the oldest is used again."""
        if self.kernels is None:
            self.kernels = self._compiled()
        room = min(_SETS if len(BOUND) <= _MANY else _FEW, _LAUNCHES // len(self.kernels))
        if len(self.memories) < max(1, room):
            memory = _Memory(self.plan.steps, self.kernels, self.places, len(addresses))
        else:
            memory = self.memories.pop(next(iter(self.memories)))
        memory.write(addresses)
        self.memories[addresses] = memory
        return memory

    def _compiled(self):
        """Of each step what launches it; steps that differ in memory or numbers alone share it."""
        found, kernels = {}, []
        for step in self.plan.steps:
            given = frozenset(name for name, value in step.arguments.items() if value is not None)
            key = step.kernel, step.grid, given, *step.constants.items()
            if key not in found:
                found[key] = compiled(step, self._stand_in)
            kernels.append(found[key])
        return kernels

    def _stand_in(self, buffer):
        piece, _ = self.places[buffer.name]
        aligned = self.aligned is None or piece >= self.inputs or self.aligned[piece]
        return StandIn(buffer, 16 if aligned else 1)

    def _of_alignment(self, aligned):
        if aligned not in self.others:
            self.others[aligned] = Bound(self.build, aligned)
        return self.others[aligned]

    def _tensor(self, buffer, pieces):
        piece, at = self.places[buffer.name]
        t = pieces[piece]
        if t.dtype != torch.uint8:
            return t
        # One of several side by side.
        return t[at : at + buffer.bytes].view(getattr(torch, buffer.dtype)).view(buffer.shape)

    def _fill(self, pieces):
        for buffer in self.filled:
            t = self._tensor(buffer, pieces)
            t.view(torch.int16 if t.itemsize == 2 else torch.int32).fill_(-buffer.bit)

    def _interpret(self, pieces):
        tensors = {buffer: self._tensor(buffer, pieces) for buffer in self.plan.buffers}
        for step in self.plan.steps:
            values = {
                name: value if buffer_of(value) is None else tensors[value]
                for name, value in step.arguments.items()
            }
            step.kernel[(step.grid,)](**values, **step.constants)


class StandIn:
    """In place of a tensor, for Triton to compile for."""

    def __init__(self, buffer, address):
        self.dtype, self.bytes, self.address = getattr(torch, buffer.dtype), buffer.bytes, address

    def data_ptr(self):
        return self.address

    def ptr_range(self):
        return self.bytes


def compiled(step, stand_in):
    """A `driver.Kernel`, or a `ByTriton`; `stand_in(buffer)` is what Triton compiles for."""
    values = {name: _value(value, stand_in) for name, value in step.arguments.items()}
    found = step.kernel.warmup(grid=(1,), **values, **step.constants)
    if hasattr(found, "result"):  # it is compiled in the background
        found = found.result()
    run = found[step.grid, 1, 1]  # loads it
    kernel = driver.kernel(found, step.grid, step.cluster)
    if kernel is None and step.cluster > 1:  # of which Triton's launcher knows nothing
        raise RuntimeError(
            "This version of Triton compiles what is not known how to launch in clusters. "
            'Use implementation="native", and please report it.'
        )
    return kernel or ByTriton(run)


class ByTriton(NamedTuple):
    """A kernel that only Triton's own launcher can launch."""

    run: Any


def _value(value, of):
    """What Triton takes for an argument, with `of(buffer)` in place of its memory."""
    if not isinstance(value, Matrix):
        return value if buffer_of(value) is None else of(value)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    tile = list(value.tile)
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
    return TensorDescriptor(of(value.buffer), value.shape, (value.shape[1], 1), tile, layout)


class _TritonCall:
    """A launch by Triton's launcher; see `driver.Call`."""

    def __init__(self, step, run, places):
        self.step, self.run, self.places, self.stream = step, run, places, None

    def write(self, addresses):
        def at(buffer):
            piece, offset = self.places[buffer.name]
            return addresses[piece] + offset

        def described(buffer):
            return StandIn(buffer, at(buffer))

        values = {name: _value(value, described if isinstance(value, Matrix) else at)
                  for name, value in self.step.arguments.items()} | self.step.constants  # fmt: skip
        self.values = [values[name] for name in parameters(self.step.kernel)]

    def __call__(self):
        self.run(*self.values, stream=self.stream)


class _Memory:
    """What the driver is given for a plan's launches, with the addresses in it."""

    def __init__(self, steps, kernels, places, count):
        self.calls, self.by_driver, self.by_triton = [], [], []
        self.descriptors, pointers = [], []
        for step, kernel in zip(steps, kernels, strict=True):
            if isinstance(kernel, ByTriton):
                call = _TritonCall(step, kernel.run, places)
                self.by_triton.append(call)
            else:
                given = {name: value.shape if isinstance(value, Matrix) else value
                         for name, value in step.arguments.items()}  # fmt: skip
                call = driver.Call(kernel, given)
                self.by_driver.append(call)
                pointers += [
                    (call, name, *places[step.arguments[name].name]) for name in call.slots
                ]
                self.descriptors += [
                    (descriptor, *places[step.arguments[name].buffer.name])
                    for name, descriptor in call.descriptors.items()
                ]
            self.calls.append(call)
        # Pointers are side by side in memory, so that NumPy writes all of them at once.
        self.pieces, self.offsets = (np.array([p[j] for p in pointers], np.int64) for j in (2, 3))
        self.addresses = np.zeros(count, np.int64)
        self.pointers = np.zeros(len(pointers), np.int64)
        for n, (call, name, *_) in enumerate(pointers):
            call.read_from(name, self.pointers.ctypes.data + 8 * n)
        self.stream = None

    def write(self, addresses):
        self.addresses[:] = addresses
        np.take(self.addresses, self.pieces, out=self.pointers, mode="clip")
        self.pointers += self.offsets
        for descriptor, piece, offset in self.descriptors:
            descriptor.write(addresses[piece] + offset)
        for call in self.by_triton:
            call.write(addresses)

    def run_on(self, stream):
        for call in self.by_driver:
            call.config.stream = stream
        for call in self.by_triton:
            call.stream = stream
        self.stream = stream


# PyTorch's own compiler calls it; the public way makes an object first.
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
