"""Plans (backends/kernels/plan.py) under JAX: of each step the custom call that jaxlib has for it.

Triton compiles a kernel while a function is lowered; jaxlib launches it from XLA's thread, without
Python. jax-triton does the same, and why it is not used: it launches as many warps as were asked
for, not as many as a kernel has whose warps are specialised, like all of ours for Hopper (0.4.1);
it has results behind all operands, where ours come in any order; it wants Triton 3.7, and Python
3.12.
"""

import functools
import zlib
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.kernels.plan import Matrix, buffer_of, parameters, source

_BFLOAT16 = 9  # of CUDA's CUtensorMapDataType


class Memory(NamedTuple):
    """Where a kernel's argument is: among operands, or (~place) among results."""

    place: int
    dtype: str
    shape: tuple | None = None  # of a matrix, (rows, columns)
    tile: tuple | None = None


def run(plan, arrays):
    """(arrays of a plan's outputs, and of what it saves), once traced code runs. `arrays`: its
    inputs, and for a backward pass what the forward pass saved."""
    given = (*plan.inputs, *plan.saved)[: len(arrays)]
    arrays = {buffer.name: array for buffer, array in zip(given, arrays, strict=True)}
    arrays |= {b.name: _filled(b) for b in plan.buffers if b.bit is not None}
    for step in plan.steps:
        _launch(step, arrays)
    return [[arrays[b.name] for b in buffers] for buffers in (plan.outputs, plan.saved)]


def _filled(buffer):
    dtype = np.dtype(buffer.dtype)
    bits = jax.numpy.full(buffer.shape, -buffer.bit, f"int{8 * dtype.itemsize}")
    return lax.bitcast_convert_type(bits, dtype)


def _launch(step, arrays):
    """Adds a step's call. What it writes is a result: that of an operand, where there is memory
    already."""
    operands, new, changed, arguments = [], [], [], []
    for name in parameters(step.kernel):
        if name not in step.arguments:
            continue
        value = step.arguments[name]
        buffer = buffer_of(value)
        if buffer is None:
            arguments.append((name, value))
            continue
        matrix = (value.shape, value.tile) if isinstance(value, Matrix) else ()
        if buffer.name in arrays:
            place = len(operands)
            operands.append(arrays[buffer.name])
            if name in step.writes:
                changed.append((place, buffer))
        else:
            assert name in step.writes, (step.kernel, name)
            place = ~len(new)
            new.append(buffer)
        arguments.append((name, Memory(place, buffer.dtype, *matrix)))
    written = [*new, *(buffer for _, buffer in changed)]
    results = primitive.bind(
        *operands, kernel=step.kernel, grid=step.grid, cluster=step.cluster,
        constants=tuple(step.constants.items()), arguments=tuple(arguments),
        aliases=tuple((place, len(new) + n) for n, (place, _) in enumerate(changed)),
        results=tuple((buffer.shape, buffer.dtype) for buffer in written),
    )  # fmt: skip
    arrays |= {buffer.name: array for buffer, array in zip(written, results, strict=True)}


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


class _Compiled(NamedTuple):
    ptx: str
    name: str
    warps: int  # all of them, also those that the kernel specialises
    shared: int
    swizzles_and_tiles: tuple  # of descriptors


@functools.lru_cache(maxsize=1000)
def _compiled(kernel, arguments, constants, capability):
    """The one cache of this side: a model's blocks launch the same kernels."""
    import triton
    from triton.backends.compiler import GPUTarget

    given, options = source(kernel, dict(arguments), dict(constants))
    # That of CUDA 12.8, which jaxlib's own assembler knows; Triton's may be of a newer one.
    options |= {"ptx_version": 87, "enable_fp_fusion": True}
    compiled = triton.compile(given, target=GPUTarget("cuda", capability, 32), options=options)
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


def _lowered(kernel, grid, cluster, constants, arguments, capability):
    """What jaxlib calls, serialised."""
    lib = device.jaxlib()
    compiled = _compiled(kernel, arguments, constants, capability)
    descriptions = iter(compiled.swizzles_and_tiles)
    keys, parameters = [], []

    def add(parameter, place=None):
        behind = 2 if place is None else place < 0
        keys.append((behind, len(keys) if place is None else max(place, ~place)))
        parameters.append(parameter)

    for _, argument in arguments:
        if argument is None:
            continue
        if not isinstance(argument, Memory):
            kind = "fp32" if isinstance(argument, float) else "i32"
            add(lib.create_scalar_parameter(argument, kind))
        elif argument.tile is None:
            add(lib.create_array_parameter(0, 16), argument.place)
        else:
            rows, columns = argument.shape
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
        grid // cluster, 1, 1, [parameters[j] for j in order],
    )  # fmt: skip
    return zlib.compress(call.to_proto(compiled.name, b""))


def _lower(ctx, *operands, kernel, grid, cluster, constants, arguments, aliases, results):
    opaque = _lowered(kernel, grid, cluster, constants, arguments, device.capability())
    rule = jax.ffi.ffi_lowering("triton_kernel_call_ffi", operand_output_aliases=dict(aliases))
    return rule(ctx, *operands, opaque=opaque)


mlir.register_lowering(primitive, _lower, platform="cuda")
