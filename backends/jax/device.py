"""What kernels, Pallas's and Triton's, ask of JAX and of the device."""

import functools
import importlib.metadata
import importlib.util
import math
import os
from typing import NamedTuple

import jax
import keras
from jax import lax
from keras_xlstm.backends.jax import context
from keras_xlstm.backends.kernels.plan import Device

_DTYPES = ("float32", "bfloat16", "float16")
# Bytes of shared memory that one program may have, by compute capability.
_SHARED_MEMORY = {
    "8.0": 166_912, "8.6": 101_376, "8.7": 166_912, "8.9": 101_376, "12.0": 101_376,
    "12.1": 101_376,
}  # fmt: skip


def interpreted():
    """Whether kernels are to run by Pallas's interpreter, as tests do on a CPU."""
    return os.environ.get("KERAS_XLSTM_INTERPRET") == "1"


def _device():
    """Where a traced function will run, as far as can be known while it is traced."""
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def platform():
    return _device().platform


def not_nvidia():
    """Why JAX computes on nothing that kernels are for, or None."""
    device = _device()
    if device.platform != "gpu":
        return f"it needs a GPU, and JAX computes on {device.platform}"
    known = str(getattr(device, "compute_capability", ""))  # of AMD's: "gfx942"
    if known.startswith("gfx") or float(known or 0) < 8.0:
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    return None


def capability():
    """The compute capability, as a whole number: 90 for Hopper, and where no GPU is."""
    return round(float(getattr(_device(), "compute_capability", None) or 9.0) * 10)


def missing():
    """Why no Pallas kernel can run here, or None."""
    reason = None if interpreted() else not_nvidia()
    if reason is None and not _has_pallas():
        reason = "this version of jax has no jax.experimental.pallas.triton"
    return reason


@functools.cache
def _has_pallas():
    # Asked last: the answer imports jax.experimental.pallas, half a second.
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


# In which Triton's internals that triton_launch.py uses were seen the same.
_TRITON = (3, 6), (3, 10)


def triton_interpreted():
    """Whether Triton's kernels run by its interpreter, as tests do on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_triton():
    """Why no Triton kernel can run here, or None."""
    if triton_interpreted():
        on_cpu = _device().platform == "cpu"
        return _not_installed() if on_cpu else "TRITON_INTERPRET=1 runs it on CPUs alone"
    reason = not_nvidia() or _not_installed()
    if reason is None and not hasattr(jaxlib(), "create_tma_descriptor_parameter"):
        reason = "this jaxlib cannot launch them all (0.11.2 can)"
    return reason


@functools.cache
def _not_installed():
    if importlib.util.find_spec("triton") is None:
        return 'the package triton is not installed (pip install "keras-xlstm[triton]")'
    if not _TRITON[0] <= triton_version() < _TRITON[1]:
        return f"it knows triton 3.6 to 3.9, not {importlib.metadata.version('triton')}"
    return None


@functools.cache
def triton_version():
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


@functools.cache
def jaxlib():
    """What launches Triton's kernels, or None."""
    try:
        from jaxlib import gpu_triton
    except ImportError:
        return None
    return gpu_triton


def unsupported(x, without=None, by_interpreter=None):
    """Why no kernel can run on this array, or None.

    `without()` says why none of its kind runs here, `by_interpreter` whether that kind runs on a
    CPU; by default of Pallas.
    """
    by_interpreter = interpreted() if by_interpreter is None else by_interpreter
    if not all(isinstance(size, int) for size in x.shape[1:]):
        return f"only the batch may have no size yet; the shape is {x.shape}"
    if isinstance(x.shape[0], int) and not 0 < x.shape[0] < 65_536:  # an axis of the grid
        return f"it takes batches of 1 to 65535, not of {x.shape[0]}"
    if x.dtype.name not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, not {x.dtype.name}"
    if not isinstance(x, jax.core.Tracer) and not by_interpreter:
        platforms = {device.platform for device in x.devices()}
        if platforms != {"gpu"}:
            return f"it needs arrays on a GPU, not on {', '.join(sorted(platforms))}"
    split = _split()
    if split is not None and isinstance(x.shape[0], int) and x.shape[0] % split.parts:
        return f"keras.distribution splits the batch of {x.shape[0]} among {split.parts} devices"
    return (without or missing)()


class _Split(NamedTuple):
    """How keras.distribution shares out: the batch along one axis of its mesh, the model along the
    others."""

    mesh: jax.sharding.Mesh
    batch: str
    others: tuple
    parts: int  # of the batch

    def heads(self, count):
        """The axes that `count` heads are shared out along; none where they do not divide: every
        device then has all of them."""
        devices = math.prod(self.mesh.shape[axis] for axis in self.others)
        return () if count % devices else self.others


def _split():
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return None
    if context.shares_time():  # by then arrays are a device's own
        return None
    mesh, batch = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    others = tuple(axis for axis in mesh.axis_names if axis != batch)
    return _Split(mesh, batch, others, mesh.shape[batch])


def over_devices(function, arguments, axes, results):
    """function(*arguments), where every device of keras.distribution has a part of the batch and of
    the heads. XLA cannot split a kernel.

    `axes` and `results`: the axes of every argument and result, a letter each: B for the batch, H
    for heads. The first argument has both.
    """
    sizes = dict(zip(axes[0], arguments[0].shape, strict=True))
    split = _split()
    if split is None or not isinstance(sizes["B"], int):
        return function(*arguments)
    names = {"B": split.batch, "H": split.heads(sizes["H"])}

    def specs(axes):
        return tuple(jax.sharding.PartitionSpec(*map(names.get, letters)) for letters in axes)

    # A kernel does not say over which axes its results vary: check_vma=False.
    run = jax.shard_map(
        function, mesh=split.mesh, in_specs=specs(axes), out_specs=specs(results), check_vma=False
    )
    return run(*arguments)


def shared_memory():
    """Bytes of shared memory that one program may have."""
    if interpreted():
        return 232_448
    return _SHARED_MEMORY.get(_device().compute_capability, 232_448)


def processors():
    """How many programs run at once, one on each."""
    return 1 if interpreted() else getattr(_device(), "core_count", 132)


def pipelined():
    """Whether Triton may fetch a loop's next tiles while it works on one: not on Blackwell, where
    that was never run."""
    return capability() < 100


def precision(dtype):
    """Of products of float32 (of float16's states: float32 for their range alone)."""
    if dtype != "float32":
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST if interpreted() else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def of(dtype):
    """The `Device` that plans in this dtype depend on. jaxlib launches nothing cooperatively."""
    precision = {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee")
    if triton_interpreted():
        return Device(1 << 18, 1, precision, triton_version(), clusters=1, interpreted=True)
    hopper = capability() // 10 == 9
    return Device(
        shared_memory(), processors(), precision, triton_version(), hopper,
        clusters=8 if hopper else 1, pipelined=pipelined(),
    )  # fmt: skip
