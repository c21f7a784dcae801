"""xLSTM for Keras 3: sLSTM and mLSTM on TensorFlow, JAX and PyTorch."""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(_root, "keras_xlstm", "backends")) and _os.path.isfile(
    _os.path.join(_root, "backends", "reference.py")
):
    __path__.append(_root)  # a source checkout: backends/ stands beside keras_xlstm/

from keras_xlstm import (
    backends,
    callbacks,
    compat,
    convert,
    distribution,
    export,
    initializers,
    layers,
    losses,
    models,
    ops,
    windows,
)
from keras_xlstm._version import __version__

__all__ = [
    "__version__",
    "backends",
    "callbacks",
    "convert",
    "distribution",
    "export",
    "initializers",
    "layers",
    "losses",
    "models",
    "ops",
    "windows",
]

compat.register()
