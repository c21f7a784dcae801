"""Launches of calls alike, repeated (backends/torch/repeated.py): the driver is given what it is
given where Python works all of it out anew. No GPU: a driver that stands in for CUDA's."""

import ctypes
import itertools
import struct
import types

import pytest
from tools import BACKEND

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import torch
from keras_xlstm.backends.torch import (
    driver,
    machine,
    mlstm,
    mlstm_launches,
    operators,
    repeated,
    slstm,
)

pytest.importorskip("triton")
SIZES = {"Q": 8, "i": 4, "f": 4}


def compiled(arguments, function):
    """A kernel that takes such arguments, as what Triton compiles is launched."""
    parameters, tiles = [], []
    for place, a in enumerate(arguments):
        if hasattr(a, "block_shape"):
            parameters.append((place, "152s"))
            tiles.append({"block_size": a.block_shape, "swizzle": 3})
        elif a is not None:
            kind = "Q" if isinstance(a, torch.Tensor) else "f" if isinstance(a, float) else "i"
            parameters.append((place, kind))
    metadata = types.SimpleNamespace(num_warps=4, shared=0, tensordesc_meta=tiles)
    kernel = types.SimpleNamespace(function=function, metadata=metadata)
    return driver.Launch(kernel, 7, parameters, 1)


class Driver:
    """Keeps what every launch was given, with addresses as (tensor, bytes behind its start)."""

    def __init__(self, monkeypatch):
        self.kinds, self.memory, self.launched = [], {}, []
        monkeypatch.setattr(driver, "_driver", lambda: self)
        monkeypatch.setattr(operators, "_KNOWN", {})
        kinds = self.kinds

        def compile_first(self, stream, arguments):
            self.known = compiled(arguments, function=len(kinds))
            kinds.append(self.known.kinds)
            self.known(stream, arguments)

        monkeypatch.setattr(operators.Launch, "_first", compile_first)

    def named(self, address):
        for name, t in self.memory.items():
            if 0 <= address - t.data_ptr() < t.numel() * t.itemsize:
                return name, address - t.data_ptr()
        raise AssertionError(address)

    def cuLaunchKernelEx(self, config, function, places, extra):
        stream = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents.stream
        values, n = [], 0
        for kind in self.kinds[function]:
            if kind == "152s":
                whole = ctypes.string_at(places[n], 128)
                behind = b"".join(
                    ctypes.string_at(places[n + j], size) for j, size in enumerate((4, 4, 8, 8), 1)
                )
                values.append((self.named(struct.unpack("q", whole[:8])[0]), whole[8:], behind))
                n += 5
                continue
            (value,) = struct.unpack(kind, ctypes.string_at(places[n], SIZES[kind]))
            values.append(self.named(value) if kind == "Q" else value)
            n += 1
        assert struct.unpack("qq", ctypes.string_at(places[n], 16)) == (0, 0)  # Triton's own
        self.launched.append((function, stream, values))
        return 0

    def cuTensorMapEncodeTiled(self, place, dtype, rank, base, sizes, strides, box, *rest):
        code = struct.pack("qqqqii", base, *sizes, *strides, *box)
        ctypes.memmove(place, code + bytes(128 - len(code)), 128)
        return 0


def tensors(T, states, segments):
    q, k = (torch.zeros(2, T, 2, 64, dtype=torch.bfloat16) for _ in "qk")
    v = torch.zeros(2, T, 2, 128, dtype=torch.bfloat16)
    i, f = (torch.zeros(2, T, 2) for _ in "if")
    state = (torch.zeros(2, 2, 64, 128), torch.zeros(2, 2, 64), torch.zeros(2, 2))
    ids = torch.zeros(2, T, dtype=torch.int32) if segments else None
    return (q, k, v, i, f, *(state if states else [None] * 3), ids)


def forward(T, states, segments):
    """What a call is given, its results, its numbers; of the backward pass as well."""
    given = tensors(T, states, segments)
    return given, mlstm._results(given[0], given[2], states), (1e-6,)


def backward(T, states, segments):
    q, k, v, i, f, C, n, _, ids = tensors(T, states, segments)
    kept = mlstm_launches.kept(q, v, 128).new(q)
    given = (torch.zeros_like(v), C, n, q, k, v, i, f, ids, torch.zeros_like(v), kept)
    return given, mlstm._gradients(q, k, v, i, f, states), ()


