"""Launches of Triton's compiled kernels by the CUDA driver itself.

Triton's own launcher takes longer in Python than a small sequence's kernel runs, above all where
it makes TMA descriptors, which it does at every launch.
"""

import ctypes
import functools
import re
import struct

import torch

# Of a parameter, by its type: as `struct` packs it, and its bytes.
_NUMBERS = {"i32": ("i", 4), "i64": ("q", 8), "fp32": ("f", 4)}
_POINTER, _DESCRIPTOR = ("Q", 8), ("152s", 128)  # a descriptor's shape and strides lie behind it
_BEHIND = (("i", 4), ("i", 4), ("q", 8), ("q", 8))
_BFLOAT16, _L2_128_BYTES = 9, 2  # of CUDA's CUtensorMapDataType, CUtensorMapL2promotion
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4  # of its CUlaunchAttributeID
_NO_CONTEXT = 201  # this thread has not used the device yet


class Kernel:
    """A compiled kernel, loaded, with its thread blocks; `cluster` of them share their memory."""

    def __init__(self, compiled, grid, cluster, parameters):
        self.function = compiled.function
        self.config = _config(compiled, grid, cluster)
        self.parameters = parameters
        self.tiles = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())


def kernel(compiled, grid, cluster=1):
    """A `Kernel` of what Triton compiled, or None where only Triton's own launcher will do."""
    metadata = compiled.metadata
    more = "launch_pdl", "global_scratch_size", "profile_scratch_size"
    more = getattr(metadata, "num_ctas", 1) != 1 or any(getattr(metadata, n, 0) for n in more)
    if torch.version.hip or more:
        return None
    parameters = packed_parameters(compiled)
    if parameters is None or not isinstance(compiled.function, int):
        return None
    return Kernel(compiled, grid, cluster, parameters)


def packed_parameters(compiled):
    """[(name, how it is packed)] of what is no constant, if the program has just these."""
    found, sizes = [], []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        descriptor = kind.startswith("tensordesc")
        known = _POINTER if kind[0] == "*" else _DESCRIPTOR if descriptor else _NUMBERS.get(kind)
        if known is None:
            return None
        found.append((name, known[0]))
        sizes += [known[1], *(size for _, size in _BEHIND * descriptor)]
    # Behind them Triton has two of its own, for memory that none of our kernels asks for.
    return found if _sizes(compiled.asm["ptx"], compiled.metadata.name) == [*sizes, 8, 8] else None


def _sizes(ptx, name):
    """Bytes of each of a program's parameters."""
    start = ptx.index("(", ptx.index(f".entry {name}")) + 1
    declared = re.findall(r"\.param ([^,]*)", ptx[start : ptx.index(")", start)])
    sizes = []
    for one in declared:
        kind = re.search(r"\.[usbf](\d+)\b", one)
        count = re.search(r"\[(\d+)\]", one)
        sizes.append(int(kind[1]) // 8 * (int(count[1]) if count else 1))
    return sizes


class _Attribute(ctypes.Structure):
    """CUDA's CUlaunchAttribute."""

    _fields_ = (("kind", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUDA's CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


def _config(compiled, programs, cluster):
    metadata, attributes = compiled.metadata, []
    if getattr(metadata, "launch_cooperative_grid", False):
        attributes.append((_COOPERATIVE, 1))
    if cluster > 1:
        attributes.append((_CLUSTER_DIMENSION, cluster, 1, 1))
    memory = (_Attribute * len(attributes))()
    for attribute, (kind, *values) in zip(memory, attributes, strict=True):
        attribute.kind, attribute.value[: len(values)] = kind, values
    sizes = programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared
    return _Config(sizes, None, memory, len(attributes))


class Call:
    """The parameter memory of a launch, and what CUDA is given for it.

    `arguments`: a number of each parameter; of a pointer anything; of a matrix its shape.
    """

    def __init__(self, kernel, arguments):
        self.launch, self.function = _driver().cuLaunchKernelEx, kernel.function
        self.config = _Config.from_buffer_copy(kernel.config)
        self.attributes = kernel.config  # the copy points to its memory
        self.reference = ctypes.byref(self.config)
        layout, values, places, size = "<", [], [], 0
        self.slots, matrices = {}, []  # of pointers: in `places`
        for name, kind in kernel.parameters:
            unit = 64 if kind == _DESCRIPTOR[0] else struct.calcsize("<" + kind)
            layout += f"{-size % unit}x{kind}"
            size += -size % unit
            if kind == _DESCRIPTOR[0]:
                matrices.append((name, size))
                places += [size + part for part in (0, 128, 132, 136, 144)]
                rows, columns = arguments[name]
                values.append(bytes(128) + struct.pack("<iiqq", rows, columns, columns, 1))
            elif kind == _POINTER[0]:
                self.slots[name] = len(places)
                places.append(size)
                values.append(0)
            else:
                places.append(size)
                values.append(arguments[name])
            size += struct.calcsize("<" + kind)
        own = (size + 7) // 8 * 8  # Triton's own two
        self.memory = ctypes.create_string_buffer(own + 16 + 64)
        offset = -ctypes.addressof(self.memory) % 64
        struct.pack_into(layout, self.memory, offset, *values)
        start = ctypes.addressof(self.memory) + offset
        places = [start + place for place in (*places, own, own + 8)]
        self.places = (ctypes.c_void_p * len(places))(*places)
        self.descriptors = {
            name: Descriptor(start + place, arguments[name], tile)
            for (name, place), tile in zip(matrices, kernel.tiles, strict=True)
        }

    def read_from(self, name, address):
        """Has a pointer's value read from there at every launch."""
        self.places[self.slots[name]] = address

    def __call__(self):
        error = self.launch(self.reference, self.function, self.places, None)
        if error == _NO_CONTEXT:
            torch.cuda.set_device(torch.cuda.current_device())
            error = self.launch(self.reference, self.function, self.places, None)
        if error:
            raise RuntimeError(f"A Triton kernel could not be launched: {_message(error)}.")


class Descriptor:
    """A TMA descriptor of a matrix (rows, columns) of bfloat16, in parameter memory."""

    def __init__(self, place, shape, tile):
        (rows, columns), block = shape, tile["block_size"]
        self.shape, self.address, self.encode = shape, None, _driver().cuTensorMapEncodeTiled
        self.given = [
            place, _BFLOAT16, 2, None, (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(2 * columns), (ctypes.c_uint32 * 2)(block[1], block[0]),
            (ctypes.c_uint32 * 2)(1, 1), 0, tile["swizzle"], _L2_128_BYTES, 0,
        ]  # fmt: skip

    def write(self, address):
        if address == self.address:
            return
        self.given[3] = self.address = address
        if error := self.encode(*self.given):
            self.address = None
            raise RuntimeError(
                f"CUDA makes no descriptor of a matrix {tuple(self.shape)}: {_message(error)}."
            )


@functools.cache
def _driver():
    driver = ctypes.CDLL("libcuda.so.1")
    word, address = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernelEx.argtypes = [address] * 4
    driver.cuTensorMapEncodeTiled.argtypes = [
        address, ctypes.c_int, word, address, *[address] * 4, *[ctypes.c_int] * 4,
    ]  # fmt: skip
    return driver


def _message(error):
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(error, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA's error {error}"
