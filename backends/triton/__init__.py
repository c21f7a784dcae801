"""Kernels in Triton and Gluon for NVIDIA GPUs, and the order in which they run: of no framework.

PyTorch and JAX launch them, each in its own way (backends/torch, backends/jax).
"""

import os
import sys


def _load():
    """Imports Triton. It brings an LLVM of its own, and TensorFlow shows all libraries that are
    loaded after it another one: with that the process would end, without a Python error."""
    flags = sys.getdlopenflags()
    if "tensorflow" in sys.modules:
        sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    try:
        import triton  # noqa: F401
    finally:
        sys.setdlopenflags(flags)


_load()