def run(way, fake, stream, given, results, numbers, pool=None):
    """Calls, with all that it allocates (again, from a pool) known to the driver; what it returns."""
    pool = {} if pool is None else pool
    fake.memory, fake.launched = {}, []
    for name, t in itertools.chain(enumerate(given), enumerate(results, 100)):
        if t is not None:
            fake.memory[name] = t
    first = given[0].view(given[0].shape)  # an object of its own

    def new_empty(size, dtype):
        name = f"new {len(fake.memory)}"
        key = name, size
        fake.memory[name] = pool[key] = pool.get(key, torch.empty(size, dtype=dtype))
        return fake.memory[name]

    first.new_empty = new_empty
    returned = way(stream, (first, *given[1:]), results, *numbers)
    if returned is None:
        return None, fake.launched
    names = [name for name, t in fake.memory.items() if t.data_ptr() == returned.data_ptr()]
    return (names, returned.numel() * returned.itemsize), fake.launched


def by_place(fake, launched, allocated):
    """Allocations that are not returned as one, in which they follow each other."""
    starts, size = {}, 0
    for name in allocated:
        starts[name] = size
        size += fake.memory[name].numel()

    def of(value):
        if isinstance(value, tuple) and len(value) == 2 and value[0] in starts:
            return "own", starts[value[0]] + value[1]
        return tuple(map(of, value)) if isinstance(value, tuple) else value

    return [(function, stream, [of(v) for v in values]) for function, stream, values in launched]


def compare(way, fake, make, compiles=1):
    """Recorded, repeated, and on another stream; `make()` is of other tensors each time."""
    for stream in [1] * compiles:
        run(way, fake, stream, *make())
    before = len(way.sequences)
    for stream in (1, 1, 2):
        compare_once(way, fake, stream, make())
        assert len(way.sequences) == before + 1


def compare_once(way, fake, stream, call, pool=None):
    given, results, numbers = call
    seen = []
    for one in (way, way.run):
        returned, launched = run(one, fake, stream, given, results, numbers, pool)
        new = [n for n in fake.memory if isinstance(n, str) and n not in (returned or [()])[0]]
        seen.append((returned and returned[1], by_place(fake, launched, new)))
    assert seen[0] == seen[1]
    assert seen[0][1]
    assert all(at == stream for _, at, _ in seen[0][1])


@pytest.mark.parametrize("make", [forward, backward])
def test_addresses_come_again(make, monkeypatch):
    """Those of a few calls are kept as they were written, and written anew after others."""
    fake = Driver(monkeypatch)
    calls = [(make(512, False, False), {}) for _ in range(6)]
    way = getattr(mlstm_launches, make.__name__)(calls[0][0][0], False, 128)
    run(way, fake, 1, *calls[0][0])
    wrote, write = [], repeated._Written.write
    monkeypatch.setattr(
        repeated._Written, "write", lambda self, a: (wrote.append(a), write(self, a))
    )
    for stream, n in enumerate((0, 1, 0, 1, 2, 3, 2, 4, 5, 5, 4, 0, 1, 3)):
        compare_once(way, fake, 1 + stream % 2, *calls[n])
    # All but those whose memory was among the last four.
    assert len(wrote) == 9
    (sequence,) = way.sequences.values()
    assert len(sequence.written) == 4


@pytest.mark.parametrize("make", [forward, backward])
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("processors", [1, 10**9])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_mlstm(make, hopper, processors, segments, states, monkeypatch):
    fake = Driver(monkeypatch)
    monkeypatch.setattr(machine, "hopper", lambda device: hopper)
    monkeypatch.setattr(machine, "processors", lambda device: processors)
    monkeypatch.setattr(machine, "shared_memory", lambda device: 232_448)
    given, results, _ = make(512, states, segments)
    way = getattr(mlstm_launches, make.__name__)(given, False, 128)
    compare(way, fake, lambda: make(512, states, segments))
    if make is forward:  # another number is another sequence
        _, launched = run(way, fake, 1, given, results, (0.5,))
        assert any(0.5 in values for _, _, values in launched)
        assert len(way.sequences) == 2

    def with_or_without_states():
        given, _, numbers = make(512, states, segments)
        if make is forward:
            return given, mlstm._results(given[0], given[2], not states), numbers
        return given, mlstm._gradients(*given[3:8], not states), numbers

    # Results that nobody wants, or that nobody gave a gradient for.
    compare(way, fake, with_or_without_states, compiles=0)


