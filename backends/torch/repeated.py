"""Launches of calls alike: recorded once, then repeated at other addresses.

Of what Python computes for a call like one before, addresses alone are new, and each is that of one
of a few tensors, or of a place behind it. For a small sequence the rest takes longer than kernels.
"""

import ctypes
import threading

import numpy as np
import torch
from keras_xlstm.backends.torch import driver
from keras_xlstm.backends.torch.launch import NotRecorded, Recording

_SHIFT = 48  # more bits than addresses have


class Repeated:
    """`run(stream, given, results, *numbers)`, for calls with tensors alike, or None, in both (of
    results perhaps fewer); where `run.repeats`.

    It launches kernels (launch.Launch, in `run.launches`) with tensors as they are or by their
    `data_ptr()`, allocates by the first one's `new_empty(bytes, dtype=torch.uint8)`, and returns
    one of these allocations, or None."""

    def __init__(self, run):
        self.run, self.sequences = run, {}

    def __call__(self, stream, given, results, *numbers):
        key = len(results), *numbers
        found = self.sequences.get(key)
        if found is None:
            try:
                found = self._recorded(given, results, numbers)
            except NotRecorded:  # the first call compiles
                return self.run(stream, given, results, *numbers)
            if len(self.sequences) >= 100:  # as many numbers as there are may come
                self.sequences.clear()
            self.sequences[key] = found
        return found(stream, given, results)

    def _recorded(self, given, results, numbers):
        launches = self.run.launches if self.run.repeats else ()
        if not launches or not all(isinstance(one.known, driver.Launch) for one in launches):
            raise NotRecorded
        return _Sequence(self.run, given, results, *numbers)


class _Buffer:
    """In place of a tensor."""

    def __init__(self, recording, size=0):
        self.recording, self.size = recording, size
        recording.buffers.append(self)
        self.address = len(recording.buffers) << _SHIFT  # not 0, which is no address

    def data_ptr(self):
        return self.address

    def new_empty(self, size, dtype):
        return _Buffer(self.recording, size)

    def view(self, dtype):
        return self


class _Sequence:
    def __init__(self, run, given, results, *numbers):
        recording = Recording()
        given, results = (
            [None if t is None else _Buffer(recording) for t in tensors]
            for tensors in (given, results)
        )
        tensors = len(recording.buffers)
        returned = run(recording, given, results, *numbers)
        self.returned = returned and returned.size
        # What is not returned is one allocation, the last.
        moved, self.scratch = {}, 0
        last = tensors + (returned is not None)
        for number, buffer in enumerate(recording.buffers[tensors:], tensors):
            if buffer is returned:
                moved[number] = tensors, 0
            else:
                moved[number] = last, self.scratch
                self.scratch += -(-buffer.size // 128) * 128  # aligned, as allocations are

        def place(address):
            number, offset = (address >> _SHIFT) - 1, address & ((1 << _SHIFT) - 1)
            number, more = moved.get(number, (number, 0))
            return number, offset + more

        self.launches, self.place = recording.launches, place
        self.tensors = last + (self.scratch > 0)
        self.written = {}  # for each of a few lists of addresses, as the same memory comes again
        self.lock = threading.Lock()

    def __call__(self, stream, given, results):
        addresses = [t.data_ptr() for t in (*given, *results) if t is not None]
        returned = scratch = None
        if self.returned is not None:
            returned = given[0].new_empty(self.returned, dtype=torch.uint8)
            addresses.append(returned.data_ptr())
        if self.scratch:
            scratch = given[0].new_empty(self.scratch, dtype=torch.uint8)
            addresses.append(scratch.data_ptr())
        addresses = tuple(addresses)
        with self.lock:
            written = self.written.get(addresses) or self._write(addresses)
            if stream != written.stream:
                for one in written.calls:
                    one.config.stream = stream
                written.stream = stream
            for one in written.calls:
                one()
        return returned

    def _write(self, addresses):
        if len(self.written) < 4:
            written = _Written(self.launches, self.place, self.tensors)
        else:
            written = self.written.pop(next(iter(self.written)))
        written.write(addresses)
        self.written[addresses] = written
        return written


class _Written:
    """What the driver is given for a sequence's launches, with the addresses in it."""

    def __init__(self, launches, place, tensors):
        self.calls, self.descriptors, pointers = [], [], []
        for launch, arguments in launches:
            one = launch.again(arguments)
            pointers += [(*place(address), slot) for slot, address in one.pointers]
            self.descriptors += [_Descriptor(*place(address), *of) for address, *of in one.matrices]
            self.calls.append(one)
        # Pointers are side by side in memory, so that NumPy writes all of them at once.
        self.buffers, self.offsets = (np.array([p[j] for p in pointers], np.int64) for j in (0, 1))
        self.addresses = np.zeros(tensors, np.int64)
        self.pointers = np.zeros(len(pointers), np.int64)
        for n, (_, _, slot) in enumerate(pointers):
            slot(self.pointers.ctypes.data + 8 * n)
        self.stream = None

    def write(self, addresses):
        self.addresses[:] = addresses
        np.take(self.addresses, self.buffers, out=self.pointers, mode="clip")
        self.pointers += self.offsets
        for descriptor in self.descriptors:
            descriptor(addresses)


class _Descriptor:
    """A TMA descriptor among a kernel's parameters, written anew where its address is another."""

    def __init__(self, number, offset, memory, encode):
        self.number, self.offset, self.memory, self.encode = number, offset, memory, encode
        self.address, self.known = None, {}

    def __call__(self, addresses):
        address = addresses[self.number] + self.offset
        if address != self.address:
            if len(self.known) >= 1000:
                self.known.clear()
            code = self.known.get(address)
            if code is None:
                code = self.known[address] = self.encode(address)
            ctypes.memmove(self.memory, code, len(code))
            self.address = address
