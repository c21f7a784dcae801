"""Imports Triton; kernels take `triton` and `tl`, its language, from here.

Triton brings an LLVM of its own, and TensorFlow shows all libraries that are loaded after it
another one: with that the process would end, without a Python error.
"""

import os
import sys

_flags = sys.getdlopenflags()
if "tensorflow" in sys.modules:
    sys.setdlopenflags(_flags | os.RTLD_DEEPBIND)
try:
    import triton
    import triton.language as tl
finally:
    sys.setdlopenflags(_flags)

__all__ = ["tl", "triton"]
