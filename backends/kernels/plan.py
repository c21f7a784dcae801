"""A launch list as data: which kernels run, in what order, on what memory.

`slstm/plan.py` and `mlstm/plan.py` build a `Plan` for a signature: sizes, dtypes, options and what
the device offers. A host binds it to memory (torch/launch.py) or lowers its steps
(jax/triton_launch.py); tests compile its kernels for devices that are not there.
"""

import math
from typing import Any, NamedTuple

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int8": 1}
_POINTERS = {
    "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int8": "*i8",
}  # fmt: skip


class Device(NamedTuple):
    """What plans depend on."""

    shared_memory: int  # bytes that a thread block may have
    processors: int  # SMs
    precision: str  # of products in the dtype at hand, as tl.dot names it
    triton: tuple = (0, 0)  # its version
    hopper: bool = False  # whether kernels for NVIDIA's Hopper run
    cooperative: bool = False  # whether launches can be
    all_shared_memory: int = 0  # bytes that the thread blocks of an SM may have together
    clusters: int = 0  # thread blocks of the largest cluster for kernels in PTX; 0: it takes no PTX
    interpreted: bool = False
    pipelined: bool = True  # whether Triton may fetch a loop's next tiles while it works on one


class Buffer(NamedTuple):
    """Memory of a plan. Names are unique in it."""

    name: str
    shape: tuple
    dtype: str = "float32"
    bit: int | None = None  # every bit of it before the first step; None: any

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def bytes(self):
        return self.count * SIZES[self.dtype]


class Matrix(NamedTuple):
    """A buffer of bfloat16 as rows by columns, of which a kernel copies tiles by TMA."""

    buffer: Buffer
    shape: tuple
    tile: tuple


class Step(NamedTuple):
    """A launch."""

    kernel: Any
    grid: int  # thread blocks
    arguments: dict  # {parameter: Buffer, Matrix, number or None}
    constants: dict  # {constexpr parameter or option of the compiler: value}
    writes: frozenset  # the parameters whose memory it may write, and may read as well
    cluster: int = 1  # thread blocks that share their memory

    @property
    def written(self):
        """Names of the buffers that it may write."""
        return {buffer_of(self.arguments[name]).name for name in self.writes}


class Plan(NamedTuple):
    """Launches in order, and their buffers."""

    inputs: tuple
    outputs: tuple
    saved: tuple  # what a forward pass leaves for the backward pass, which reads it
    scratch: tuple  # needed by these steps alone
    steps: tuple

    @property
    def buffers(self):
        return *self.inputs, *self.outputs, *self.saved, *self.scratch


def without_pipeline(constants):
    """`constants` of a kernel whose loops fetch a tile and then work on it: on devices where
    Triton's way to fetch ahead was never run."""
    return constants | {"num_stages": 1} | ({"ST": 1} if "ST" in constants else {})


def step(kernel, grid, reads, writes, constants, cluster=1):
    """A Step of two dicts {parameter: ...}: what the kernel reads alone, and what it writes."""
    written = frozenset(name for name, value in writes.items() if value is not None)
    return Step(kernel, grid, reads | writes, constants, written, cluster)


def buffer_of(value):
    """The Buffer of an argument, or None of a number or None."""
    if isinstance(value, Matrix):
        return value.buffer
    return value if isinstance(value, Buffer) else None


def present(*buffers):
    return tuple(b for b in buffers if b is not None)


def packed(buffers):
    """Places, by name, of buffers side by side in one piece of memory, and its bytes."""
    places, size = {}, 0
    for buffer in buffers:
        places[buffer.name] = -(-size // 128) * 128  # aligned, as allocations are
        size = places[buffer.name] + buffer.bytes
    return places, size


def parameters(kernel):
    """Names, in order; an interpreted kernel has no `params`."""
    return [p.name for p in kernel.params] if hasattr(kernel, "params") else kernel.arg_names


def source(kernel, arguments, constants):
    """(what `triton.compile` takes of a kernel, its options): as Triton's launcher would infer it
    for memory that is aligned to 16 bytes. Our kernels do not specialise whole numbers.

    `arguments` are as a Step's, or anything with the `dtype` of a Buffer or with a `tile`.
    """
    from triton.compiler import ASTSource
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kinds, fixed, divisible = {}, {}, {}
    for j, parameter in enumerate(kernel.params):
        name = parameter.name
        value = constants[name] if parameter.is_constexpr else arguments[name]
        if parameter.is_constexpr or value is None:
            kinds[name], fixed[(j,)] = "constexpr", value
        elif getattr(value, "tile", None):
            tile = list(value.tile)
            layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
            kinds[name] = f"tensordesc<bf16{tile},{layout!r}>"
        elif hasattr(value, "dtype"):
            kinds[name], divisible[(j,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            kinds[name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: value for name, value in constants.items() if name not in kinds}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, kinds, fixed, divisible), options
