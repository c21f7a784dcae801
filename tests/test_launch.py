"""Bound plans (backends/torch/launch.py), with a driver that stands in for CUDA's. On a GPU every
test of the kernels goes this way; that kernels' parameters are as expected, test_triton.py sees."""

import ctypes
import functools
import itertools
import struct
import threading
import types

import pytest
from tools import BACKEND

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import torch
from keras_xlstm.backends.kernels.mlstm import plan as mlstm
from keras_xlstm.backends.kernels.plan import Buffer, Device, Matrix, Plan, Step, buffer_of
from keras_xlstm.backends.kernels.slstm import plan as slstm
from keras_xlstm.backends.torch import device, driver, launch

pytest.importorskip("triton")
BYTES = {"Q": 8, "i": 4, "f": 4}


def kind_of(value):
    if isinstance(value, Matrix):
        return "152s"
    return "Q" if buffer_of(value) else "f" if isinstance(value, float) else "i"


def stand_in_kernel(step, function):
    """A driver.Kernel for these arguments."""
    given = {name: value for name, value in step.arguments.items() if value is not None}
    tiles = [{"block_size": v.tile, "swizzle": 3} for v in given.values() if isinstance(v, Matrix)]
    metadata = types.SimpleNamespace(num_warps=4, shared=0, tensordesc_meta=tiles)
    compiled = types.SimpleNamespace(function=function, metadata=metadata)
    parameters = [(name, kind_of(value)) for name, value in given.items()]
    return driver.Kernel(compiled, step.grid, step.cluster, parameters)


