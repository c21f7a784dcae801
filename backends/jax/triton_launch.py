"""Calls of Triton's kernels from JAX, by the custom call that jaxlib has for them.

Triton compiles a kernel while a function is lowered; jaxlib launches it from XLA's thread, without
Python. jax-triton does the same, and why it is not used: it launches as many warps as were asked
for, not as many as a kernel has whose warps are specialised, like all of ours for Hopper (0.4.1);
it has results behind all operands, where ours come in any order; it wants Triton 3.7, and Python
3.12.
"""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from keras_xlstm.backends.jax import device

_TYPES = {
    "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int8": "*i8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_BFLOAT16 = 9  # of CUDA's CUtensorMapDataType


class Buffer:
    """Memory that kernels write: its array, once one has."""

    def __init__(self, shape, dtype="float32"):
        self.shape, self.dtype, self.value = tuple(shape), dtype, None


class Matrix(NamedTuple):
    """An array or buffer of bfloat16 as a matrix (rows, columns), read or written by tiles."""

    what: Any
    whole: tuple
    tile: tuple


class Memory(NamedTuple):
    """Where a kernel's argument is: among operands, or (~place) among results."""

    place: int
    dtype: str
    matrix: tuple | None  # whole, tile


def launch(kernel, programs, arguments, in_place=(), **constants):
    """kernel[(programs,)](*arguments, **constants), once traced code runs.

    Arguments are arrays, `Buffer`s, `Matrix`s of either, Python numbers and None. What a buffer
    holds before, a kernel reads; it writes buffers that hold nothing yet, and those whose
    parameters are named `in_place`. `cluster`, a constant: so many programs hear each other.
    """
    names = [p.name for p in kernel.params] if hasattr(kernel, "params") else kernel.arg_names
    operands, new, changed, places = [], [], [], {}
    for name, argument in zip(names, arguments, strict=False):
        what = argument.what if isinstance(argument, Matrix) else argument
        if isinstance(what, Buffer) and what.value is None:
            new.append((name, what))
        elif isinstance(what, (Buffer, jax.Array)):
            if isinstance(what, Buffer) and name in in_place:
                changed.append((len(operands), what))
            places[name] = len(operands)
            operands.append(what.value if isinstance(what, Buffer) else what)
    # What is both comes last among results: its place is known as an operand's.
    places |= {name: ~place for place, (name, _) in enumerate(new)}
    written = [buffer for _, buffer in (*new, *changed)]
    aliases = [(operand, len(new) + n) for n, (operand, _) in enumerate(changed)]

    def described(name, argument):
        if isinstance(argument, Matrix):
            what, matrix = argument.what, (tuple(argument.whole), tuple(argument.tile))
        else:
            what, matrix = argument, None
        if name not in places:
            return argument
        return Memory(places[name], np.dtype(what.dtype).name, matrix)

    results = primitive.bind(
        *operands, kernel=kernel, programs=programs, constants=tuple(constants.items()),
        arguments=tuple(map(described, names, arguments)), aliases=tuple(aliases),
        results=tuple((buffer.shape, np.dtype(buffer.dtype).name) for buffer in written),
    )  # fmt: skip
    for buffer, result in zip(written, results, strict=True):
        buffer.value = result


primitive = Primitive("keras_xlstm_triton")
primitive.multiple_results = True


@primitive.def_impl
def _(*operands, **parameters):
    with jax.disable_jit(False):
        return jax.jit(lambda *operands: primitive.bind(*operands, **parameters))(*operands)


@primitive.def_abstract_eval
def _(*operands, results, **parameters):
    return [jax.core.ShapedArray(shape, np.dtype(dtype)) for shape, dtype in results]


def _one_by_one(operands, axes, **parameters):
    """Under vmap, whose axis the kernels do not know."""
    mapped = [axis is not None for axis in axes]
    moved = [jax.numpy.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
             if a is not None]  # fmt: skip

    def one(rows):
        rows = iter(rows)
        given = [next(rows) if m else x for x, m in zip(operands, mapped, strict=True)]
        return primitive.bind(*given, **parameters)

    results = lax.map(one, moved)
    return results, [0] * len(results)


batching.primitive_batchers[primitive] = _one_by_one


def _signature(kernel, arguments, constants):
    """As Triton's launcher would infer it: kinds, constants, divisible arguments."""
    kinds, fixed, divisible = {}, {}, {}
    for j, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments[j] if j < len(arguments) else constants[name]
        if parameter.is_constexpr or value is None:
            kinds[name], fixed[(j,)] = "constexpr", value
        elif isinstance(value, Memory) and value.matrix:
            layout = _layout(value.matrix[1])
            kinds[name] = f"tensordesc<bf16{list(value.matrix[1])},{layout!r}>"
        elif isinstance(value, Memory):
            kinds[name], divisible[(j,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            kinds[name] = "fp32" if isinstance(value, float) else "i32"
    return kinds, fixed, divisible


def _layout(tile):
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(tile), gl.bfloat16)


class _Compiled(NamedTuple):
    ptx: str
    name: str
    warps: int  # all of them, also those that the kernel specialises
    shared: int
    swizzles_and_tiles: tuple  # of descriptors


@functools.lru_cache(maxsize=1000)
def _compiled(kernel, arguments, constants, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = dict(constants)
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    # That of CUDA 12.8, which jaxlib's own assembler knows; Triton's may be of a newer one.
    options |= {"ptx_version": 87, "enable_fp_fusion": True}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source(kernel, *_signature(kernel, arguments, constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    assert metadata.global_scratch_size == 0, metadata
    tensors = metadata.tensordesc_meta or ()
    return _Compiled(
        compiled.asm["ptx"], metadata.name, metadata.num_warps, metadata.shared,
        tuple((own["swizzle"], list(own["block_size"])) for own in tensors),
    )  # fmt: skip


def _ordered(ptx, name, keys):
    """The kernel with its parameters in the order of `keys`, Triton's own two behind them: they are
    read by name, and jaxlib passes operands, results, then numbers."""
    start = ptx.index("(", ptx.index(f".entry {name}")) + 1
    end = ptx.index(")", start)
    lines = [line.strip() for line in ptx[start:end].split(",\n")]
    assert len(lines) == len(keys) + 2, (lines, keys)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    lines = [lines[j] for j in order] + lines[len(keys) :]
    return ptx[:start] + ",\n".join(lines) + ptx[end:], order


def _lowered(kernel, programs, constants, arguments, capability):
    """What jaxlib calls, serialised."""
    lib, constants = device.jaxlib(), dict(constants)
    cluster = constants.pop("cluster", 1)
    compiled = _compiled(kernel, arguments, tuple(constants.items()), capability)
    descriptions = iter(compiled.swizzles_and_tiles)
    keys, parameters = [], []

    def add(parameter, place=None):
        behind = 2 if place is None else place < 0
        keys.append((behind, len(keys) if place is None else max(place, ~place)))
        parameters.append(parameter)

    for parameter, argument in zip(kernel.params, arguments, strict=False):
        if parameter.is_constexpr or argument is None:
            continue
        if not isinstance(argument, Memory):
            kind = "fp32" if isinstance(argument, float) else "i32"
            add(lib.create_scalar_parameter(argument, kind))
        elif argument.matrix is None:
            add(lib.create_array_parameter(0, 16), argument.place)
        else:
            (rows, columns), _ = argument.matrix
            swizzle, tile = next(descriptions)
            tma = lib.create_tma_descriptor_parameter(
                elem_type=_BFLOAT16, swizzle=swizzle, shape=[rows, columns],
                strides=[columns, 1], block_shape=tile, oob_fill=0,
            )  # fmt: skip
            add(tma, argument.place)
            for size, kind in ((rows, "i32"), (columns, "i32"), (columns, "i64"), (1, "i64")):
                add(lib.create_scalar_parameter(size, kind))
    ptx, order = _ordered(compiled.ptx, compiled.name, keys)
    call = lib.TritonKernelCall(
        lib.TritonKernel(
            compiled.name, compiled.warps, cluster, compiled.shared, ptx, "", capability
        ),
        programs // cluster, 1, 1, [parameters[j] for j in order],
    )  # fmt: skip
    return zlib.compress(call.to_proto(compiled.name, b""))


def _lower(ctx, *operands, kernel, programs, constants, arguments, aliases, results):
    opaque = _lowered(kernel, programs, constants, arguments, device.capability())
    rule = jax.ffi.ffi_lowering("triton_kernel_call_ffi", operand_output_aliases=dict(aliases))
    return rule(ctx, *operands, opaque=opaque)


mlir.register_lowering(primitive, _lower, platform="cuda")
