"""Lowers training steps of the mLSTM (K/V/heads) and the sLSTM (units/heads) under JAX for a Hopper
GPU that need not be there, by our Triton kernels: python tests/lower_for_hopper.py [64/128/132 ...]

Prints of every launch its kernel, warps, operands and results, numbers, and programs of a cluster. What jaxlib would
compile is compiled by ptxas.
"""

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import keras
import triton
from keras_xlstm.backends.jax import device, mlstm_triton

import keras_xlstm

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")


class Jaxlib:
    """Stands in for jaxlib.gpu_triton, which CPU builds do not have."""

    def __init__(self):
        self.launches, self.kernels = [], []

    @staticmethod
    def create_array_parameter(zeroed, divisible):
        return "memory"

    @staticmethod
    def create_tma_descriptor_parameter(elem_type, swizzle, shape, strides, block_shape, oob_fill):
        assert elem_type == 9
        assert swizzle in (1, 2, 3)
        assert strides == [shape[1], 1]
        return "memory"

    @staticmethod
    def create_scalar_parameter(value, kind):
        assert kind in ("i32", "i64", "fp32")
        return "number"

    @staticmethod
    def TritonKernel(name, warps, ctas, shared, ptx, ttir, capability):
        entry = ptx.split("\n.reqntid")[0]
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [PTXAS, "-arch=sm_90a", "-o", os.devnull, file.name]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr + entry
        return SimpleNamespace(
            name=name, warps=warps, ptx=ptx, count=entry.count(".param "), ctas=ctas
        )

    def TritonKernelCall(self, kernel, x, y, z, parameters):
        name, warps, ctas = kernel.name, kernel.warps, kernel.ctas
        assert kernel.count == len(parameters) + 2, (name, kernel.count, parameters)
        memory = parameters.count("memory")
        assert parameters[:memory] == ["memory"] * memory, (name, parameters)
        self.launches.append(f"{name} {warps} {memory} {len(parameters) - memory} {ctas}")
        kernel.programs, kernel.parameters = x * ctas, parameters
        self.kernels.append(kernel)
        return self

    def to_proto(self, name, metadata):
        return self.launches[-1].encode()


JAXLIB = Jaxlib()


def lower_op(*sizes, T=512, dtype="bfloat16", implementation="triton"):
    """A training step of an op as StableHLO; its launches are in JAXLIB."""
    if len(sizes) == 3:
        K, V, H = sizes
        op, shapes = keras_xlstm.ops.mlstm, [(1, T, H, K), (1, T, H, K), (1, T, H, V)]
        shapes += [(1, T, H), (1, T, H)]
    else:
        D, H = sizes
        op, shapes = keras_xlstm.ops.slstm, [(16, T, 4, H, D), (H, D, 4, D), (4, H, D)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def run(*inputs):
        return op(*inputs, implementation=implementation)

    return _lowered(run, arguments)


def lower_block(name, dtype):
    """The same of a block of that class, in the form for GPUs, with Triton's kernels."""
    policy = {"bfloat16": "mixed_bfloat16"}.get(dtype, dtype)
    block = getattr(keras_xlstm.layers, name)(num_heads=4, dtype=policy)
    block.build((None, None, 256))
    variables = [v.value for v in block.trainable_variables]

    def run(x, *values):
        mapping = list(zip(block.trainable_variables, values, strict=True))
        with keras.StatelessScope(mapping), keras_xlstm.backends.use("triton"):
            return block(x, training=True)

    arguments = [jax.ShapeDtypeStruct((2, 512, 256), dtype)]
    arguments += [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]
    return _lowered(run, arguments)


def _lowered(run, arguments):
    def step(*inputs):
        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    JAXLIB.launches.clear()
    JAXLIB.kernels.clear()
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("triton_kernel_call_ffi") == len(JAXLIB.launches)
    return lowered


def pretend_hopper():
    device.not_nvidia = device.missing = lambda: None
    device.platform = lambda: "gpu"
    device.processors = lambda: 132
    device.shared_memory = lambda: 232_448
    device.jaxlib = lambda: JAXLIB


if __name__ == "__main__":
    pretend_hopper()
    assert mlstm_triton.unsupported() is None
    for sizes in sys.argv[1:] or ["64/128/132", "64/12", "192/4"]:
        lower_op(*map(int, sizes.split("/")))
        print(*JAXLIB.launches, sep="\n", flush=True)
