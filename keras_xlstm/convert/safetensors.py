"""safetensors files, tensor by tensor: no dependency, and no bfloat16 needed of NumPy."""

import json
import math
from collections import namedtuple
from collections.abc import Mapping

import numpy as np

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader


def parsed(text):
    """The JSON object in a text; a ValueError for anything else, and for a name given twice."""

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"twice the name {next(n for n in names if names.count(n) > 1)!r}")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("brackets nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object but {type(found).__name__}")
    return found


class Tensor(namedtuple("Tensor", "path start shape stored")):
    """A tensor in a file, read when NumPy asks."""

    @property
    def dtype(self):
        return np.dtype("f4" if self.stored == "BF16" else STORED[self.stored][1:])

    def bits(self):
        """As stored, bfloat16 as whole numbers of 16 bits."""
        # Not mapped: a transposed copy would wait for the disk at every page.
        size = math.prod(self.shape)
        return np.fromfile(self.path, STORED[self.stored], size, offset=self.start).reshape(
            self.shape
        )

    def __array__(self, dtype=None, copy=None):
        return np.asarray(widened(self.bits()), dtype or self.dtype)


def widened(array):
    """float32 of the bits of bfloat16, which are its upper half; another dtype as it is."""
    if array.dtype != np.uint16:
        return array
    wide = array.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


class Safetensors(Mapping):
    """The tensors in a folder's safetensors files, by name."""

    def __init__(self, folder):
        one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if one.is_file():
            self.tensors = _read_header(one)
            return
        if not index.is_file():
            raise ValueError(
                "`folder` must hold model.safetensors, or model.safetensors.index.json and its "
                f"files. Received: {str(folder)!r}, with neither. Pickled weights are not read: "
                "save the model as safetensors."
            )
        self.tensors = {}
        try:
            where = dict(parsed(index.read_text(encoding="utf-8"))["weight_map"])
            files = sorted({str(file) for file in where.values()})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{index} must map names to files. Received: {error!r}.") from error
        there = {path.name for path in folder.iterdir() if path.is_file()}
        for file in files:
            if file not in there:
                raise ValueError(
                    f"{index} names files that must lie beside it. Received: {file!r}, which does "
                    "not. Download all files of the model."
                )
            header = _read_header(folder / file)
            twice = sorted(set(header) & set(self.tensors))
            if twice:
                raise ValueError(
                    f"The files that {index} names must hold each tensor once. Received: "
                    f"{twice[0]!r} in {file!r} and in another. Use the files of one model."
                )
            self.tensors |= header
        lost = set(where) - set(self.tensors)
        if lost:
            raise ValueError(
                f"The files that {index} names must hold its tensors. Received: files without "
                f"{', '.join(map(repr, sorted(lost)[:10]))}. Download all files of the model again."
            )

    def __getitem__(self, name):
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def _read_header(path):
    """Name to `Tensor`: eight bytes of the header's length, the header as JSON, the data."""

    def damaged(reason):
        return ValueError(
            f"{path} must be a whole safetensors file with weights of "
            f"{', '.join(STORED)}. Received: {reason}. Download or save it again."
        )

    size, tensors, extents = path.stat().st_size, {}, []
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise damaged(f"{size} bytes, fewer than its header")
        if start > _LONGEST_HEADER:
            raise damaged(f"a header of {start - 8} bytes, more than any model needs")
        try:
            header = parsed(file.read(start - 8))
        except ValueError as error:
            raise damaged(f"a header that is no JSON object, {error}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            stored, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"a bad entry for {name!r}, {error!r}") from error
        if not isinstance(stored, str) or stored not in STORED:
            raise damaged(f"{name!r} of type {stored}")
        size_of_one = np.dtype(STORED[stored]).itemsize
        if not whole or end - begin != math.prod(shape) * size_of_one or start + end > size:
            raise damaged(
                f"{name!r} of shape {shape} at bytes {begin} to {end} of {size - start}, which "
                "does not fit"
            )
        tensors[name] = Tensor(str(path), start + begin, tuple(shape), stored)
        extents.append((begin, end, name))
    # The format has neither gaps nor bytes that two tensors share.
    reached = 0
    for begin, end, name in sorted(extents):
        if begin != reached:
            raise damaged(f"{name!r} at byte {begin}, where the tensors before it end at {reached}")
        reached = end
    if reached != size - start:
        raise damaged(f"{size - start} bytes of weights for tensors of {reached}")
    return tensors
