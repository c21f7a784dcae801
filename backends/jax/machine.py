"""What the Pallas kernels ask of JAX and of the device."""

import functools
import importlib.util
import os

import jax
import keras
from jax import lax

_DTYPES = ("float32", "bfloat16", "float16")
# Bytes of shared memory that one program may have, by compute capability.
_SHARED_MEMORY = {"8.0": 166_912, "8.6": 101_376, "8.7": 166_912, "8.9": 101_376, "12.0": 101_376}


def interpreted():
    """Whether kernels are to run by Pallas's interpreter, as tests do on a CPU."""
    return os.environ.get("KERAS_XLSTM_INTERPRET") == "1"


def _device():
    """Where a traced function will run, as far as can be known while it is traced."""
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def missing():
    """Why no kernel can run here, or None."""
    device = _device()
    if not interpreted():
        if device.platform != "gpu":
            return f"it needs a GPU, and JAX computes on {device.platform}"
        capability = str(getattr(device, "compute_capability", ""))  # of AMD's: "gfx942"
        if capability.startswith("gfx") or float(capability or 0) < 8.0:
            return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if not _has_pallas():
        return "this version of jax has no jax.experimental.pallas.triton"
    return None


@functools.cache
def _has_pallas():
    # Asked last: the answer imports jax.experimental.pallas, half a second.
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def unsupported(x):
    """Why no kernel can run on this array, or None."""
    if not all(isinstance(size, int) for size in x.shape[1:]):
        return f"only the batch may have no size yet; the shape is {x.shape}"
    if isinstance(x.shape[0], int) and not 0 < x.shape[0] < 65_536:  # an axis of the grid
        return f"it takes batches of 1 to 65535, not of {x.shape[0]}"
    if x.dtype.name not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, not {x.dtype.name}"
    if not isinstance(x, jax.core.Tracer) and not interpreted():
        platforms = {device.platform for device in x.devices()}
        if platforms != {"gpu"}:
            return f"it needs arrays on a GPU, not on {', '.join(sorted(platforms))}"
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.device_mesh.devices.size > 1:
        return (
            "keras.distribution is set, and JAX cannot shard a kernel by itself (inside "
            "jax.shard_map it can run)"
        )
    return missing()


def shared_memory():
    """Bytes of shared memory that one program may have."""
    if interpreted():
        return 232_448
    return _SHARED_MEMORY.get(_device().compute_capability, 232_448)


def processors():
    """How many programs run at once, one on each."""
    return 1 if interpreted() else getattr(_device(), "core_count", 132)


def precision(dtype):
    """Of products of float32 (of float16's states: float32 for their range alone)."""
    if dtype != "float32":
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST if interpreted() else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
