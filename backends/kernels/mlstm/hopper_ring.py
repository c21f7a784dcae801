"""Rings of tiles in shared memory, which one warp loads by TMA while others compute.

Entry k of a ring is in slot k % slots. Whoever fills it waits until the slot is free, that is until
all readers of the entry before have released it; whoever reads it waits until it has arrived. Both
count the entries for themselves.
"""

from collections import namedtuple

from keras_xlstm.backends.kernels import load_triton  # noqa: F401  Triton is imported there first
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
)

# Names that changed after Triton 3.6.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


# Barriers, a pair [slots, 1] for each slot. The tiles are elsewhere: several may share a ring.
Ring = namedtuple("Ring", "full empty")


@gluon.jit
def new_ring(SLOTS: gl.constexpr):
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout)
    return Ring(full, gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout))


@gluon.jit
def init_slot(ring, slot, FILLERS: gl.constexpr, READERS: gl.constexpr):
    """FILLERS: the arrivals that make a slot full; with `copy_vector` each lane's, and TMA's."""
    mbarrier.init(ring.full.index(slot), count=FILLERS)
    mbarrier.init(ring.empty.index(slot), count=READERS)


@gluon.jit
def wait_slot(ring, slot, phase):
    """Waits until what fills the slot has arrived; phase: 0 the first time, 1 the second, 0 …"""
    mbarrier.wait(ring.full.index(slot), phase)


@gluon.jit
def wait(ring, k):
    """Waits until entry k has arrived, and returns its slot."""
    SLOTS: gl.constexpr = ring.full.shape[0]
    slot = k % SLOTS
    mbarrier.wait(ring.full.index(slot), (k // SLOTS) & 1)
    return slot


@gluon.jit
def release_slot(ring, slot):
    """This reader is done with what is in the slot."""
    mbarrier.arrive(ring.empty.index(slot), count=1)


@gluon.jit
def release(ring, k):
    """This reader is done with entry k."""
    SLOTS: gl.constexpr = ring.full.shape[0]
    release_slot(ring, k % SLOTS)


@gluon.jit
def fill_slot(ring, slot, free, BYTES: gl.constexpr):
    """Waits until the slot is free; returns the barrier that BYTES arrive at. `free`: phase ^ 1."""
    mbarrier.wait(ring.empty.index(slot), free)
    full = ring.full.index(slot)
    mbarrier.expect(full, BYTES)
    return full


@gluon.jit
def fill(ring, k, BYTES: gl.constexpr):
    """Waits until the slot of entry k is free; returns it and the barrier that BYTES arrive at."""
    SLOTS: gl.constexpr = ring.full.shape[0]
    slot = k % SLOTS
    mbarrier.wait(ring.empty.index(slot), ((k // SLOTS) & 1) ^ 1)
    full = ring.full.index(slot)
    mbarrier.expect(full, BYTES)
    return slot, full


@gluon.jit
def wait_free_slot(ring, slot, free):
    """For threads that fill a slot themselves."""
    mbarrier.wait(ring.empty.index(slot), free)


@gluon.jit
def post_slot(ring, slot):
    """What these threads wrote to the slot is there."""
    mbarrier.arrive(ring.full.index(slot), count=1)


@gluon.jit
def transposed(tile, ROWS: gl.constexpr, COLS: gl.constexpr):
    """The memory of a tile as one of [ROWS, COLS]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], gl.bfloat16)
    if _NAMED:
        tile = tile.reinterpret(gl.bfloat16, [ROWS, COLS], layout)
    else:
        tile = tile._reinterpret(gl.bfloat16, [ROWS, COLS], layout)
    return tile


@gluon.jit
def copy_vector(to, p, N: gl.constexpr):
    o = gl.arange(0, N, gl.BlockedLayout([N // 32], [32], [1], [0]))
    _copy_async(to, p + o)


@gluon.jit
def store_rows(out_s, out_d, part, row, col):
    tma.store_wait(0)  # what was here before has been read
    thread_barrier()
    out_s.store(part.to(gl.bfloat16))
    fence_async_shared()
    thread_barrier()
    tma_store(out_d, [row, col], out_s)
