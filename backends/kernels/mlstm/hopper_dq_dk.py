"""The mLSTM's gradients of q and k in one kernel on NVIDIA's Hopper, in Gluon: for small heads, a
chunk of which fits into shared memory.

`hopper_intra_chunk` reads q, k, v and dh for dq, and all of them again for dk. Here a thread block
reads a chunk's tiles once and computes dh . v for all pairs of steps: dP. With the pairs' weights
and with `rho`, which the normaliser's gradient adds, dP is multiplied by k for dq and, transposed,
by q for dk. One warp loads tiles, those of the next chunk as soon as this chunk has released the
memory. The products of dh and v all come first, so that their memory is released early. Names as
in intra_chunk.py.
"""

from collections import namedtuple

from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import LOG2_E, exp2, rounded
from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    copy_vector,
    fill,
    fill_slot,
    init_slot,
    new_ring,
    release,
    release_slot,
    thread_barrier,
    tma_load,
    tma_store,
    transposed,
    wait,
    wait_slot,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Of the ring of vectors: row and column exponents (whole, rest), the halves of rho, n, dn's halves.
_ROW = gl.constexpr(0)
_COL = gl.constexpr(2)
_RHO = gl.constexpr(4)
_N = gl.constexpr(6)
_DN = gl.constexpr(7)
_VECTORS = gl.constexpr(8)


# dh [AHEAD, L, V]; v [L, V]; q, k [L, K]; C, dC [K, V]; the ring's vectors [AHEAD _VECTORS, L].
Tiles = namedtuple("Tiles", "dh v q k C dC vectors")
# Of dh and the vectors (AHEAD slots); one slot each of v, of C and dC, of q and k.
Rings = namedtuple("Rings", "dh v states qk")
# Descriptors of what is loaded into the tiles of these names.
Matrices = namedtuple("Matrices", "dh v q k C dC")


@gluon.jit
def _chunk_and_head(i, items, NC):
    """Chunk, batch and head of item i. The order starts where the kernel before ended: part of
    what that kernel read is still in the L2 cache."""
    BH = items // NC
    return i // BH, i % BH


@gluon.jit
def _pairs(p, vectors_s, at_v, rho_row, row, row_rest, FIRST: gl.constexpr, L: gl.constexpr):
    """dS of all rows and 64 columns [L, 64], from their dh . v."""
    by_row: gl.constexpr = gl.SliceLayout(1, p.type.layout)
    by_col: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    rows = gl.arange(0, L, by_row)
    cols = FIRST + gl.arange(0, 64, by_col)
    p += rho_row[:, None]
    # Whole numbers are added before anything rounds.
    col = vectors_s.index(at_v + _COL).slice(FIRST, 64).load(by_col)
    col_rest = vectors_s.index(at_v + _COL + 1).slice(FIRST, 64).load(by_col)
    rest = row_rest[:, None] + (col_rest * LOG2_E)[None, :]
    p *= exp2((row[:, None] + col[None, :]) * LOG2_E + rest)
    return gl.where(rows[:, None] >= cols[None, :], p, 0.0)


@gluon.jit
def _products_of_dh_and_v(dh, tiles, rings, phase):
    """dh v^T in halves of 64 columns [L, K], dh C^T [L, K] and v dC^T [L, K], on their way."""
    L: gl.constexpr = tiles.q.shape[0]
    K: gl.constexpr = tiles.q.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, K, 16])
    zero = gl.zeros([L, K], gl.float32, mma)
    wait_slot(rings.v, 0, phase)
    vt = tiles.v.slice(0, 64).permute([1, 0])
    p_0 = warpgroup_mma(dh, vt, zero, use_acc=False, is_async=True)
    vt = tiles.v.slice(64, 64).permute([1, 0])
    p_1 = warpgroup_mma(dh, vt, zero, use_acc=False, is_async=True)
    wait_slot(rings.states, 0, phase)
    dq = warpgroup_mma(dh, tiles.C.permute([1, 0]), zero, use_acc=False, is_async=True)
    dk = warpgroup_mma(tiles.v, tiles.dC.permute([1, 0]), zero, use_acc=False, is_async=True)
    return p_0, p_1, dq, dk


