"""Of hopper_intra_chunk.py: the order of work, and the warp that loads tiles."""

from collections import namedtuple

from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    copy_vector,
    fill,
    tma_load,
    transposed,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

# Of each ring the slots: x [XS, L, DX], y [ST, LN, DX], z (and S) [ST, LN, BZ]. The vectors of y,
# column exponents, whole and rest, and rho, are [3 ST, LN]; for "h" n is [XS, DX].
Tiles = namedtuple("Tiles", "x y z v n")
Rings = namedtuple("Rings", "x y z")
# Descriptors of what is loaded into tiles, h into those of y.
Matrices = namedtuple("Matrices", "x y z S h")


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
def load_tiles(
    tiles, rings, matrices, n_p, col_p, col_rest_p, rho_p, T, H, NC, items,
    ROLE: gl.constexpr, DZ: gl.constexpr, LC: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = tiles.x.shape[1]
    DX: gl.constexpr = tiles.x.shape[2]
    LN: gl.constexpr = tiles.y.shape[1]
    BZ: gl.constexpr = tiles.z.shape[2]
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
        slot, full = fill(rings.x, kx, L * DX * 2)
        if ROLE == "h":
            copy_vector(tiles.n.index(slot), n_p + (bh.to(gl.int64) * (NC + 1) + c) * DX, DX)
            async_copy.mbarrier_arrive(full, increment_count=False)
        tma_load(matrices.x, [row + first, at_x], full, tiles.x.index(slot))
        kx += 1
        state = (bh * (NC if REVERSE else NC + 1) + c) * (DZ if TURNED else DX)
        for s in gl.static_range(DX // LN):
            slot, full = fill(rings.z, kz, LN * BZ * 2)
            if TURNED:
                to = transposed(tiles.z.index(slot), DZ, LN)
                tma_load(matrices.S, [state, s * LN], full, to)
            else:
                tma_load(matrices.S, [state + s * LN, jz * BZ], full, tiles.z.index(slot))
            kz += 1
        if ROLE == "dq":
            for s in gl.static_range(L // LN):
                slot, full = fill(rings.y, ky, LN * DX * 2)
                async_copy.mbarrier_arrive(full, increment_count=False)
                tma_load(matrices.h, [row + first + s * LN, at_x], full, tiles.y.index(slot))
                ky += 1
        o_vec = (bh.to(gl.int64) * NC + c) * LC
        for j in range(first if REVERSE else 0, LC if REVERSE else first + L, LN):
            slot, full = fill(rings.y, ky, LN * DX * 2)
            copy_vector(tiles.v.index(slot * 3), col_p + o_vec + j, LN)
            copy_vector(tiles.v.index(slot * 3 + 1), col_rest_p + o_vec + j, LN)
            if ROLE == "dk":
                copy_vector(tiles.v.index(slot * 3 + 2), rho_p + o_vec + j, LN)
            async_copy.mbarrier_arrive(full, increment_count=False)
            tma_load(matrices.y, [row + j, at_x], full, tiles.y.index(slot))
            ky += 1
            slot, full = fill(rings.z, kz, LN * BZ * 2)
            tma_load(matrices.z, [row + j, at_z], full, tiles.z.index(slot))
            kz += 1
    async_copy.wait_group(0)