def slstm_forward(B, D, dtype, everything, trains):
    x = torch.zeros(B, 5, 4, 2, D, dtype=dtype)
    R, bias = torch.zeros(2, D, 4, D, dtype=dtype), torch.zeros(4, 2, D)
    flag, state = torch.zeros(B, 5, dtype=torch.int8), torch.zeros(B, 2, D)
    more = [None] * 8
    if everything:
        states = [state.clone() for _ in "hcnm"]
        more = [flag, flag.clone(), state.clone(), state.to(dtype), *states]
    h, *last, saved = slstm._outputs(x, True, trains)
    return (x, R, bias, *more), (h, saved if trains else None, *last), (True,)


def slstm_backward(B, D, dtype, everything, trains):
    (x, R, _, hold, reset, scale, first, *states), outputs, _ = slstm_forward(
        B, D, dtype, everything, True
    )
    h, saved, _, c, n, _ = outputs
    last = [torch.zeros_like(c) for _ in "hcn"]
    given = torch.zeros_like(h), *last, R, first, *states[1:3], hold, reset, scale, h, c, n, saved
    return given, (torch.empty_like(x), *map(torch.zeros_like, last)), (True, 0.5)


@pytest.mark.parametrize("make", [slstm_forward, slstm_backward])
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(
    ("B", "D", "dtype", "clusters"),
    [
        (3, 64, torch.bfloat16, 8), (3, 768, torch.bfloat16, 8), (100, 192, torch.float16, 1),
        (3, 20, torch.float32, 8), (100, 100, torch.float32, 8),
    ],
)  # fmt: skip
def test_slstm(make, everything, B, D, dtype, clusters, monkeypatch):
    fake = Driver(monkeypatch)
    monkeypatch.setattr(machine, "processors", lambda device: 60)
    monkeypatch.setattr(machine, "shared_memory", lambda device: 232_448)
    monkeypatch.setattr(machine, "all_shared_memory", lambda device: 233_472)
    monkeypatch.setattr(machine, "clusters", lambda device: clusters)
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    given, *_ = make(B, D, dtype, everything, True)
    device = slstm._device(given[0])
    if make is slstm_backward:
        ways = {True: slstm._backward_pass(given, device)}
    else:  # without what training needs it is another kernel
        ways = {trains: slstm._forward_pass(given, device, trains) for trains in (True, False)}
    for trains, way in ways.items():
        compare(way, fake, lambda trains=trains: make(B, D, dtype, everything, trains))


def test_a_launch_for_every_step_is_not_recorded(monkeypatch):
    fake = Driver(monkeypatch)
    monkeypatch.setattr(machine, "clusters", lambda device: 8)
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    given, results, numbers = slstm_forward(3, 768, torch.bfloat16, False, True)
    way = slstm._forward_pass(given, slstm._device(given[0]), True)  # one processor
    for _ in range(3):
        _, launched = run(way, fake, 1, given, results, numbers)
        assert len(launched) == 5
    assert not way.sequences


def test_what_triton_launches_is_not_recorded(monkeypatch):
    fake, seen = Driver(monkeypatch), []

    def by_triton(self, stream, arguments):
        self.known = lambda stream, arguments: seen.append(arguments)

    monkeypatch.setattr(operators.Launch, "_first", by_triton)
    given, results, numbers = forward(256, True, False)
    way = mlstm_launches.forward(given, False, 128)
    for _ in range(3):
        run(way, fake, 1, given, results, numbers)
    assert not way.sequences
    assert len(seen) == 2 * len(way.run.launches)


def test_errors_of_the_driver_are_raised(monkeypatch):
    fake = Driver(monkeypatch)
    given, results, numbers = forward(256, True, False)
    way = mlstm_launches.forward(given, False, 128)
    pool = {}
    for _ in range(2):
        run(way, fake, 1, given, results, numbers, pool)
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *a: 700)
    monkeypatch.setattr(Driver, "cuGetErrorString", lambda *a: 1, raising=False)
    # A call has the function that it was made with.
    for sequence in way.sequences.values():
        for written in sequence.written.values():
            for one in written.calls:
                one.launch = fake.cuLaunchKernelEx
    with pytest.raises(RuntimeError, match="could not be launched: CUDA's error 700"):
        run(way, fake, 1, given, results, numbers, pool)