class Driver:
    """Stands in for CUDA's; keeps what every launch was given."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.stream = monkeypatch, 1
        self.steps, self.launched, self.errors, self.encoded = [], [], [], []
        monkeypatch.setattr(driver, "_driver", lambda: self)
        monkeypatch.setattr(launch, "compiled", self.compiled)
        monkeypatch.setattr(launch, "current_stream", lambda index: self.stream)
        monkeypatch.setattr(device, "interpreted", lambda: False)

    def compiled(self, step, stand_in):
        self.steps.append(step)
        self.stood_in = {name: stand_in(buffer_of(value)).data_ptr()
                         for name, value in step.arguments.items() if buffer_of(value)}  # fmt: skip
        return stand_in_kernel(step, function=len(self.steps) - 1)

    def cuLaunchKernelEx(self, config, function, places, extra):
        config = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
        if self.errors:
            return self.errors.pop(0)
        step, values, n = self.steps[function], {}, 0
        for name, value in step.arguments.items():
            if value is None:
                continue
            if isinstance(value, Matrix):
                assert places[n] % 64 == 0
                whole = ctypes.string_at(places[n], 128)
                behind = b"".join(
                    ctypes.string_at(places[n + j], size) for j, size in enumerate((4, 4, 8, 8), 1)
                )
                rows, columns = value.shape
                assert struct.unpack("<iiqq", behind) == (rows, columns, columns, 1)
                values[name], *rest = struct.unpack("qqqqii", whole[:40])
                assert rest == [columns, rows, 2 * columns, *reversed(value.tile)]
                n += 5
                continue
            kind = kind_of(value)
            (values[name],) = struct.unpack(kind, ctypes.string_at(places[n], BYTES[kind]))
            n += 1
        assert struct.unpack("qq", ctypes.string_at(places[n], 16)) == (0, 0)  # Triton's own
        self.launched.append((step, config.sizes[0], config.stream, values))
        return 0

    def cuTensorMapEncodeTiled(self, place, dtype, rank, base, sizes, strides, box, *rest):
        assert place % 64 == 0
        self.encoded.append(base)
        code = struct.pack("qqqqii", base, *sizes, *strides, *box)
        ctypes.memmove(place, code + bytes(128 - len(code)), 128)
        return 0

    def cuGetErrorString(self, error, text):
        return 1


def inputs_of(bound):
    """Tensors for a bound plan, of memory that none had before."""
    found = [torch.zeros(b.shape, dtype=getattr(torch, b.dtype)) for b in bound.plan.inputs]
    if not bound.saves and bound.plan.saved:
        found.append(torch.zeros(bound.saved_bytes, dtype=torch.uint8))
    return found


def run(fake, bound, inputs, stream=1, allocated=None):
    """A call, and a check of every parameter of its launches; `allocated` is used again."""
    fake.stream, fake.launched = stream, []
    allocated, made = iter(allocated or ()), []
    first = inputs[0].view(inputs[0].shape)  # an object of its own

    def new_empty(shape, dtype):
        made.append(next(allocated, None))
        if made[-1] is None:
            made[-1] = torch.full((shape,) if isinstance(shape, int) else shape, 7, dtype=dtype)
        return made[-1]

    first.new_empty = new_empty
    fake.monkeypatch.setattr(torch, "empty_like", lambda t: new_empty(t.shape, t.dtype))
    outputs, saved = bound(first, *inputs[1:])
    assert [t.data_ptr() for t in outputs] == [t.data_ptr() for t in made[: len(outputs)]]
    assert (saved is not None) == bound.saves
    check(fake, bound, [*inputs, *made], stream)
    return made


def check(fake, bound, pieces, stream):
    plan = bound.plan
    at = {}
    for b in plan.buffers:
        piece, offset = bound.places[b.name]
        assert offset + b.bytes <= pieces[piece].numel() * pieces[piece].itemsize
        at[b.name] = pieces[piece].data_ptr() + offset
    for step, (compiled, grid, on, values) in zip(plan.steps, fake.launched, strict=True):
        assert (step.kernel, step.constants) == (compiled.kernel, compiled.constants)
        assert (step.grid, stream) == (grid, on)
        for name, value in step.arguments.items():
            buffer = buffer_of(value)
            if buffer is not None:
                assert values[name] == at[buffer.name], (step.kernel, name)
            elif value is not None:
                assert values[name] == pytest.approx(value)
    starts = sorted((at[b.name], b.bytes) for b in plan.buffers)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(starts))  # none overlaps


def is_in_order(plan):
    """Every step reads what was given, or what an earlier one may have written."""
    passed = any(b.name in step.written for step in plan.steps for b in plan.saved)
    known = {b.name for b in (*plan.inputs, *(() if passed else plan.saved))}
    known |= {b.name for b in plan.buffers if b.bit is not None}
    for step in plan.steps:
        read = {n: buffer_of(v) for n, v in step.arguments.items() if n not in step.writes}
        assert known >= {b.name for b in read.values() if b}, (step.kernel, known)
        known |= step.written
    assert {b.name for b in plan.outputs} <= known
    assert len({b.name for b in plan.buffers}) == len(plan.buffers)


def compare(fake, build):
    bound = launch.Bound(build)
    for aligned in (True, False):
        is_in_order(build(aligned=aligned))
    first, second = inputs_of(bound), inputs_of(bound)
    made = run(fake, bound, first)
    count = len(fake.steps)
    again = run(fake, bound, second)
    assert len(bound.memories) == 2
    run(fake, bound, first, allocated=made)
    run(fake, bound, second, stream=2, allocated=again)
    run(fake, bound, first, stream=1, allocated=made)
    assert len(bound.memories) == 2
    assert len(fake.steps) == count  # compiled once


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("processors", [1, 10**9])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_mlstm(trains, hopper, processors, segments, states, monkeypatch):
    fake = Driver(monkeypatch)
    of = Device(232_448, processors, "ieee", hopper=hopper)
    call = mlstm.Call(2, 512, 2, 64, 128, "bfloat16", ("float32",) * 2, segments, False, 128, 0.5)
    for last in (True, False):
        compare(fake, functools.partial(mlstm.forward, of, call, states, last, trains))
        if trains:
            compare(fake, functools.partial(mlstm.backward, of, call, states, last))


def test_a_single_step(monkeypatch):
    call = mlstm.Call(2, 1, 2, 64, 128, "bfloat16", ("float32",) * 2, False, True, 1, 0.5)
    compare(Driver(monkeypatch), lambda aligned: mlstm.single_step(call))


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(
    ("B", "D", "dtype", "clusters", "processors"),
    [
        (3, 64, "bfloat16", 8, 60), (3, 768, "bfloat16", 8, 60), (100, 192, "float16", 1, 60),
        (3, 20, "float32", 8, 60), (100, 100, "float32", 8, 60), (3, 768, "bfloat16", 8, 1),
    ],
)  # fmt: skip
def test_slstm(everything, B, D, dtype, clusters, processors, monkeypatch):
    """The last: a launch for every step, as the programs of a head are not all resident."""
    fake = Driver(monkeypatch)
    of = Device(
        232_448, processors, "ieee", (3, 9), cooperative=True, all_shared_memory=233_472,
        clusters=clusters,
    )  # fmt: skip
    call = slstm.Call(B, 5, 2, D, dtype, *[everything] * 6)
    for trains in (True, False):
        compare(fake, lambda aligned, trains=trains: slstm.forward(of, call, trains))
    compare(fake, lambda aligned: slstm.backward(of, call, 0.5))


def small(bit=None):
    """x -> y by a descriptor, a pointer and a number."""
    x, y = Buffer("x", (8, 16), "bfloat16"), Buffer("y", (4,), bit=bit)
    arguments = {
        "x_d": Matrix(x, (8, 16), (8, 16)), "none": None, "n": 3, "scale": 0.5, "y_p": y,
    }  # fmt: skip
    return Plan((x,), (y,), (), (), (Step("k", 7, arguments, {}, frozenset(["y_p"])),))


def test_as_many_addresses_as_there_is_room_for(monkeypatch):
    """The parameter memory of those that came first is written anew."""
    fake = Driver(monkeypatch)
    monkeypatch.setattr(launch, "_SETS", 3)
    monkeypatch.setattr(launch, "BOUND", {})  # with many signatures there is other room
    bound = launch.Bound(lambda aligned: small())
    calls = [[inputs_of(bound), None] for _ in range(5)]
    wrote, write = [], launch._Memory.write
    monkeypatch.setattr(launch._Memory, "write", lambda m, a: (wrote.append(m), write(m, a)))
    for stream, n in enumerate((0, 1, 0, 1, 2, 2, 3, 4, 4, 3, 0, 2)):
        calls[n][1] = run(fake, bound, calls[n][0], 1 + stream % 2, calls[n][1])
    assert len(wrote) == 7  # 0, 1, 2, 3 in place of 0, 4 of 1, 0 of 2, 2 of 3
    assert len(set(wrote)) == len(bound.memories) == 3
    before = len(fake.encoded)
    run(fake, bound, calls[2][0], allocated=calls[2][1])
    assert len(fake.encoded) == before


def test_memory_that_is_not_aligned(monkeypatch):
    """It is another plan, which Triton compiles for what is aligned of its inputs."""
    fake, asked = Driver(monkeypatch), []
    bound = launch.Bound(lambda aligned: (asked.append(aligned), small())[1])
    (x,) = inputs_of(bound)
    run(fake, bound, [x])
    assert fake.stood_in == {"x_d": 16, "y_p": 16}
    moved = torch.zeros(129, dtype=torch.bfloat16)[1:].view(8, 16)
    for _ in range(2):
        assert bound(moved)[0][0].shape == (4,)
    assert asked == [True, False]
    assert fake.stood_in == {"x_d": 1, "y_p": 16}
    run(fake, bound, [x])
    assert len(fake.steps) == 2


@pytest.mark.parametrize("bit", [0, 1])
def test_memory_that_holds_something_before(bit, monkeypatch):
    bound, fake = launch.Bound(lambda aligned: small(bit)), Driver(monkeypatch)
    (y,) = run(fake, bound, inputs_of(bound))
    assert (y.view(torch.int32) == -bit).all()


def test_sizes_and_options_have_plans_of_their_own(monkeypatch):
    monkeypatch.setattr(launch, "BOUND", {})
    monkeypatch.setattr(launch, "_SIGNATURES", 2)
    built = []

    def build(*signature, aligned):
        built.append(signature)
        return small()

    one = launch.bound(build, 1, 2.0)
    assert launch.bound(build, 1, 2.0) is one
    assert launch.bound(build, 1, 3.0) is not one
    launch.bound(build, 2, 2.0)  # no room: all others go
    assert len(launch.BOUND) == 1
    assert built == [(1, 2.0), (1, 3.0), (2, 2.0)]


def test_threads_take_turns(monkeypatch):
    """Addresses that are written for one thread are not those that another launches with."""
    fake, found = Driver(monkeypatch), []
    monkeypatch.setattr(launch, "_SETS", 1)
    original = launch._Memory.run_on
    monkeypatch.setattr(
        launch._Memory, "run_on", lambda *a: (original(*a), threading.Event().wait(0.002))
    )
    monkeypatch.setattr(launch, "current_stream", lambda index: threading.get_ident() % 2**31)
    bound = launch.Bound(lambda aligned: small())

    def work(x):
        for _ in range(20):
            (y,), _ = bound(x)
            found.append((threading.get_ident() % 2**31, x.data_ptr(), y.data_ptr()))

    inputs = [inputs_of(bound)[0] for _ in range(4)]
    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    got = sorted((stream, v["x_d"], v["y_p"]) for _, _, stream, v in fake.launched)
    assert got == sorted(found)
    assert len(got) == 80


def test_errors_of_the_driver(monkeypatch):
    """A thread that has not used the device yet makes its context; other errors are raised."""
    fake, made = Driver(monkeypatch), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    bound = launch.Bound(lambda aligned: small())
    inputs = inputs_of(bound)
    fake.errors = [201]
    run(fake, bound, inputs)
    assert made == [0]
    fake.errors = [700]
    with pytest.raises(RuntimeError, match="could not be launched: CUDA's error 700"):
        bound(*inputs)
    run(fake, bound, inputs)
    monkeypatch.setattr(fake, "cuTensorMapEncodeTiled", lambda *a: 1)
    bound = launch.Bound(lambda aligned: small())
    with pytest.raises(RuntimeError, match=r"no descriptor of a matrix \(8, 16\): CUDA's error 1"):
        bound(*inputs)


def test_kernels_that_triton_launches(monkeypatch):
    """Where the driver does not know their parameters: with addresses, and constants behind them."""
    fake, seen = Driver(monkeypatch), []
    kernel = type("Kernel", (), {"arg_names": ["x_p", "y_p", "n", "K"]})
    x, y = Buffer("x", (8,)), Buffer("y", (4,))
    arguments = {"n": 3, "y_p": y, "x_p": x}
    plan = Plan((x,), (y,), (), (), (Step(kernel, 7, arguments, {"K": 5}, frozenset(["y_p"])),))

    def compiled(step, stand_in):
        return launch.ByTriton(lambda *values, stream: seen.append((*values, stream)))

    monkeypatch.setattr(launch, "compiled", compiled)
    bound = launch.Bound(lambda aligned: plan)
    (x,) = inputs_of(bound)
    for fake.stream in (1, 2):
        (y,), _ = bound(x)
        assert seen[-1] == (x.data_ptr(), y.data_ptr(), 3, 5, fake.stream)


# What Triton compiles, as the driver launches it.

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .u32 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .u64 kernel_param_5,
	.param .f32 kernel_param_6,
	.param .u32 kernel_param_7,
	.param .u64 .ptr .global .align 1 kernel_param_8,
	.param .u64 .ptr .global .align 1 kernel_param_9,
	.param .u64 .ptr .global .align 1 kernel_param_10
)
.reqntid 128
{
"""
SIGNATURE = {
    "a": "*bf16", "none": "constexpr", "d": "tensordesc<bf16[8, 16],layout>", "scale": "fp32",
    "T": "i32", "b": "*fp32", "K": "constexpr",
}  # fmt: skip


