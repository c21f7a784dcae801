"""The mLSTM's gradients of q and k in one on NVIDIA's Hopper, in Gluon: for small heads, a chunk of
which is on chip whole.

`hopper_intra_chunk` reads q, k, v and dh for dq, and all of them again for dk. Here a program has a
chunk's tiles once, and dh . v for all of its pairs: dP, which with the pairs' weights and with
`rho`, what the normaliser's gradient adds, is multiplied with k for dq and, turned, with q for dk.
One warp has tiles copied, those of the next chunk as soon as this chunk has no more use for the
memory. The products that multiply dh and v all come first, so that these go early. Names as in
intra_chunk.py.
"""

from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import LOG2_E, exp2, rounded
from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    copy_vector,
    thread_barrier,
    tma_load,
    tma_store,
    transposed,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
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


@gluon.jit
def _chunk_and_head(i, items, NC):
    """Chunk, batch and head of item i: from where the kernel before ended, as part of what that
    read is still in the L2 cache."""
    BH = items // NC
    return i // BH, i % BH


@gluon.jit
def _pairs(p, vectors_s, at_v, rho_row, row, row_rest, FIRST: gl.constexpr, L: gl.constexpr):
    """dS of all rows and 64 columns, from what dh . v is of them (after it has come)."""
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
def compute(
    dh_s, v_s, q_s, k_s, C_s, dC_s, p_s, vectors_s, dh_full, dh_empty, v_full, v_empty, s_full,
    s_empty, qk_full, qk_empty, dq_d, dk_d, q_dot_p, k_dot_p, dn_p, dn_first_p, m_p, chunk_p, T, H,
    NC, scale, items, K: gl.constexpr, V: gl.constexpr, L: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, K, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_col: gl.constexpr = gl.SliceLayout(0, mma)
    rows = gl.arange(0, L, by_row)
    cols = gl.arange(0, K, by_col)
    zero = gl.zeros([L, K], gl.float32, mma)
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

        slot = turn % AHEAD
        phase = turn & 1
        dh = dh_s.index(slot)
        at_v = slot * _VECTORS
        mbarrier.wait(dh_full.index(slot), (turn // AHEAD) & 1)
        mbarrier.wait(v_full.index(0), phase)
        p_0 = warpgroup_mma(
            dh, v_s.slice(0, 64).permute([1, 0]), zero, use_acc=False, is_async=True
        )  # fmt: skip
        p_1 = warpgroup_mma(
            dh, v_s.slice(64, 64).permute([1, 0]), zero, use_acc=False, is_async=True
        )  # fmt: skip
        mbarrier.wait(s_full.index(0), phase)
        dq = warpgroup_mma(dh, C_s.permute([1, 0]), zero, use_acc=False, is_async=True)
        dk = warpgroup_mma(v_s, dC_s.permute([1, 0]), zero, use_acc=False, is_async=True)
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
        mbarrier.arrive(v_empty.index(0), count=1)
        mbarrier.arrive(s_empty.index(0), count=1)
        # Over the borders.
        n = vectors_s.index(at_v + _N).slice(0, K).load(by_col)
        dq = dq * w_row[:, None] + (w_row * rho_row)[:, None] * n[None, :]
        dn = vectors_s.index(at_v + _DN)
        dn = dn.slice(0, K).load(by_col) + dn.slice(K, K).load(by_col)
        dk = dk * w_col[:, None] + w_col[:, None] * dn[None, :]
        mbarrier.arrive(dh_empty.index(slot), count=1)
        # Within the chunk.
        fence_async_shared()
        thread_barrier()
        mbarrier.wait(qk_full.index(0), phase)
        whole = transposed(p_s, L, L)
        dq = warpgroup_mma(whole, k_s, dq, is_async=True)
        dk = warpgroup_mma(whole.permute([1, 0]), q_s, dk, is_async=True)
        q = q_s.load(mma)
        k = k_s.load(mma)
        dq, dk = warpgroup_mma_wait(0, deps=[dq, dk])
        mbarrier.arrive(qk_empty.index(0), count=1)
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
    dh_s, v_s, q_s, k_s, C_s, dC_s, vectors_s, dh_full, dh_empty, v_full, v_empty, s_full, s_empty,
    qk_full, qk_empty, dh_d, v_d, q_d, k_d, C_d, dC_d, row_p, row_rest_p, col_p, col_rest_p, rho_p,
    n_p, dn_p, T, H, NC, items,
    K: gl.constexpr, V: gl.constexpr, L: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    turn = 0
    for i in range(gl.program_id(0), items, gl.num_programs(0)):
        c, bh = _chunk_and_head(i, items, NC)
        long = bh.to(gl.int64)
        row = bh // H * T + c * L
        o_vec = (long * NC + c) * L
        slot = turn % AHEAD
        at_v = slot * _VECTORS
        free = (turn & 1) ^ 1
        mbarrier.wait(dh_empty.index(slot), ((turn // AHEAD) & 1) ^ 1)
        mbarrier.expect(dh_full.index(slot), L * V * 2)
        tma_load(dh_d, [row, bh % H * V], dh_full.index(slot), dh_s.index(slot))
        copy_vector(vectors_s.index(at_v + _ROW), row_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _ROW + 1), row_rest_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _COL), col_p + o_vec, L)
        copy_vector(vectors_s.index(at_v + _COL + 1), col_rest_p + o_vec, L)
        o_half = (long * 2 * NC + c) * L
        copy_vector(vectors_s.index(at_v + _RHO), rho_p + o_half, L)
        copy_vector(vectors_s.index(at_v + _RHO + 1), rho_p + o_half + NC * L, L)
        copy_vector(vectors_s.index(at_v + _N).slice(0, K), n_p + (long * (NC + 1) + c) * K, K)
        copy_vector(vectors_s.index(at_v + _DN), dn_p + (long * (NC + 1) + c) * (2 * K), 2 * K)
        async_copy.mbarrier_arrive(dh_full.index(slot), increment_count=False)
        mbarrier.wait(v_empty.index(0), free)
        mbarrier.expect(v_full.index(0), L * V * 2)
        tma_load(v_d, [row, bh % H * V], v_full.index(0), v_s)
        mbarrier.wait(s_empty.index(0), free)
        mbarrier.expect(s_full.index(0), K * V * 4)
        tma_load(C_d, [(bh * (NC + 1) + c) * K, 0], s_full.index(0), C_s)
        tma_load(dC_d, [(bh * NC + c) * K, 0], s_full.index(0), dC_s)
        mbarrier.wait(qk_empty.index(0), free)
        mbarrier.expect(qk_full.index(0), L * K * 4)
        tma_load(k_d, [row, bh % H * K], qk_full.index(0), k_s)
        tma_load(q_d, [row, bh % H * K], qk_full.index(0), q_s)
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
    dh_s = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, L, V], dh_d.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [L, V], v_d.layout)
    q_s = gl.allocate_shared_memory(gl.bfloat16, [L, K], q_d.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [L, K], k_d.layout)
    C_s = gl.allocate_shared_memory(gl.bfloat16, [K, V], C_d.layout)
    dC_s = gl.allocate_shared_memory(gl.bfloat16, [K, V], dC_d.layout)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, L, K], dq_d.layout)
    vectors_s = gl.allocate_shared_memory(gl.float32, [AHEAD * _VECTORS, L], flat)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    dh_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], layout)
    dh_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    s_full = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    s_empty = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    qk_full = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    qk_empty = gl.allocate_shared_memory(gl.int64, [1, 1], layout)
    for s in gl.static_range(AHEAD):
        mbarrier.init(dh_full.index(s), count=33)  # the tile, and each thread's parts of vectors
        mbarrier.init(dh_empty.index(s), count=1)
    mbarrier.init(v_full.index(0), count=1)
    mbarrier.init(v_empty.index(0), count=1)
    mbarrier.init(s_full.index(0), count=1)
    mbarrier.init(s_empty.index(0), count=1)
    mbarrier.init(qk_full.index(0), count=1)
    mbarrier.init(qk_empty.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (
                dh_s, v_s, q_s, k_s, C_s, dC_s, p_s, vectors_s, dh_full, dh_empty, v_full, v_empty,
                s_full, s_empty, qk_full, qk_empty, dq_d, dk_d, q_dot_p, k_dot_p, dn_p, dn_first_p,
                m_p, chunk_p, T, H, NC, scale, items, K, V, L, AHEAD,
            )),
            (load_tiles, (
                dh_s, v_s, q_s, k_s, C_s, dC_s, vectors_s, dh_full, dh_empty, v_full, v_empty,
                s_full, s_empty, qk_full, qk_empty, dh_d, v_d, q_d, k_d, C_d, dC_d, row_p,
                row_rest_p, col_p, col_rest_p, rho_p, n_p, dn_p, T, H, NC, items, K, V, L, AHEAD,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip
