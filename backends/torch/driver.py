"""Launches of Triton's compiled kernels by the CUDA driver itself.

Triton's own launcher takes longer in Python than a small sequence's kernel runs, above all where
it makes TMA descriptors, anew at every launch.
"""

import ctypes
import functools
import operator
import re
import struct
import threading

import torch

# Of a parameter, by its type: as `struct` packs it, and its bytes.
_NUMBERS = {"i32": ("i", 4), "i64": ("q", 8), "fp32": ("f", 4)}
_POINTER, _DESCRIPTOR = ("Q", 8), ("152s", 128)  # a descriptor's shape and strides lie behind it
_BEHIND = (("i", 4), ("i", 4), ("q", 8), ("q", 8))
_BFLOAT16, _L2_128_BYTES = 9, 2  # of CUDA's CUtensorMapDataType, CUtensorMapL2promotion
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4  # of its CUlaunchAttributeID
_NO_CONTEXT = 201  # this thread has not used the device yet


def launcher(compiled, programs, cluster=1):
    """`function(stream, arguments)` for what Triton compiled, or None where only Triton's own
    launcher will do. Arguments are all of a kernel that are no constants of the call, in order:
    tensors, or addresses in place of all of them, numbers, None, `TensorDescriptor`s that are used
    again. `cluster`: so many programs hear each other.
    """
    metadata = compiled.metadata
    more = "launch_pdl", "global_scratch_size", "profile_scratch_size"
    more = getattr(metadata, "num_ctas", 1) != 1 or any(getattr(metadata, n, 0) for n in more)
    if torch.version.hip or more:
        return None
    parameters = _parameters(compiled)
    if parameters is None or not isinstance(compiled.function, int):
        return None
    return Launch(compiled, programs, parameters, cluster)


def _parameters(compiled):
    """[(place among arguments, how it is packed)], if the program has just these."""
    found, sizes = [], []
    for place, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        descriptor = kind.startswith("tensordesc")
        known = _POINTER if kind[0] == "*" else _DESCRIPTOR if descriptor else _NUMBERS.get(kind)
        if known is None:
            return None
        found.append((place, known[0]))
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


class Launch:
    """A compiled kernel's launches, one at a time; see `launcher`."""

    def __init__(self, compiled, programs, parameters, cluster):
        self.function = compiled.function
        self.config = _config(compiled, programs, cluster)
        places, self.kinds = zip(*parameters, strict=True)
        self.pick = operator.itemgetter(*places) if len(places) > 1 else lambda a: (a[places[0]],)
        self.pointers = [n for n, kind in enumerate(self.kinds) if kind == "Q"]
        swizzles = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        self.descriptors = [
            (n, next(swizzles)) for n, kind in enumerate(self.kinds) if kind == _DESCRIPTOR[0]
        ]
        self.call = _Call(self)
        # The memory is this launch's: threads take turns.
        self.lock = threading.Lock()

    def __call__(self, stream, arguments):
        values = list(self.pick(arguments))
        for n, meta in self.descriptors:
            values[n] = _encoded(values[n], meta)
        # Tensors or addresses: a call has the one or the other.
        if self.pointers and type(values[self.pointers[0]]) is not int:
            for n in self.pointers:
                values[n] = values[n].data_ptr()
        with self.lock:
            self.call.pack(values)
            self.call.config.stream = stream
            self.call()

    def again(self, arguments):
        """A call of its own with these arguments, which has besides

        pointers: of each (a function that takes the place in memory where it will be, address)
        matrices: of each descriptor (address, where it is in memory, a function that makes that of
            another address)
        """
        call, values = _Call(self), list(self.pick(arguments))
        for n in self.pointers:
            if type(values[n]) is not int:
                values[n] = values[n].data_ptr()
        call.pointers = [(call.moved(n), values[n]) for n in self.pointers]
        call.matrices = []
        for n, meta in self.descriptors:
            descriptor = values[n]
            shape = descriptor.shape
            call.matrices.append(
                (descriptor.base.data_ptr(), call.at[n], functools.partial(_encode, shape, meta))
            )
            values[n] = bytes(128) + _behind(shape)
        call.pack(values)
        return call


class _Call:
    """What CUDA is given for a launch."""

    def __init__(self, launch):
        self.launch, self.function = _driver().cuLaunchKernelEx, launch.function
        self.config = _Config.from_buffer_copy(launch.config)
        self.attributes = launch.config  # the copy points to its memory
        self.reference = ctypes.byref(self.config)
        self._place(launch.kinds)

    def _place(self, kinds):
        """Memory for the parameters' values, each at its alignment, and their addresses."""
        layout, places, size, self.first = "<", [], 0, []
        for kind in kinds:
            unit = 64 if kind == _DESCRIPTOR[0] else struct.calcsize("<" + kind)
            layout += f"{-size % unit}x"
            size += -size % unit
            self.first.append(len(places))
            parts = (0, 128, 132, 136, 144) if kind == _DESCRIPTOR[0] else (0,)
            places += [size + part for part in parts]
            layout += kind
            size += struct.calcsize("<" + kind)
        self.packed = struct.Struct(layout)
        own = (size + 7) // 8 * 8  # Triton's own two
        self.memory = ctypes.create_string_buffer(own + 16 + 64)
        start = ctypes.addressof(self.memory)
        self.offset = -start % 64
        places = [start + self.offset + place for place in (*places, own, own + 8)]
        self.at = [places[n] for n in self.first]
        self.places = (ctypes.c_void_p * len(places))(*places)

    def pack(self, values):
        self.packed.pack_into(self.memory, self.offset, *values)

    def moved(self, n):
        """A function that has parameter n read elsewhere."""
        return functools.partial(self.places.__setitem__, self.first[n])

    def __call__(self):
        error = self.launch(self.reference, self.function, self.places, None)
        if error == _NO_CONTEXT:
            torch.cuda.set_device(torch.cuda.current_device())
            error = self.launch(self.reference, self.function, self.places, None)
        if error:
            raise RuntimeError(f"A Triton kernel could not be launched: {_message(error)}.")


def _encoded(descriptor, meta):
    """What a kernel gets for a TensorDescriptor: CUDA's own, its shape, its strides."""
    found = getattr(descriptor, "_keras_xlstm_encoded", None)
    if found is None:
        shape, address = descriptor.shape, descriptor.base.data_ptr()
        found = _encode(shape, meta, address) + _behind(shape)
        descriptor._keras_xlstm_encoded = found
    return found


def _behind(shape):
    rows, columns = shape
    return struct.pack("<iiqq", rows, columns, columns, 1)


def _encode(shape, meta, address):
    (rows, columns), block = shape, meta["block_size"]
    memory = ctypes.create_string_buffer(192)
    place = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    error = _driver().cuTensorMapEncodeTiled(
        place, _BFLOAT16, 2, address, (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns), (ctypes.c_uint32 * 2)(block[1], block[0]),
        (ctypes.c_uint32 * 2)(1, 1), 0, meta["swizzle"], _L2_128_BYTES, 0,
    )  # fmt: skip
    if error:
        raise RuntimeError(
            f"CUDA makes no descriptor of a matrix {tuple(shape)}: {_message(error)}."
        )
    return ctypes.string_at(place, 128)


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
