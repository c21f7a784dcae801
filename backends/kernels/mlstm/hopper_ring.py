"""Of hopper_intra_chunk.py: who does what where, and the warp that has tiles copied."""

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


@gluon.jit
def work_item(
    i, turn, items, H, NC, L: gl.constexpr, LC: gl.constexpr, NZ: gl.constexpr,
    ROLE: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    """Chunk, batch and head, first row, columns of item i. Rows alternate between turns, as some
    blocks of them take longer; a grid is a multiple of their number, and of NZ."""
    NR: gl.constexpr = LC // L
    jz = i % NZ
    i = i // NZ
    block, rest = (i + turn) % NR, i // NR
    if SMALL:
        # From where the kernel before ended: part of what that read is still in the L2 cache.
        BH = items // (NR * NZ * NC)
        c, bh = rest // BH, rest % BH
        if ROLE == "dq":
            c = NC - 1 - c
    elif ROLE == "h" or ROLE == "dv":
        c, bh = rest // H % NC, rest // (H * NC) * H + rest % H
    else:
        c, bh = rest % NC, rest // NC
    return c, bh, block * L if ROLE == "dk" or ROLE == "dv" else (NR - 1 - block) * L, jz


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
def load_tiles(
    x_s, y_s, z_s, v_s, n_s, x_full, x_empty, y_full, y_empty, z_full, z_empty,
    x_d, y_d, z_d, s_d, h_d, n_p, col_p, col_rest_p, rho_p, T, H, NC, items,
    ROLE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr, L: gl.constexpr,
    LN: gl.constexpr, LC: gl.constexpr, XS: gl.constexpr, ST: gl.constexpr,
    SMALL: gl.constexpr,
):  # fmt: skip
    REVERSE: gl.constexpr = ROLE == "dk" or ROLE == "dv"
    TURNED: gl.constexpr = ROLE == "dq" or ROLE == "dk"
    kx = 0
    ky = 0
    kz = 0
    turn = 0
    for i in range(gl.program_id(0), items, gl.num_programs(0)):
        c, bh, first, jz = work_item(i, turn, items, H, NC, L, LC, DZ // BZ, ROLE, SMALL)
        turn += 1
        row = (bh // H) * T + c * LC
        at_x, at_z = bh % H * DX, bh % H * DZ + jz * BZ
        slot = kx % XS
        mbarrier.wait(x_empty.index(slot), ((kx // XS) & 1) ^ 1)
        mbarrier.expect(x_full.index(slot), L * DX * 2)
        if ROLE == "h":
            copy_vector(n_s.index(slot), n_p + (bh.to(gl.int64) * (NC + 1) + c) * DX, DX)
            async_copy.mbarrier_arrive(x_full.index(slot), increment_count=False)
        tma_load(x_d, [row + first, at_x], x_full.index(slot), x_s.index(slot))
        kx += 1
        state = (bh * (NC if REVERSE else NC + 1) + c) * (DZ if TURNED else DX)
        for s in gl.static_range(DX // LN):
            slot = kz % ST
            mbarrier.wait(z_empty.index(slot), ((kz // ST) & 1) ^ 1)
            mbarrier.expect(z_full.index(slot), LN * BZ * 2)
            if TURNED:
                to = transposed(z_s.index(slot), DZ, LN)
                tma_load(s_d, [state, s * LN], z_full.index(slot), to)
            else:
                tma_load(s_d, [state + s * LN, jz * BZ], z_full.index(slot), z_s.index(slot))
            kz += 1
        if ROLE == "dq":
            for s in gl.static_range(L // LN):
                slot = ky % ST
                mbarrier.wait(y_empty.index(slot), ((ky // ST) & 1) ^ 1)
                mbarrier.expect(y_full.index(slot), LN * DX * 2)
                async_copy.mbarrier_arrive(y_full.index(slot), increment_count=False)
                tma_load(h_d, [row + first + s * LN, at_x], y_full.index(slot), y_s.index(slot))
                ky += 1
        o_vec = (bh.to(gl.int64) * NC + c) * LC
        for j in range(first if REVERSE else 0, LC if REVERSE else first + L, LN):
            slot = ky % ST
            mbarrier.wait(y_empty.index(slot), ((ky // ST) & 1) ^ 1)
            mbarrier.expect(y_full.index(slot), LN * DX * 2)
            copy_vector(v_s.index(slot * 3), col_p + o_vec + j, LN)
            copy_vector(v_s.index(slot * 3 + 1), col_rest_p + o_vec + j, LN)
            if ROLE == "dk":
                copy_vector(v_s.index(slot * 3 + 2), rho_p + o_vec + j, LN)
            async_copy.mbarrier_arrive(y_full.index(slot), increment_count=False)
            tma_load(y_d, [row + j, at_x], y_full.index(slot), y_s.index(slot))
            ky += 1
            slot = kz % ST
            mbarrier.wait(z_empty.index(slot), ((kz // ST) & 1) ^ 1)
            mbarrier.expect(z_full.index(slot), LN * BZ * 2)
            tma_load(z_d, [row + j, at_z], z_full.index(slot), z_s.index(slot))
            kz += 1
    async_copy.wait_group(0)


@gluon.jit
def store_rows(out_s, out_d, part, row, col):
    tma.store_wait(0)  # what was here before has been read
    thread_barrier()
    out_s.store(part.to(gl.bfloat16))
    fence_async_shared()
    thread_barrier()
    tma_store(out_d, [row, col], out_s)