@gluon.jit
def compute(
    tiles, p_s, rings, dq_d, dk_d, q_dot_p, k_dot_p, dn_p, dn_first_p, m_p, chunk_p, T, H, NC,
    scale, items,
):  # fmt: skip
    L: gl.constexpr = tiles.q.shape[0]
    K: gl.constexpr = tiles.q.shape[1]
    AHEAD: gl.constexpr = tiles.dh.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, K, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_col: gl.constexpr = gl.SliceLayout(0, mma)
    rows = gl.arange(0, L, by_row)
    cols = gl.arange(0, K, by_col)
    vectors_s = tiles.vectors
    turn = 0
    for i in range(gl.program_id(0), items, gl.num_programs(0)):
        c, bh = _chunk_and_head(i, items, NC)
        long = bh.to(gl.int64)
        o_vec = (long * NC + c) * L
        border = gl.load(m_p + long * (NC + 1) + c)
        leaving = gl.load(m_p + long * (NC + 1) + c + 1)
        out_whole = gl.load(chunk_p + (long * NC + c) * 4)
        out_rest = gl.load(chunk_p + (long * NC + c) * 4 + 1)
        if dn_first_p is not None:
            if c == 0:
                at = dn_p + (long * (NC + 1) + NC) * (2 * K) + cols
                gl.store(dn_first_p + long * K + cols, gl.load(at) + gl.load(at + K))

        slot, phase = turn % AHEAD, turn & 1  # of dh; of the rings of one slot
        dh, at_v = tiles.dh.index(slot), slot * _VECTORS
        wait(rings.dh, turn)
        p_0, p_1, dq, dk = _products_of_dh_and_v(dh, tiles, rings, phase)
        row = vectors_s.index(at_v + _ROW).load(by_row)
        row_rest = vectors_s.index(at_v + _ROW + 1).load(by_row)
        col = vectors_s.index(at_v + _COL).load(by_row)
        col_rest = vectors_s.index(at_v + _COL + 1).load(by_row)
        rho_row = vectors_s.index(at_v + _RHO).load(by_row)
        rho_row += vectors_s.index(at_v + _RHO + 1).load(by_row)
        w_row = gl.exp((row + rounded(border)) + row_rest)
        w_col = gl.exp((col + (out_whole - rounded(leaving))) + (col_rest + out_rest))
        row_2 = row_rest * LOG2_E
        tma.store_wait(0)  # the results before have been read
        thread_barrier()
        p_0, p_1, dq, dk = warpgroup_mma_wait(3, deps=[p_0, p_1, dq, dk])
        p_0 = _pairs(p_0, vectors_s, at_v, rho_row, row, row_2, 0, L)
        p_s.index(0).store(p_0.to(gl.bfloat16))
        p_1, dq, dk = warpgroup_mma_wait(2, deps=[p_1, dq, dk])
        p_1 = _pairs(p_1, vectors_s, at_v, rho_row, row, row_2, 64, L)
        p_s.index(1).store(p_1.to(gl.bfloat16))
        dq, dk = warpgroup_mma_wait(0, deps=[dq, dk])
        release_slot(rings.v, 0)
        release_slot(rings.states, 0)
        # Over the borders.
        n = vectors_s.index(at_v + _N).slice(0, K).load(by_col)
        dq = dq * w_row[:, None] + (w_row * rho_row)[:, None] * n[None, :]
        dn = vectors_s.index(at_v + _DN)
        dn = dn.slice(0, K).load(by_col) + dn.slice(K, K).load(by_col)
        dk = dk * w_col[:, None] + w_col[:, None] * dn[None, :]
        release(rings.dh, turn)
        # Within the chunk.
        fence_async_shared()
        thread_barrier()
        wait_slot(rings.qk, 0, phase)
        whole = transposed(p_s, L, L)
        dq = warpgroup_mma(whole, tiles.k, dq, is_async=True)
        dk = warpgroup_mma(whole.permute([1, 0]), tiles.q, dk, is_async=True)
        q = tiles.q.load(mma)
        k = tiles.k.load(mma)
        dq, dk = warpgroup_mma_wait(0, deps=[dq, dk])
        release_slot(rings.qk, 0)
        dq *= scale
        dk *= scale
        gl.store(q_dot_p + o_vec + rows, gl.sum(q.to(gl.float32) * dq, 1))
        gl.store(k_dot_p + o_vec + rows, gl.sum(k.to(gl.float32) * dk, 1))
        thread_barrier()  # all warps' products have read the pairs
        p_s.index(0).store(dq.to(gl.bfloat16))
        p_s.index(1).store(dk.to(gl.bfloat16))
        fence_async_shared()
        thread_barrier()
        tma_store(dq_d, [bh // H * T + c * L, bh % H * K], p_s.index(0))
        tma_store(dk_d, [bh // H * T + c * L, bh % H * K], p_s.index(1))
        turn += 1
    tma.store_wait(0)


@gluon.jit
def load_tiles(
    tiles, rings, matrices, row_p, row_rest_p, col_p, col_rest_p, rho_p, n_p, dn_p, T, H, NC, items,
):  # fmt: skip
    L: gl.constexpr = tiles.v.shape[0]
    V: gl.constexpr = tiles.v.shape[1]
    K: gl.constexpr = tiles.q.shape[1]
    AHEAD: gl.constexpr = tiles.dh.shape[0]
    vectors_s = tiles.vectors
    turn = 0
    for i in range(gl.program_id(0), items, gl.num_programs(0)):
        c, bh = _chunk_and_head(i, items, NC)
        long = bh.to(gl.int64)
        row = bh // H * T + c * L
        o_vec = (long * NC + c) * L
        slot, free = turn % AHEAD, (turn & 1) ^ 1
        _, full = fill(rings.dh, turn, L * V * 2)
        at_v = slot * _VECTORS
        tma_load(matrices.dh, [row, bh % H * V], full, tiles.dh.index(slot))
        copy_vector(vectors_s.index(at_v + _ROW), row_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _ROW + 1), row_rest_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _COL), col_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _COL + 1), col_rest_p + o_vec, L)
        o_half = (long * 2 * NC + c) * L
        copy_vector(vectors_s.index(at_v + _RHO), rho_p + o_half, L)
        copy_vector(vectors_s.index(at_v + _RHO + 1), rho_p + o_half + NC * L, L)
        copy_vector(vectors_s.index(at_v + _N).slice(0, K), n_p + (long * (NC + 1) + c) * K, K)
        copy_vector(vectors_s.index(at_v + _DN), dn_p + (long * (NC + 1) + c) * (2 * K), 2 * K)
        async_copy.mbarrier_arrive(full, increment_count=False)
        full = fill_slot(rings.v, 0, free, L * V * 2)
        tma_load(matrices.v, [row, bh % H * V], full, tiles.v)
        full = fill_slot(rings.states, 0, free, K * V * 4)
        tma_load(matrices.C, [(bh * (NC + 1) + c) * K, 0], full, tiles.C)
        tma_load(matrices.dC, [(bh * NC + c) * K, 0], full, tiles.dC)
        full = fill_slot(rings.qk, 0, free, L * K * 4)
        tma_load(matrices.k, [row, bh % H * K], full, tiles.k)
        tma_load(matrices.q, [row, bh % H * K], full, tiles.q)
        turn += 1
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["T", "H", "NC", "items"])
def hopper_dq_dk(
    dh_d, v_d, q_d, k_d, C_d, dC_d, dq_d, dk_d, q_dot_p, k_dot_p, n_p, dn_p, dn_first_p, rho_p,
    m_p, chunk_p, row_p, row_rest_p, col_p, col_rest_p, T, H, NC, scale, items,
    K: gl.constexpr, V: gl.constexpr, L: gl.constexpr, AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq, dk; of each row q . dq and k . dk. `items`: chunks, in all. C, n: of the forward pass;
    dC, dn, rho: from `hopper_fused`, the last two in halves, each of a half of the values; dn's
    last, behind those of the chunks, is the first state's. L, a chunk, is 2 K. AHEAD: so many
    chunks' dh are here."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = Tiles(
        gl.allocate_shared_memory(gl.bfloat16, [AHEAD, L, V], dh_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [L, V], v_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [L, K], q_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [L, K], k_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [K, V], C_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [K, V], dC_d.layout),
        gl.allocate_shared_memory(gl.float32, [AHEAD * _VECTORS, L], flat),
    )
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, L, K], dq_d.layout)
    rings = Rings(new_ring(AHEAD), new_ring(1), new_ring(1), new_ring(1))
    for s in gl.static_range(AHEAD):
        init_slot(rings.dh, s, 33, 1)
    init_slot(rings.v, 0, 1, 1)
    init_slot(rings.states, 0, 1, 1)
    init_slot(rings.qk, 0, 1, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (
                tiles, p_s, rings, dq_d, dk_d, q_dot_p, k_dot_p, dn_p, dn_first_p, m_p, chunk_p,
                T, H, NC, scale, items,
            )),
            (load_tiles, (
                tiles, rings, Matrices(dh_d, v_d, q_d, k_d, C_d, dC_d), row_p, row_rest_p,
                col_p, col_rest_p, rho_p, n_p, dn_p, T, H, NC, items,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip
