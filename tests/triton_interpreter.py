"""On CPUs, JAX's launches of Triton's kernels run by Triton's interpreter, once this is imported."""

import threading

import faster_interpreter  # noqa: F401
import jax
import numpy as np
import torch
from jax.interpreters import mlir
from keras_xlstm.backends.jax import triton_launch

_INTERPRETER = threading.Lock()  # it changes Triton's language while it runs


def _interpreted(*operands, kernel, grid, cluster, constants, arguments, aliases, results):
    """A lowering of `triton_launch.primitive`. The interpreter's tensors are PyTorch's."""

    def run(*operands):
        given = [torch.from_numpy(np.array(x)) for x in operands]
        # Poisoned, to be noticed where nothing was written.
        made = [torch.full(s, -(2**30) if d == "int32" else torch.nan, dtype=getattr(torch, d))
                for s, d in results]  # fmt: skip
        for operand, result in aliases:
            made[result] = given[operand]
        values = {
            name: (given[a.place] if a.place >= 0 else made[~a.place])
            if isinstance(a, triton_launch.Memory)
            else a
            for name, a in arguments
        }
        with _INTERPRETER:
            kernel[(grid,)](**values, **dict(constants))
        return [result.numpy() for result in made]

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return jax.pure_callback(run, shapes, *operands, vmap_method="sequential")


mlir.register_lowering(
    triton_launch.primitive, mlir.lower_fun(_interpreted, multiple_results=True), platform="cpu"
)
