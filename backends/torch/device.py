"""What the Triton kernels ask of PyTorch, of Triton and of the device."""

import functools
import importlib.metadata
import importlib.util
import os

import torch
from keras_xlstm.backends.kernels.plan import Device
from keras_xlstm.backends.torch.tracing import exporting, transforms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks on import, too


@functools.cache
def _installed():
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(index):
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    return None


@torch.compiler.assume_constant_result
def missing(device=None, index=None):
    """Why no kernel can run on this device (None: on any device here), or None."""
    if not _installed():
        return "the package triton is not installed (PyTorch's CUDA builds bring it)"
    if _INTERPRETED:
        return None
    if device is None:
        return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
    if device != "cuda":
        return f"it needs tensors on a CUDA device, not on {device}"
    return _too_old(index)


@torch.compiler.assume_constant_result
def interpreted():
    return _INTERPRETED


def unsupported(x, halves=False):
    """Why no kernel can run on this tensor, or None. `halves`: Triton's interpreter knows these
    kernels' numbers of 16 bits, too."""
    if x.device.type == "meta":
        return "it needs tensors with values"
    if exporting():
        return "an exported program holds PyTorch's own operators alone"
    if transforms() - {"Grad"}:
        return "torch.func.vmap and forward-mode derivatives see PyTorch's own operators alone"
    if x.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, not {name(x.dtype)}"
    if x.dtype != torch.float32 and interpreted() and not halves:
        return "Triton's interpreter computes float32 alone"
    device = x.device
    return missing(device.type, device.index)


@functools.cache
def shared_memory(device):
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 1 << 18
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def all_shared_memory(device):
    """Bytes that the programs on one processor share out."""
    if device.type != "cuda":
        return 1 << 18
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def processors(device):
    """How many programs run at once, one on each."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def hopper(device):
    """Whether kernels for NVIDIA's Hopper alone can run: their language is new, and only known to
    be the same in these versions."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and (3, 6) <= triton_version() < (3, 10)


@functools.cache
def clusters(device):
    """Programs of the largest cluster that kernels in PTX may have; 0 where there is no PTX."""
    if device.type != "cuda":
        return 1 if interpreted() else 0
    if torch.version.hip is not None:
        return 0
    return 8 if hopper(device) else 1


@functools.cache
def pipelined(device):
    """Whether Triton may fetch a loop's next tiles while it works on one: not on Blackwell, where
    that was never run."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)


@functools.cache
def triton_version():
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def name(dtype):
    return str(dtype)[6:]


def precision(dtype):
    """Of products of float32: float16's states are float32 for their range alone."""
    if dtype == torch.float16:
        return "tf32"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def of(device, dtype):
    """The `Device` that plans in this dtype depend on."""
    return Device(
        shared_memory(device), processors(device), precision(dtype), triton_version(),
        hopper(device), True, all_shared_memory(device), clusters(device), interpreted(),
        pipelined(device),
    )  # fmt: skip
