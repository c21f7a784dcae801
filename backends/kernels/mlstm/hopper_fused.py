"""States and outputs of the mLSTM in one pass on NVIDIA's Hopper, in Gluon.

`chunk_states` writes the state at every chunk border (inter_chunk.py), and `intra_chunk` reads it
again with all of k and v (in reverse: of q and dh). Where there are heads enough, a thread block
here takes half of a head's values through all of its steps with the state in registers: forward it
writes h, in reverse dv. The states at chunk borders are still written, for the kernels of the other
gradients.

64 steps at a time are a part of a chunk. The state that enters a part within the chunk is over
exp(M). M is the whole number next to the larger of two: m at the chunk's start, and the peak of
what the parts before it add. What is left of a state, and each step's weight in it, are then at
most about 1, as at the borders (`chunks` in gates.py).

Four warps keep the state (`update_state`), twice four compute the outputs of every other part
(`output_rows`), one loads tiles (`load_tiles`; it and the first are in hopper_fused_state.py).
Tiles pass through rings, whose entries all of these warps see in turn.
"""

from keras_xlstm.backends.kernels.mlstm.hopper_fused_state import (
    Matrices,
    Rings,
    State,
    Tiles,
    load_tiles,
    update_state,
)
from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import LOG2_E, exp2, rounded
from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    init_slot,
    new_ring,
    post_slot,
    release,
    release_slot,
    store_rows,
    wait,
    wait_free_slot,
    wait_slot,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _make_rho(tiles, state, rings, slot, phase, b, turn):
    """rho [L] of a part from h and dh, for `update_state` as well."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    wait_slot(rings.z, slot, phase)
    z = tiles.z.index(slot).load(wide).to(gl.float32)
    dots = gl.sum(z * tiles.h.index(slot).load(wide).to(gl.float32), 1)
    rho = -tiles.v.index(slot * 5 + 4).load(gl.SliceLayout(1, wide)) * dots
    wait_free_slot(rings.rho, b, (turn & 1) ^ 1)
    state.rho.index(b).store(rho)
    post_slot(rings.rho, b)
    return rho


@gluon.jit
def _weights(v_s, slot, first, second, eps, mma_p: gl.constexpr, REVERSE: gl.constexpr):
    """Of a part's rows: exponents (whole, rest), the weight of the state that enters, the weights
    of pairs [L, L]; forward also the least denominator and what eps adds to it."""
    by_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    by_col: gl.constexpr = gl.SliceLayout(0, mma_p)
    row = v_s.index(slot * 5 + 2).load(by_row)
    row_rest = v_s.index(slot * 5 + 3).load(by_row)
    least, more = 0.0, 0.0
    if REVERSE:
        w = gl.exp((row + first) + (row_rest + second))
    else:
        row_m = (row + row_rest) + gl.maximum(v_s.index(slot * 5 + 4).load(by_row), second)
        whole = rounded(row_m)
        row -= whole
        w = gl.exp((row + first) + row_rest)
        least = gl.exp(gl.where(whole > -80.0, -whole, 80.0))
        more = eps * gl.exp(row_m - whole)
    # Whole numbers are added before anything rounds.
    log_w = row[:, None] + v_s.index(slot * 5).load(by_col)[None, :]
    log_rest = (row_rest * LOG2_E)[:, None]
    log_rest += (v_s.index(slot * 5 + 1).load(by_col) * LOG2_E)[None, :]
    return row, row_rest, w, exp2(log_w * LOG2_E + log_rest), least, more


@gluon.jit
def _dot_n(x, n_s):
    """x . n [L]"""
    mma_n: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    L: gl.constexpr = x.shape[0]
    DX: gl.constexpr = x.shape[1]
    dots = gl.zeros([L, 32], gl.float32, mma_n)
    for j in gl.static_range(DX // 32):
        tile = x.slice(j * 32, 32, dim=1).load(mma_n).to(gl.float32)
        n = n_s.slice(j * 32, 32).load(gl.SliceLayout(0, mma_n))
        dots += tile * n[None, :]
    return gl.sum(dots, 1)


@gluon.jit
def _skip(rings, k):
    """An entry for `update_state` alone."""
    wait(rings.xy, k)
    release(rings.xy, k)
    wait(rings.z, k)
    release(rings.z, k)


@gluon.jit
def _store_row_terms(row_p, row_rest_p, sign_p, o, row, row_rest, r, d, least):
    """What the backward pass reads of rows."""
    gl.store(row_p + o, row)
    gl.store(row_rest_p + o, row_rest - gl.log(d))
    of_r = gl.where(r > 0, 1.0, -1.0)
    gl.store(sign_p + o, gl.where(gl.abs(r) > least, of_r, 0.0))


@gluon.jit
def output_rows(
    tiles, state, rings, out_s, out_d, rho_p, sign_p, parts_p, row_p, row_rest_p, T, H, NC,
    scale, eps, TURN: gl.constexpr, REVERSE: gl.constexpr, DZ: gl.constexpr, LC: gl.constexpr,
    TWO_SUMS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The rows of every other part. TWO_SUMS, added at the end, wait for each other less."""
    ST: gl.constexpr = tiles.x.shape[0]
    L: gl.constexpr = tiles.x.shape[1]
    BZ: gl.constexpr = tiles.z.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    by_acc: gl.constexpr = gl.SliceLayout(1, mma)
    NZ: gl.constexpr = DZ // BZ
    PARTS: gl.constexpr = LC // L
    part, bh = gl.program_id(0) % NZ, gl.program_id(0) // NZ
    col = bh % H * DZ + part * BZ
    rows = gl.arange(0, L, by_row)
    cols = gl.arange(0, L, gl.SliceLayout(0, mma_p))
    parts_p += bh.to(gl.int64) * NC * PARTS * 4 + (1 if REVERSE else 0)
    at = NC * PARTS - 1 - TURN if REVERSE else TURN
    next_first = gl.load(parts_p + at * 4)
    next_second = gl.load(parts_p + at * 4 + (1 if REVERSE else 3))
    k = 0
    for turn in range(0, NC * PARTS // 2):
        for b in gl.static_range(2):
            t = turn * 2 + b
            if REVERSE and b == 0:
                if t % PARTS == 0:
                    _skip(rings, k)
                    k += 1
            slot, phase = k % ST, (k // ST) & 1
            k += 1
            wait_slot(rings.xy, slot, phase)
            if b == TURN:
                at = NC * PARTS - 1 - t if REVERSE else t
                first, second = next_first, next_second
                after = gl.maximum(at - 2, 0) if REVERSE else gl.minimum(at + 2, NC * PARTS - 1)
                next_first = gl.load(parts_p + after * 4)
                next_second = gl.load(parts_p + after * 4 + (1 if REVERSE else 3))
                x = tiles.x.index(slot)
                if HALVES:
                    rho = _make_rho(tiles, state, rings, slot, phase, b, turn)
                    o_rho = (bh.to(gl.int64) * NZ + part) * NC * LC + at * L
                    gl.store(rho_p + o_rho + gl.arange(0, L, rho.type.layout), rho)
                yt = tiles.y.index(slot).permute([1, 0])
                p = gl.zeros([L, L], gl.float32, mma_p)
                p = warpgroup_mma(x, yt, p, use_acc=False, is_async=True)
                row, row_rest, w, weight, least, more = _weights(
                    tiles.v, slot, first, second, eps, mma_p, REVERSE
                )
                # The weights as well, lest the compiler move them behind the wait.
                p, weight = warpgroup_mma_wait(0, deps=[p, weight])
                p *= weight
                if REVERSE:
                    p = gl.where(rows[:, None] <= cols[None, :], p, 0.0)
                else:
                    p = gl.where(rows[:, None] >= cols[None, :], p, 0.0)
                    r = gl.sum(p, 1)
                p = gl.convert_layout(p.to(gl.bfloat16), operand)
                zero = gl.zeros([L, BZ], gl.float32, mma)
                if TWO_SUMS:
                    wait_slot(rings.z, slot, phase)
                    z = tiles.z.index(slot)
                    within = warpgroup_mma(p, z, zero, use_acc=False, is_async=True)
                # The state comes last: `update_state` waits for those that read it.
                wait_slot(rings.s, b, turn & 1)
                acc = warpgroup_mma(x, state.S, zero, use_acc=False, is_async=True)
                if not REVERSE:
                    r += gl.convert_layout(_dot_n(x, state.n), by_row) * w
                if TWO_SUMS:
                    acc, within = warpgroup_mma_wait(0, deps=[acc, within])
                else:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                release_slot(rings.s, b)
                release_slot(rings.xy, slot)
                acc *= gl.convert_layout(w, by_acc)[:, None]
                if TWO_SUMS:
                    acc += within
                else:
                    wait_slot(rings.z, slot, phase)
                    acc = warpgroup_mma(p, tiles.z.index(slot), acc, is_async=True)
                if REVERSE:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    acc *= scale
                else:
                    r *= scale
                    d = gl.maximum(gl.abs(r), least) + more
                    if part == 0:
                        o = bh.to(gl.int64) * NC * LC + at * L + rows
                        _store_row_terms(row_p, row_rest_p, sign_p, o, row, row_rest, r, d, least)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    acc *= gl.convert_layout(scale / d, by_acc)[:, None]
                release_slot(rings.z, slot)
                store_rows(out_s, out_d, acc, bh // H * T + at * L, col)
            else:
                release_slot(rings.xy, slot)
                wait_slot(rings.z, slot, phase)
                release_slot(rings.z, slot)
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

    HALVES, in reverse, where BZ is 64: no `hopper_intra_chunk` before has made rho. Each thread
    block makes it of h and dh for its own values, and of that its share of n's gradient, which is
    linear in it: (thread blocks of a head, steps) and (borders, thread blocks of a head, keys), the
    first state's last."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, DX], x_d.layout)
    y_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, DX], y_d.layout)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, BZ], z_d.layout)
    v_s = gl.allocate_shared_memory(gl.float32, [5 * ST, L], flat)
    S_s = gl.allocate_shared_memory(gl.bfloat16, [DX, BZ], s_d.layout)
    n_s = gl.allocate_shared_memory(gl.float32, [DX], flat)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [2, L, BZ], out_d.layout)
    xy, z, s = new_ring(ST), new_ring(ST), new_ring(2)
    h_s, rho_s, rho = z_s, v_s, s
    if HALVES:
        h_s = gl.allocate_shared_memory(gl.bfloat16, [ST, L, BZ], h_d.layout)
        rho_s = gl.allocate_shared_memory(gl.float32, [2, L], flat)
        rho = new_ring(2)
    tiles, state = Tiles(x_s, y_s, z_s, h_s, v_s), State(S_s, n_s, rho_s)
    rings = Rings(xy, z, s, rho)
    for slot in gl.static_range(ST):
        init_slot(xy, slot, 33, 3)
        init_slot(z, slot, 1, 3)
    for slot in gl.static_range(2):
        init_slot(s, slot, 1, 1)
        if HALVES:
            init_slot(rho, slot, 1, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (output_rows, (
                tiles, state, rings, out_s.index(0), out_d, rho_p, sign_p, parts_p, row_p,
                row_rest_p, T, H, NC, scale, eps, 0, REVERSE, DZ, LC, TWO_SUMS, HALVES,
            )),
            (output_rows, (
                tiles, state, rings, out_s.index(1), out_d, rho_p, sign_p, parts_p, row_p,
                row_rest_p, T, H, NC, scale, eps, 1, REVERSE, DZ, LC, TWO_SUMS, HALVES,
            )),
            (update_state, (
                tiles, state, rings, s_d, n_p, s0_p, n0_p, s_last_p, n_last_p, fn_p, inner_p, m_p,
                parts_p, NC, scale, REVERSE, DZ, LC, HAS_STATE, BY, HALVES,
            )),
            (load_tiles, (
                tiles, rings, Matrices(x_d, y_d, z_d, f_d, h_d), row_p, row_rest_p, col_p,
                col_rest_p, b_p, br_p, peak_p, rho_p, sign_p, T, H, NC, REVERSE, DZ, LC, HALVES,
            )),
        ],
        [4, 4, 1],
        [ROWS_REGISTERS, STATE_REGISTERS, 24],
    )  # fmt: skip