def compiled(ptx=PTX, signature=SIGNATURE, **more):
    metadata = {
        "name": "kernel", "num_warps": 4, "shared": 1000, "num_ctas": 1,
        "tensordesc_meta": [{"swizzle": 3, "block_size": [8, 16]}],
    }  # fmt: skip
    return types.SimpleNamespace(
        asm={"ptx": ptx}, function=77, src=types.SimpleNamespace(signature=signature),
        metadata=types.SimpleNamespace(**metadata | more),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("way", "attributes"),
    [
        ("plain", []), ("cooperative", [(2, [1, 0, 0, 0])]), ("clusters", [(4, [5, 1, 1, 0])]),
    ],
)  # fmt: skip
def test_what_the_driver_is_given(way, attributes, monkeypatch):
    seen = []

    def launched(config, function, places, extra):
        config = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
        given = [(a.kind, a.value[:4]) for a in config.attributes[: config.count]]
        sizes = (8, 128, 4, 4, 8, 8, 4, 4, 8, 8, 8)
        read = [ctypes.string_at(p, n) for p, n in zip(places, sizes, strict=True)]
        seen.append((function, list(config.sizes), config.stream, given, read, extra))
        return 0

    def encoded(place, dtype, rank, base, sizes, strides, box, *rest):
        assert (dtype, rank, list(sizes), list(strides), list(box)) == (
            9,
            2,
            [32, 24],
            [64],
            [16, 8],
        )
        ctypes.memset(place, base % 251, 128)
        return 0

    fake = types.SimpleNamespace(cuLaunchKernelEx=launched, cuTensorMapEncodeTiled=encoded)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    kernel = driver.kernel(
        compiled(launch_cooperative_grid=way == "cooperative"), 5, 5 if way == "clusters" else 1
    )
    given = {"a": None, "none": None, "d": (24, 32), "scale": 0.5, "T": -3, "b": None}
    call = driver.Call(kernel, given)
    pointers = (ctypes.c_uint64 * 2)(4096, 8192)
    for n, name in enumerate("ab"):
        call.read_from(name, ctypes.addressof(pointers) + 8 * n)
    call.config.stream = 99
    for base in (1600, 3200):
        call.descriptors["d"].write(base)
        call()
        function, sizes, stream, found, read, extra = seen[-1]
        assert (function, sizes, stream) == (77, [5, 1, 1, 128, 1, 1, 1000], 99)
        want = struct.pack("<QiiqqfiQQQ", 4096, 24, 32, 32, 1, 0.5, -3, 8192, 0, 0)
        assert b"".join([read[0], *read[2:]]) == want
        assert read[1] == bytes([base % 251] * 128)
        assert (found, extra) == (attributes, None)
    # As CUDA's headers lay them out.
    assert (ctypes.sizeof(driver._Attribute), ctypes.sizeof(driver._Config)) == (72, 56)


