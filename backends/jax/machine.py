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
    split = _split()
    if split is not None and isinstance(x.shape[0], int) and x.shape[0] % split[2]:
        return f"keras.distribution splits the batch of {x.shape[0]} among {split[2]} devices"
    return missing()


def _split():
    """The mesh of keras.distribution, the name of its batch axis, how many parts a batch is cut in;
    or None."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return None
    mesh = distribution.device_mesh.backend_mesh
    return mesh, distribution.batch_dim_name, mesh.shape[distribution.batch_dim_name]


def over_devices(function, arguments, whole=()):
    """function(*arguments), on every device of keras.distribution for its part of the batch: XLA
    cannot split a kernel by itself. All arguments begin with the batch, but those numbered in
    `whole`, and all results."""
    split = _split()
    if split is None or not isinstance(arguments[0].shape[0], int):
        return function(*arguments)
    mesh, axis, _ = split
    batch, every = jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec()
    specs = tuple(every if j in whole else batch for j in range(len(arguments)))
    # A kernel does not say over which axes its results vary: check_vma=False.
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    return run(*arguments)


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
