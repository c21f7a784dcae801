"""What blocks compute around the memory (backends/inference.py), while texts are generated."""

import contextvars
import functools

import keras
from keras_xlstm.backends.inference import Inference
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.kernels.block import plan

_generates = contextvars.ContextVar("generates", default=False)


def generating(function):
    """`function`, inside which the kernels may run: they have no gradients."""

    @functools.wraps(function)
    def run(*arguments):
        token = _generates.set(True)
        try:
            return function(*arguments)
        finally:
            _generates.reset(token)

    return run


def _fits(*arrays):
    # XLA cannot split a kernel among devices.
    if not _generates.get() or keras.distribution.distribution() is not None:
        return False
    interpreted = device.triton_interpreted()
    if interpreted and any(x.dtype.name in ("bfloat16", "float16") for x in arrays):
        return False
    if not interpreted and device.capability() // 10 != 9:  # where nothing was measured
        return False
    reason = device.unsupported(arrays[0], device.missing_triton, interpreted)
    return reason is None and all(isinstance(size, int) for x in arrays for size in x.shape)


def _run(name, dtype, call, arrays):
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch.run(getattr(plan, name)(device.of(dtype.name), *call), arrays)[0]


inference = Inference(
    _fits, _run, lambda dtype: dtype.name, device.triton_interpreted, rows=plan.ROWS
)  # fmt: skip
