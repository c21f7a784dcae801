"""Lowers training steps of the mLSTM (K/V/heads) and the sLSTM (units/heads) under JAX for a Hopper
GPU that need not be there, by our Triton kernels: python tests/lower_for_hopper.py [64/128/132 ...]

Prints of every launch its kernel, warps, operands and results, numbers, and programs of a cluster. What jaxlib would
compile is compiled by ptxas.
"""

import os
import subprocess
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import triton
from keras_xlstm.backends.jax import machine, mlstm_triton

import keras_xlstm

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")


class Jaxlib:
    """Stands in for jaxlib.gpu_triton, which CPU builds do not have."""

    def __init__(self):
        self.launches = []

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
        return name, warps, entry.count(".param "), ctas

    def TritonKernelCall(self, kernel, x, y, z, parameters):
        name, warps, count, ctas = kernel
        assert count == len(parameters) + 2, (name, count, parameters)
        memory = parameters.count("memory")
        assert parameters[:memory] == ["memory"] * memory, (name, parameters)
        self.launches.append(f"{name} {warps} {memory} {len(parameters) - memory} {ctas}")
        return self

    def to_proto(self, name, metadata):
        return self.launches[-1].encode()


JAXLIB = Jaxlib()


def lower(*sizes, T=512):
    if len(sizes) == 3:
        K, V, H = sizes
        op, shapes = keras_xlstm.ops.mlstm, [(1, T, H, K), (1, T, H, K), (1, T, H, V)]
        shapes += [(1, T, H), (1, T, H)]
    else:
        D, H = sizes
        op, shapes = keras_xlstm.ops.slstm, [(16, T, 4, H, D), (H, D, 4, D), (4, H, D)]
    arguments = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]

    def step(*inputs):
        def run(*inputs):
            return op(*inputs, implementation="triton")

        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    JAXLIB.launches.clear()
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("triton_kernel_call_ffi") == len(JAXLIB.launches)
    return list(JAXLIB.launches)


if __name__ == "__main__":
    machine.not_nvidia = lambda: None
    machine.processors = lambda: 132
    machine.shared_memory = lambda: 232_448
    machine.jaxlib = lambda: JAXLIB
    assert mlstm_triton.unsupported() is None
    for sizes in sys.argv[1:] or ["64/128/132", "64/12", "192/4"]:
        print(*lower(*map(int, sizes.split("/"))), sep="\n", flush=True)
