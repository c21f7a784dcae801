"""States in files, without pickle: NumPy's .npz, with a header that says what is where."""

import json
import os
import zipfile
import zlib

import keras
import numpy as np
from keras import ops

from keras_xlstm import backends

_FORMAT, _VERSION = "keras_xlstm state", 1
# NumPy's files do not know bfloat16: as its bits.
_STORED = {name: name for name in ("bool", "float16", "float32", "float64")}
_STORED |= {
    f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_STORED["bfloat16"] = "uint16"


def save_state(path, state):
    """Writes the state of a text, or any state of a model or layer of this package, to a file.

    The file is an .npz of NumPy's, without pickle: read by `load_state`, on any backend. It holds
    no weights.

    Args:
        path: of the file; one that is there is replaced.
        state: as `generate(..., return_state=True)` returns it: or any dict, list or tuple of
            tensors and of such.

    Raises:
        ValueError: for anything else.

    Example:

    >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
    >>> _, state = model.generate([[1, 2, 3]], 0, return_state=True)
    >>> keras_xlstm.models.save_state("text.npz", state)
    >>> state = keras_xlstm.models.load_state("text.npz")
    >>> len(model.generate([[4]], 5, state=state)[0])
    6
    """
    arrays = {}

    def described(node):
        if isinstance(node, dict):
            if not all(isinstance(key, str) for key in node):
                raise ValueError(f"`state` may have strings as keys. Received: {list(node)}.")
            return {"dict": {key: described(x) for key, x in node.items()}}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [described(x) for x in node]}
        if not hasattr(node, "shape"):
            raise ValueError(
                "`state` must be a dict, list or tuple of tensors, as generate(..., "
                f"return_state=True) returns it. Received: {type(node).__name__} in it."
            )
        array = ops.convert_to_numpy(node)
        if array.dtype.name not in _STORED:
            raise ValueError(
                f"`state` must hold numbers: {', '.join(_STORED)}. Received: {array.dtype}."
            )
        name, dtype = str(len(arrays)), array.dtype.name
        arrays[name] = array.view("uint16") if dtype == "bfloat16" else array
        return {"array": name, "dtype": dtype}

    header = {"format": _FORMAT, "version": _VERSION, "tree": described(state)}
    header = np.frombuffer(json.dumps(header).encode(), "uint8")
    path = os.fspath(path)
    with open(f"{path}.partial", "wb") as file:  # NumPy would add .npz to a path
        np.savez(file, header=header, **arrays)
    os.replace(f"{path}.partial", path)


def load_state(path):
    """Reads a state that `save_state` wrote, on any backend.

    Args:
        path: of the file.

    Returns:
        What was written, with tensors of the active backend, of the dtypes that they had.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is damaged, of another kind, or of a later version; and where
            the backend has not a dtype, as JAX without `jax_enable_x64` has not float64.

    Example:

    >>> layer = keras_xlstm.layers.mLSTM(8, return_state=True)
    >>> _, *state = layer(np.ones((2, 5, 3)))
    >>> keras_xlstm.models.save_state("state.npz", state)
    >>> outputs, *_ = layer(np.ones((2, 1, 3)), keras_xlstm.models.load_state("state.npz"))
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != _FORMAT:
            raise ValueError(f"the format is {header['format']!r}")
        version, tree = header["version"], header["tree"]
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(
            "`path` must be a file that keras_xlstm.models.save_state wrote, whole. "
            f"Received: {os.fspath(path)!r}: {error}."
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"This version of keras_xlstm reads states of version {_VERSION}. Received: version "
            f"{version} in {os.fspath(path)!r}. Install the version that wrote it, or a later one."
        )
    try:
        return _built(tree, arrays)
    except (*_DAMAGED, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read as a state: {error}.") from error


# What NumPy, zipfile and json raise at files that are not what they seem.
_DAMAGED = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def _built(node, arrays):
    if "dict" in node:
        return {key: _built(x, arrays) for key, x in node["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in node:
            return kind(_built(x, arrays) for x in node[kind.__name__])
    array, dtype = arrays[node["array"]], node["dtype"]
    if array.dtype.name != _STORED[dtype]:
        raise ValueError(f"an array of {array.dtype} where {_STORED[dtype]} is expected")
    tensor = backends.tensor(array.view("bfloat16") if dtype == "bfloat16" else array)
    if keras.backend.standardize_dtype(tensor.dtype) != dtype:
        raise ValueError(f"this backend has no {dtype} here: it made {tensor.dtype} of it")
    return tensor
