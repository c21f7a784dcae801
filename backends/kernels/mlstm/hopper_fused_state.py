"""Of hopper_fused.py: the warps that keep the state, and the one that loads tiles."""

from collections import namedtuple

from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import rounded
from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    copy_vector,
    fill_slot,
    post_slot,
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
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Slots: x, y [ST, L, DX]; z, h [ST, L, BZ]; vectors of columns and rows [5 ST, L].
Tiles = namedtuple("Tiles", "x y z h v")
# What `update_state` writes for `output_rows`: S [DX, BZ], n [DX]; and reads of them: rho [2, L].
State = namedtuple("State", "S n rho")
# xy: of x, y and the vectors; s: of S and n, s and rho have two slots, one for each `output_rows`.
Rings = namedtuple("Rings", "xy z s rho")
# Descriptors of what is loaded; f: the forward pass's states.
Matrices = namedtuple("Matrices", "x y z f h")


@gluon.jit
def _chunk_and_part(t, NC, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Chunk and part of it, in turn."""
    at = NC * PARTS - 1 - t if REVERSE else t
    return at // PARTS, at % PARTS


@gluon.jit
def _wait_until_read(ring, t):
    """Of two slots: waits until `output_rows` has read entry t."""
    mbarrier.wait(ring.empty.index(t & 1), (t // 2) & 1)


@gluon.jit
def _wait_until_written(ring, t):
    """Of two slots: waits until `output_rows` has written entry t."""
    mbarrier.wait(ring.full.index(t & 1), (t // 2) & 1)


@gluon.jit
def _product_with_state(tiles, rings, k, S, mma: gl.constexpr):
    """Row by row what leaves the chunk . S [L]."""
    L: gl.constexpr = tiles.x.shape[1]
    DX: gl.constexpr = tiles.x.shape[2]
    BZ: gl.constexpr = tiles.z.shape[2]
    wait(rings.xy, k)
    slot = wait(rings.z, k)
    leaving = tiles.z.index(slot).load(mma).to(gl.float32)
    if DX > L:
        upper, lower = gl.split(gl.permute(gl.reshape(S, [2, L, BZ]), [1, 2, 0]))
        dots = gl.sum(leaving * gl.convert_layout(upper, mma), 1)
        leaving = transposed(tiles.x.index(slot), L, BZ).load(mma).to(gl.float32)
        dots += gl.sum(leaving * gl.convert_layout(lower, mma), 1)
    else:
        dots = gl.sum(leaving * S, 1)
    release(rings.xy, k)
    release(rings.z, k)
    return dots


@gluon.jit
def _add_part(
    n, S, tiles, state, rings, slot, phase, t, start, end, rest, BY: gl.constexpr,
    REVERSE: gl.constexpr, HALVES: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """n and S with a part's steps, BY at a time; the last product is on its way."""
    L: gl.constexpr = tiles.x.shape[1]
    by_step: gl.constexpr = gl.SliceLayout(0, operand)
    for j in gl.static_range(L // BY):
        # Whole numbers are added before anything rounds.
        own = tiles.v.index(slot * 5).slice(j * BY, BY).load(by_step)
        own_rest = tiles.v.index(slot * 5 + 1).slice(j * BY, BY).load(by_step)
        if REVERSE:
            own = gl.exp((own + start) + own_rest)
        else:
            own = gl.exp((own + end) + (own_rest + rest))
        y = tiles.y.index(slot).slice(j * BY, BY).permute([1, 0]).load(operand)
        yw = y.to(gl.float32) * own[None, :]
        if REVERSE and not HALVES:
            rho = tiles.v.index(slot * 5 + 4).slice(j * BY, BY).load(by_step)
            n += gl.sum(yw * rho[None, :], 1)
        if not REVERSE:
            n += gl.sum(yw, 1)
        if j == 0:
            wait_slot(rings.z, slot, phase)
        S = warpgroup_mma(
            yw.to(gl.bfloat16), tiles.z.index(slot).slice(j * BY, BY), S, is_async=True
        )
        if HALVES:
            if j == 0:
                _wait_until_written(rings.rho, t)
            rho = state.rho.index(t & 1).slice(j * BY, BY).load(by_step)
            n += gl.sum(yw * rho[None, :], 1)
    return n, S


@gluon.jit
def _rests(m_p, NC):
    """exp(m - its whole part) of the first state, exp(its whole part - m) of the last."""
    rest_in = gl.load(m_p)
    rest_in = gl.exp(rest_in - rounded(rest_in))
    rest_out = gl.load(m_p + NC)
    return rest_in, gl.exp(rounded(rest_out) - rest_out)


@gluon.jit
def _share_state(state, S, n, REVERSE: gl.constexpr):
    """Writes the state that enters the next part where `output_rows` and TMA read it."""
    state.S.store(S.to(gl.bfloat16))
    if not REVERSE:
        state.n.store(n)
    fence_async_shared()


@gluon.jit
def _store_border(
    s_d, n_p, state, n, border, slot, part, keys, NN: gl.constexpr, HALVES: gl.constexpr
):
    """What was shared, as the state at a chunk's border."""
    DX: gl.constexpr = state.S.shape[0]
    BZ: gl.constexpr = state.S.shape[1]
    tma_store(s_d, [(border + slot) * DX, part * BZ], state.S)
    if HALVES or part == 0:
        gl.store(n_p + slot * (NN * DX) + keys, n)


@gluon.jit
def _tile_offsets(
    o, ROWS: gl.constexpr, COLS: gl.constexpr, STRIDE: gl.constexpr, layout: gl.constexpr
):
    o += gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None] * STRIDE
    return o + gl.arange(0, COLS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _load_three(p):
    return gl.load(p), gl.load(p + 1), gl.load(p + 2)


@gluon.jit
def update_state(
    tiles, state, rings, s_d, n_p, s0_p, n0_p, s_last_p, n_last_p, fn_p, inner_p, m_p, parts_p,
    NC, scale, REVERSE: gl.constexpr, DZ: gl.constexpr, LC: gl.constexpr, HAS_STATE: gl.constexpr,
    BY: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The state: of BY steps at a time, y with their weights in registers."""
    ST: gl.constexpr = tiles.x.shape[0]
    L: gl.constexpr = tiles.x.shape[1]
    DX: gl.constexpr = tiles.x.shape[2]
    BZ: gl.constexpr = tiles.z.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_key: gl.constexpr = gl.SliceLayout(1, operand)
    NZ: gl.constexpr = DZ // BZ
    PARTS: gl.constexpr = LC // L
    part, bh = gl.program_id(0) % NZ, (gl.program_id(0) // NZ).to(gl.int64)
    border = (gl.program_id(0) // NZ) * (NC if REVERSE else NC + 1)  # this head's first
    m_p += bh * (NC + 1)
    # In halves each thread block has an n of its own; otherwise the first one's is all of it.
    NN: gl.constexpr = NZ if HALVES else 1
    if HALVES:
        n_p += (bh * (NC + 1) * NN + part) * DX
    else:
        n_p += bh * (NC if REVERSE else NC + 1) * DX
    parts_p += bh * NC * PARTS * 4
    keys = gl.arange(0, DX, by_key)
    o_s = _tile_offsets(bh * DX * DZ + part * BZ, DX, BZ, DZ, mma)
    rest_in, rest_out = _rests(m_p, NC)
    if HAS_STATE:
        before = rest_out / scale if REVERSE else rest_in
        S = gl.load(s0_p + o_s) * before
        n = gl.load(n0_p + bh * DX + keys) * before
        if HALVES:
            n = gl.where(part == 0, n, 0.0)
    else:
        S, n = gl.zeros([DX, BZ], gl.float32, mma), gl.zeros([DX], gl.float32, by_key)
    slot = NC - 1 if REVERSE else 0
    _share_state(state, S, n, REVERSE)
    post_slot(rings.s, 0)
    _store_border(s_d, n_p, state, n, border, slot, part, keys, NN, HALVES)

    k = 0
    AHEAD: gl.constexpr = REVERSE and DX == L  # larger states leave no registers for it
    if REVERSE:
        fn_p += bh * (NC + 1) * DX
    if AHEAD:
        next_n = gl.load(fn_p + NC * DX + keys)
    at = (NC * PARTS - 1) * 4 if REVERSE else 0
    next_start, next_end, next_rest = _load_three(parts_p + at)
    for t in range(0, NC * PARTS):
        c, s = _chunk_and_part(t, NC, PARTS, REVERSE)
        start, end, rest = next_start, next_end, next_rest
        at = gl.maximum(at - 4, 0) if REVERSE else gl.minimum(at + 4, (NC * PARTS - 1) * 4)
        next_start, next_end, next_rest = _load_three(parts_p + at)
        decay = gl.exp((start + end) + rest)
        if REVERSE:
            if AHEAD:
                leaving_n = next_n
                next_c, _ = _chunk_and_part(t + 1, NC, PARTS, REVERSE)
                next_n = gl.load(fn_p + (next_c + 1) * DX + keys)
            if s == PARTS - 1:  # the gradient of what leaves the chunk, by what does
                dots = _product_with_state(tiles, rings, k, S, mma)
                k += 1
                # Summed no further: warps would wait for each other.
                to = inner_p + (bh * NC + c) * (NZ * L + NN * DX)
                to_rows = part * L + gl.arange(0, L, gl.SliceLayout(1, mma))
                gl.store(to + to_rows, dots * scale)
                if HALVES or part == 0:
                    if not AHEAD:
                        leaving_n = gl.load(fn_p + (c + 1) * DX + keys)
                    of_n = NZ * L + (part * DX if HALVES else 0)
                    gl.store(to + of_n + keys, leaving_n * n * scale)
        slot = k % ST
        phase = (k // ST) & 1
        S, n = S * decay, n * decay
        wait_slot(rings.xy, slot, phase)
        n, S = _add_part(
            n, S, tiles, state, rings, slot, phase, t, start, end, rest, BY, REVERSE, HALVES,
            operand,
        )  # fmt: skip
        if HALVES:
            release_slot(rings.rho, t & 1)
        release_slot(rings.xy, slot)
        S = warpgroup_mma_wait(0, deps=[S])
        release_slot(rings.z, slot)
        k += 1
        _wait_until_read(rings.s, t)
        tma.store_wait(0)  # what was here before has been read
        thread_barrier()
        _share_state(state, S, n, REVERSE)
        post_slot(rings.s, (t + 1) & 1)
        slot = c - 1 if REVERSE else c + 1
        if (slot >= 0) & (s == (0 if REVERSE else PARTS - 1)):
            _store_border(s_d, n_p, state, n, border, slot, part, keys, NN, HALVES)
    after = rest_in * scale if REVERSE else rest_out
    gl.store(s_last_p + o_s, S * after)
    if HALVES:
        gl.store(n_p + NC * (NN * DX) + keys, n * after)
    elif part == 0:
        gl.store(n_last_p + bh * DX + keys, n * after)
    tma.store_wait(0)


@gluon.jit
def load_tiles(
    tiles, rings, matrices, row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p, rho_p, sign_p,
    T, H, NC, REVERSE: gl.constexpr, DZ: gl.constexpr, LC: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    ST: gl.constexpr = tiles.x.shape[0]
    L: gl.constexpr = tiles.x.shape[1]
    DX: gl.constexpr = tiles.x.shape[2]
    BZ: gl.constexpr = tiles.z.shape[2]
    NZ: gl.constexpr = DZ // BZ
    PARTS: gl.constexpr = LC // L
    part, bh = gl.program_id(0) % NZ, gl.program_id(0) // NZ
    at_x, at_z = bh % H * DX, bh % H * DZ + part * BZ
    k = 0
    for t in range(0, NC * PARTS):
        c, s = _chunk_and_part(t, NC, PARTS, REVERSE)
        if REVERSE:
            if s == PARTS - 1:  # the state that leaves the chunk
                slot = k % ST
                phase = ((k // ST) & 1) ^ 1
                k += 1
                state = (bh * (NC + 1) + c + 1) * DX
                full = fill_slot(rings.xy, slot, phase, (DX - L) * BZ * 2)
                async_copy.mbarrier_arrive(full, increment_count=False)
                if DX > L:
                    to = transposed(tiles.x.index(slot), L, BZ)
                    tma_load(matrices.f, [state + L, part * BZ], full, to)
                full = fill_slot(rings.z, slot, phase, L * BZ * 2)
                tma_load(matrices.f, [state, part * BZ], full, tiles.z.index(slot))
        slot = k % ST
        phase = ((k // ST) & 1) ^ 1
        k += 1
        row = (bh // H) * T + c * LC + s * L
        o_vec = (bh.to(gl.int64) * NC + c) * LC + s * L
        full = fill_slot(rings.xy, slot, phase, L * DX * 4)
        tma_load(matrices.x, [row, at_x], full, tiles.x.index(slot))
        tma_load(matrices.y, [row, at_x], full, tiles.y.index(slot))
        copy_vector(tiles.v.index(slot * 5), col_p + o_vec, L)
        copy_vector(tiles.v.index(slot * 5 + 1), col_rest_p + o_vec, L)
        if REVERSE:
            copy_vector(tiles.v.index(slot * 5 + 2), row_p + o_vec, L)
            copy_vector(tiles.v.index(slot * 5 + 3), row_rest_p + o_vec, L)
            of_row = sign_p if HALVES else rho_p
            copy_vector(tiles.v.index(slot * 5 + 4), of_row + o_vec, L)
        else:
            copy_vector(tiles.v.index(slot * 5 + 2), b_p + o_vec, L)
            copy_vector(tiles.v.index(slot * 5 + 3), br_p + o_vec, L)
            copy_vector(tiles.v.index(slot * 5 + 4), peak_p + o_vec, L)
        async_copy.mbarrier_arrive(full, increment_count=False)
        full = fill_slot(rings.z, slot, phase, L * BZ * (4 if HALVES else 2))
        tma_load(matrices.z, [row, at_z], full, tiles.z.index(slot))
        if HALVES:
            tma_load(matrices.h, [row, at_z], full, tiles.h.index(slot))
    async_copy.wait_group(0)