@pytest.mark.parametrize(
    "changed",
    [
        {"signature": SIGNATURE | {"T": "i64"}},  # not the sizes that the program has
        {"signature": SIGNATURE | {"T": "u1"}},
        {"signature": SIGNATURE | {"T": ("i32", "i32")}},
        {"ptx": PTX.replace("\t.param .u32 kernel_param_7,\n", "")},
        {"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_pdl": True},
    ],
)  # fmt: skip
def test_what_is_unknown_is_left_to_triton(changed):
    assert driver.kernel(compiled(**changed), 1) is None


def test_kernels_in_clusters_are_not_left_to_triton(monkeypatch):
    found = type("Compiled", (), {"__getitem__": lambda self, grid: ("run", grid)})()
    kernel = types.SimpleNamespace(warmup=lambda **arguments: found)
    monkeypatch.setattr(driver, "kernel", lambda compiled, grid, cluster: None)
    step = Step(kernel, 7, {}, {"num_warps": 8}, frozenset())
    assert launch.compiled(step, launch.StandIn) == launch.ByTriton(("run", (7, 1, 1)))
    with pytest.raises(RuntimeError, match="how to launch in clusters"):
        launch.compiled(step._replace(cluster=2), launch.StandIn)


def test_what_triton_compiles(monkeypatch):
    """By stand-ins for memory: kernels with descriptors, in clusters, and for unaligned inputs."""
    import triton
    from triton.backends.compiler import GPUTarget

    hopper = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 99,
        get_current_stream=lambda device: 0, launcher_cls=lambda source, metadata: None,
        utils=types.SimpleNamespace(
            load_binary=lambda *binary: (1, 77, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        ),
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    of = Device(232_448, 1, "ieee", (3, 9), hopper=True, clusters=8)
    call = mlstm.Call(1, 256, 1, 64, 128, "bfloat16", ("float32",) * 2, False, False, 128)
    fused = launch.Bound(functools.partial(mlstm.forward, of, call, False, False, True))
    build = functools.partial(slstm.forward, of, slstm.Call(9, 5, 2, 64, "bfloat16"), False)
    clusters = launch.Bound(lambda aligned: build())
    unaligned = launch.Bound(lambda aligned: build(), (True, False))
    for bound, count, tiles in ((fused, 3, 5), (clusters, 1, 0), (unaligned, 1, 0)):
        kernels = bound._compiled()
        assert [type(kernel) for kernel in kernels] == [driver.Kernel] * count
        assert (len(kernels[-1].tiles), kernels[-1].function) == (tiles, 77)
    assert kernels[-1].config.attributes[0].value[0] == 2
