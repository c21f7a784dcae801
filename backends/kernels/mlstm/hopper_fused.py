"""States and rows of the mLSTM in one pass on NVIDIA's Hopper, in Gluon.

What `chunk_states` writes at every border (inter_chunk.py) `intra_chunk` reads again, with all of k
and v (in reverse: of q and dh). Where there are heads enough, a program here takes half of a head's
values through all of its steps with the state in registers: forward it writes h, in reverse dv.
Borders are still written once a chunk, for the kernels of the other gradients.

64 steps at a time are a part of a chunk. The state that enters a part within the chunk is over
exp(M), M being the whole number next to the larger of m at the chunk's start and the peak of what
the parts before it add: what is left of a state, and each step's weight in it, are then at most
about 1, as at the borders (`chunks` in gates.py).

Four warps keep the state (`update_state`), twice four take every other part's rows
(`output_rows`), one has tiles copied (`load_tiles`; it and the first are in
hopper_fused_state.py). Tiles pass through a ring, whose entries all of them see in turn.
"""

from keras_xlstm.backends.kernels.mlstm.hopper_fused_state import load_tiles, update_state
from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import LOG2_E, exp2, rounded
from keras_xlstm.backends.kernels.mlstm.hopper_ring import store_rows
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def output_rows(
    x_s, y_s, z_s, h_s, v_s, S_s, n_s, rho_s, out_s, xy_full, xy_empty, z_full, z_empty, s_full,
    s_empty, rho_full, rho_empty, out_d, rho_p, sign_p, parts_p, row_p, row_rest_p, T, H, NC,
    scale, eps, TURN: gl.constexpr, REVERSE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr,
    BZ: gl.constexpr, L: gl.constexpr, LC: gl.constexpr, ST: gl.constexpr, TWO_SUMS: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """The rows of every other part. APART: two sums, added at the end, wait for each other less."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    mma_n: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    by_col: gl.constexpr = gl.SliceLayout(0, mma_p)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_wide: gl.constexpr = gl.SliceLayout(1, wide)
    by_acc: gl.constexpr = gl.SliceLayout(1, mma)
    NZ: gl.constexpr = DZ // BZ
    PARTS: gl.constexpr = LC // L
    part, bh = gl.program_id(0) % NZ, gl.program_id(0) // NZ
    col = bh % H * DZ + part * BZ
    rows = gl.arange(0, L, by_row)
    cols = gl.arange(0, L, by_col)
    parts_p += bh.to(gl.int64) * NC * PARTS * 4 + (1 if REVERSE else 0)
    at = NC * PARTS - 1 - TURN if REVERSE else TURN
    next_first = gl.load(parts_p + at * 4)
    next_second = gl.load(parts_p + at * 4 + (1 if REVERSE else 3))
    k = 0
    for turn in range(0, NC * PARTS // 2):
        for b in gl.static_range(2):
            t = turn * 2 + b
            if REVERSE and b == 0:
                if t % PARTS == 0:  # an entry for `update_state` alone
                    mbarrier.wait(xy_full.index(k % ST), (k // ST) & 1)
                    mbarrier.arrive(xy_empty.index(k % ST), count=1)
                    mbarrier.wait(z_full.index(k % ST), (k // ST) & 1)
                    mbarrier.arrive(z_empty.index(k % ST), count=1)
                    k += 1
            slot = k % ST
            phase = (k // ST) & 1
            k += 1
            mbarrier.wait(xy_full.index(slot), phase)
            if b == TURN:
                at = NC * PARTS - 1 - t if REVERSE else t
                first, second = next_first, next_second
                after = gl.maximum(at - 2, 0) if REVERSE else gl.minimum(at + 2, NC * PARTS - 1)
                next_first = gl.load(parts_p + after * 4)
                next_second = gl.load(parts_p + after * 4 + (1 if REVERSE else 3))
                x = x_s.index(slot)
                if HALVES:
                    mbarrier.wait(z_full.index(slot), phase)
                    z = z_s.index(slot).load(wide).to(gl.float32)
                    dots = gl.sum(z * h_s.index(slot).load(wide).to(gl.float32), 1)
                    rho = -v_s.index(slot * 5 + 4).load(by_wide) * dots
                    mbarrier.wait(rho_empty.index(b), (turn & 1) ^ 1)
                    rho_s.index(b).store(rho)
                    mbarrier.arrive(rho_full.index(b), count=1)
                    o_rho = (bh.to(gl.int64) * NZ + part) * NC * LC + at * L
                    gl.store(rho_p + o_rho + gl.arange(0, L, by_wide), rho)
                p = warpgroup_mma(
                    x, y_s.index(slot).permute([1, 0]), gl.zeros([L, L], gl.float32, mma_p),
                    use_acc=False, is_async=True,
                )  # fmt: skip
                # The weight of what enters.
                row = v_s.index(slot * 5 + 2).load(by_row)
                row_rest = v_s.index(slot * 5 + 3).load(by_row)
                if REVERSE:
                    w = gl.exp((row + first) + (row_rest + second))
                else:
                    row_m = (row + row_rest) + gl.maximum(
                        v_s.index(slot * 5 + 4).load(by_row), second
                    )
                    whole = rounded(row_m)
                    row -= whole
                    w = gl.exp((row + first) + row_rest)
                    least = gl.exp(gl.where(whole > -80.0, -whole, 80.0))
                    more = eps * gl.exp(row_m - whole)
                # Whole numbers are added before anything rounds.
                log_w = row[:, None] + v_s.index(slot * 5).load(by_col)[None, :]
                log_rest = (row_rest * LOG2_E)[:, None]
                log_rest += (v_s.index(slot * 5 + 1).load(by_col) * LOG2_E)[None, :]
                weight = exp2(log_w * LOG2_E + log_rest)
                # The weights as well, lest the compiler move them behind the wait.
                p, weight = warpgroup_mma_wait(0, deps=[p, weight])
                p *= weight
                if REVERSE:
                    p = gl.where(rows[:, None] <= cols[None, :], p, 0.0)
                else:
                    p = gl.where(rows[:, None] >= cols[None, :], p, 0.0)
                if not REVERSE:
                    r = gl.sum(p, 1)
                p = gl.convert_layout(p.to(gl.bfloat16), operand)
                if TWO_SUMS:
                    mbarrier.wait(z_full.index(slot), phase)
                    within = gl.zeros([L, BZ], gl.float32, mma)
                    within = warpgroup_mma(
                        p, z_s.index(slot), within, use_acc=False, is_async=True
                    )  # fmt: skip
                # The state comes last: `update_state` waits for those that read it.
                mbarrier.wait(s_full.index(b), turn & 1)
                acc = gl.zeros([L, BZ], gl.float32, mma)
                acc = warpgroup_mma(x, S_s, acc, use_acc=False, is_async=True)
                if not REVERSE:
                    dots = gl.zeros([L, 32], gl.float32, mma_n)
                    for j in gl.static_range(DX // 32):
                        tile = x.slice(j * 32, 32, dim=1).load(mma_n).to(gl.float32)
                        n = n_s.slice(j * 32, 32).load(gl.SliceLayout(0, mma_n))
                        dots += tile * n[None, :]
                    r += gl.convert_layout(gl.sum(dots, 1), by_row) * w
                if TWO_SUMS:
                    acc, within = warpgroup_mma_wait(0, deps=[acc, within])
                else:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(s_empty.index(b), count=1)
                mbarrier.arrive(xy_empty.index(slot), count=1)
                acc *= gl.convert_layout(w, by_acc)[:, None]
                if TWO_SUMS:
                    acc += within
                else:
                    mbarrier.wait(z_full.index(slot), phase)
                    acc = warpgroup_mma(p, z_s.index(slot), acc, is_async=True)
                if REVERSE:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    acc *= scale
                else:
                    r *= scale
                    d = gl.maximum(gl.abs(r), least) + more
                    if part == 0:
                        o_vec = bh.to(gl.int64) * NC * LC + at * L + rows
                        gl.store(row_p + o_vec, row)
                        gl.store(row_rest_p + o_vec, row_rest - gl.log(d))
                        of_r = gl.where(r > 0, 1.0, -1.0)
                        gl.store(sign_p + o_vec, gl.where(gl.abs(r) > least, of_r, 0.0))
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    acc *= gl.convert_layout(scale / d, by_acc)[:, None]
                mbarrier.arrive(z_empty.index(slot), count=1)
                store_rows(out_s, out_d, acc, bh // H * T + at * L, col)
            else:
                mbarrier.arrive(xy_empty.index(slot), count=1)
                mbarrier.wait(z_full.index(slot), phase)
                mbarrier.arrive(z_empty.index(slot), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H", "NC"])
def hopper_fused(
    x_d, y_d, z_d, s_d, f_d, out_d, h_d, n_p, s0_p, n0_p, s_last_p, n_last_p, fn_p, inner_p, rho_p,
    sign_p, m_p, parts_p, row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p,
    T, H, NC, scale, eps,
    REVERSE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr, L: gl.constexpr,
    LC: gl.constexpr, HAS_STATE: gl.constexpr, ST: gl.constexpr, BY: gl.constexpr,
    TWO_SUMS: gl.constexpr, HALVES: gl.constexpr, ROWS_REGISTERS: gl.constexpr,
    STATE_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Forward x, y, z are q, k, v; in reverse k, q, dh. s: the states that are written; f, fn: in
    reverse, those of the forward pass. _d: descriptors, as in hopper_intra_chunk.py. T is a
    multiple of LC, LC of 2 L; DX is L or 2 L, and BZ too.

    HALVES, in reverse, where BZ is 64: no `hopper_intra_chunk` before has made rho. Each program
    makes it of h and dh for its own values, and of that its share of n's gradient, which is linear
    in it: (programs of a head, steps) and (borders, programs of a head, keys), the first state's
    last."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, DX], x_d.layout)
    y_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, DX], y_d.layout)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, BZ], z_d.layout)
    v_s = gl.allocate_shared_memory(gl.float32, [5 * ST, L], flat)
    S_s = gl.allocate_shared_memory(gl.bfloat16, [DX, BZ], s_d.layout)
    n_s = gl.allocate_shared_memory(gl.float32, [DX], flat)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [2, L, BZ], out_d.layout)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    xy_full = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    xy_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    z_full = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    z_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    s_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    s_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    h_s, rho_s, rho_full, rho_empty = z_s, v_s, s_full, s_empty
    if HALVES:
        h_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, BZ], h_d.layout)
        rho_s = gl.allocate_shared_memory(gl.float32, [2, L], flat)
        rho_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
        rho_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    for s in gl.static_range(ST):
        mbarrier.init(xy_full.index(s), count=33)  # tiles, and each thread's parts of vectors
        mbarrier.init(xy_empty.index(s), count=3)
        mbarrier.init(z_full.index(s), count=1)
        mbarrier.init(z_empty.index(s), count=3)
    for s in gl.static_range(2):
        mbarrier.init(s_full.index(s), count=1)
        mbarrier.init(s_empty.index(s), count=1)
        if HALVES:
            mbarrier.init(rho_full.index(s), count=1)
            mbarrier.init(rho_empty.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (output_rows, (
                x_s, y_s, z_s, h_s, v_s, S_s, n_s, rho_s, out_s.index(0), xy_full, xy_empty,
                z_full, z_empty, s_full, s_empty, rho_full, rho_empty, out_d, rho_p, sign_p,
                parts_p, row_p, row_rest_p, T, H, NC, scale, eps,
                0, REVERSE, DX, DZ, BZ, L, LC, ST, TWO_SUMS, HALVES,
            )),
            (output_rows, (
                x_s, y_s, z_s, h_s, v_s, S_s, n_s, rho_s, out_s.index(1), xy_full, xy_empty,
                z_full, z_empty, s_full, s_empty, rho_full, rho_empty, out_d, rho_p, sign_p,
                parts_p, row_p, row_rest_p, T, H, NC, scale, eps,
                1, REVERSE, DX, DZ, BZ, L, LC, ST, TWO_SUMS, HALVES,
            )),
            (update_state, (
                x_s, y_s, z_s, v_s, S_s, n_s, rho_s, xy_full, xy_empty, z_full, z_empty, s_full,
                s_empty, rho_full, rho_empty, s_d, n_p, s0_p, n0_p, s_last_p, n_last_p, fn_p,
                inner_p, m_p, parts_p, NC, scale,
                REVERSE, DX, DZ, BZ, L, LC, HAS_STATE, ST, BY, HALVES,
            )),
            (load_tiles, (
                x_s, y_s, z_s, h_s, v_s, xy_full, xy_empty, z_full, z_empty, x_d, y_d, z_d, f_d,
                h_d, row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p, rho_p, sign_p,
                T, H, NC, REVERSE, DX, DZ, BZ, L, LC, ST, HALVES,
            )),
        ],
        [4, 4, 1],
        [ROWS_REGISTERS, STATE_REGISTERS, 24],
    )  # fmt: skip
