"""Of hopper_fused.py: the warps that keep the state, and the one that has tiles copied."""

from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import rounded
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


@gluon.jit
def _chunk_and_part(t, NC, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Chunk and part of it, in turn."""
    at = NC * PARTS - 1 - t if REVERSE else t
    return at // PARTS, at % PARTS


@gluon.jit
def update_state(
    x_s, y_s, z_s, v_s, S_s, n_s, rho_s, xy_full, xy_empty, z_full, z_empty, s_full, s_empty,
    rho_full, rho_empty, s_d, n_p, s0_p, n0_p, s_last_p, n_last_p, fn_p, inner_p, m_p, parts_p, NC,
    scale, REVERSE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr,
    L: gl.constexpr, LC: gl.constexpr, HAS_STATE: gl.constexpr, ST: gl.constexpr, BY: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """The state: of BY steps at a time, y with their weights in registers."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_key: gl.constexpr = gl.SliceLayout(1, operand)
    by_step: gl.constexpr = gl.SliceLayout(0, operand)
    NZ: gl.constexpr = DZ // BZ
    PARTS: gl.constexpr = LC // L
    part, bh = gl.program_id(0) % NZ, (gl.program_id(0) // NZ).to(gl.int64)
    border = (gl.program_id(0) // NZ) * (NC if REVERSE else NC + 1)  # this head's first
    m_p += bh * (NC + 1)
    # In halves each program has an n of its own; otherwise the first one's is all of it.
    NN: gl.constexpr = NZ if HALVES else 1
    if HALVES:
        n_p += (bh * (NC + 1) * NN + part) * DX
    else:
        n_p += bh * (NC if REVERSE else NC + 1) * DX
    parts_p += bh * NC * PARTS * 4
    keys = gl.arange(0, DX, by_key)
    o_s = bh * DX * DZ + part * BZ
    o_s += gl.arange(0, DX, gl.SliceLayout(1, mma))[:, None] * DZ
    o_s += gl.arange(0, BZ, gl.SliceLayout(0, mma))[None, :]
    rest_in = gl.load(m_p)
    rest_in = gl.exp(rest_in - rounded(rest_in))
    rest_out = gl.load(m_p + NC)
    rest_out = gl.exp(rounded(rest_out) - rest_out)
    if HAS_STATE:
        before = rest_out / scale if REVERSE else rest_in
        S = gl.load(s0_p + o_s) * before
        n = gl.load(n0_p + bh * DX + keys) * before
        if HALVES:
            n = gl.where(part == 0, n, 0.0)
    else:
        S = gl.zeros([DX, BZ], gl.float32, mma)
        n = gl.zeros([DX], gl.float32, by_key)
    slot = NC - 1 if REVERSE else 0
    S_s.store(S.to(gl.bfloat16))
    if not REVERSE:
        n_s.store(n)
    fence_async_shared()
    mbarrier.arrive(s_full.index(0), count=1)
    tma_store(s_d, [(border + slot) * DX, part * BZ], S_s)
    if HALVES or part == 0:
        gl.store(n_p + slot * (NN * DX) + keys, n)

    k = 0
    if REVERSE:
        fn_p += bh * (NC + 1) * DX
    AHEAD: gl.constexpr = REVERSE and DX == L  # larger states leave no registers for it
    if AHEAD:
        next_n = gl.load(fn_p + NC * DX + keys)
    at = (NC * PARTS - 1) * 4 if REVERSE else 0
    next_start = gl.load(parts_p + at)
    next_end = gl.load(parts_p + at + 1)
    next_rest = gl.load(parts_p + at + 2)
    for t in range(0, NC * PARTS):
        c, s = _chunk_and_part(t, NC, PARTS, REVERSE)
        start, end, rest = next_start, next_end, next_rest
        at = gl.maximum(at - 4, 0) if REVERSE else gl.minimum(at + 4, (NC * PARTS - 1) * 4)
        next_start = gl.load(parts_p + at)
        next_end = gl.load(parts_p + at + 1)
        next_rest = gl.load(parts_p + at + 2)
        decay = gl.exp((start + end) + rest)
        if REVERSE:
            if AHEAD:
                leaving_n = next_n
                next_n = gl.load(
                    fn_p + (_chunk_and_part(t + 1, NC, PARTS, REVERSE)[0] + 1) * DX + keys
                )
            if s == PARTS - 1:  # the gradient of what leaves the chunk, by what does
                mbarrier.wait(xy_full.index(k % ST), (k // ST) & 1)
                mbarrier.wait(z_full.index(k % ST), (k // ST) & 1)
                leaving = z_s.index(k % ST).load(mma).to(gl.float32)
                if DX > L:
                    upper, lower = gl.split(gl.permute(gl.reshape(S, [2, L, BZ]), [1, 2, 0]))
                    dots = gl.sum(leaving * gl.convert_layout(upper, mma), 1)
                    leaving = transposed(x_s.index(k % ST), L, BZ).load(mma).to(gl.float32)
                    dots += gl.sum(leaving * gl.convert_layout(lower, mma), 1)
                else:
                    dots = gl.sum(leaving * S, 1)
                mbarrier.arrive(xy_empty.index(k % ST), count=1)
                mbarrier.arrive(z_empty.index(k % ST), count=1)
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
        S *= decay
        n *= decay
        mbarrier.wait(xy_full.index(slot), phase)
        for j in gl.static_range(L // BY):
            # Whole numbers are added before anything rounds.
            own = v_s.index(slot * 5).slice(j * BY, BY).load(by_step)
            own_rest = v_s.index(slot * 5 + 1).slice(j * BY, BY).load(by_step)
            if REVERSE:
                own = gl.exp((own + start) + own_rest)
            else:
                own = gl.exp((own + end) + (own_rest + rest))
            y = y_s.index(slot).slice(j * BY, BY).permute([1, 0]).load(operand)
            yw = y.to(gl.float32) * own[None, :]
            if REVERSE and not HALVES:
                rho = v_s.index(slot * 5 + 4).slice(j * BY, BY).load(by_step)
                n += gl.sum(yw * rho[None, :], 1)
            if not REVERSE:
                n += gl.sum(yw, 1)
            if j == 0:
                mbarrier.wait(z_full.index(slot), phase)
            S = warpgroup_mma(
                yw.to(gl.bfloat16), z_s.index(slot).slice(j * BY, BY), S, is_async=True
            )
            if HALVES:
                if j == 0:
                    mbarrier.wait(rho_full.index(t & 1), (t // 2) & 1)
                rho = rho_s.index(t & 1).slice(j * BY, BY).load(by_step)
                n += gl.sum(yw * rho[None, :], 1)
        if HALVES:
            mbarrier.arrive(rho_empty.index(t & 1), count=1)
        mbarrier.arrive(xy_empty.index(slot), count=1)
        S = warpgroup_mma_wait(0, deps=[S])
        mbarrier.arrive(z_empty.index(slot), count=1)
        k += 1
        mbarrier.wait(s_empty.index(t & 1), (t // 2) & 1)
        tma.store_wait(0)  # what was here before has been read
        thread_barrier()
        S_s.store(S.to(gl.bfloat16))
        if not REVERSE:
            n_s.store(n)
        fence_async_shared()
        mbarrier.arrive(s_full.index((t + 1) & 1), count=1)
        slot = c - 1 if REVERSE else c + 1
        if (slot >= 0) & (s == (0 if REVERSE else PARTS - 1)):
            tma_store(s_d, [(border + slot) * DX, part * BZ], S_s)
            if HALVES or part == 0:
                gl.store(n_p + slot * (NN * DX) + keys, n)
    after = rest_in * scale if REVERSE else rest_out
    gl.store(s_last_p + o_s, S * after)
    if HALVES:
        gl.store(n_p + NC * (NN * DX) + keys, n * after)
    elif part == 0:
        gl.store(n_last_p + bh * DX + keys, n * after)
    tma.store_wait(0)


@gluon.jit
def load_tiles(
    x_s, y_s, z_s, h_s, v_s, xy_full, xy_empty, z_full, z_empty, x_d, y_d, z_d, f_d, h_d,
    row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p, rho_p, sign_p, T, H, NC,
    REVERSE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr, L: gl.constexpr,
    LC: gl.constexpr, ST: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
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
                mbarrier.wait(xy_empty.index(slot), phase)
                mbarrier.expect(xy_full.index(slot), (DX - L) * BZ * 2)
                async_copy.mbarrier_arrive(xy_full.index(slot), increment_count=False)
                if DX > L:
                    to = transposed(x_s.index(slot), L, BZ)
                    tma_load(f_d, [state + L, part * BZ], xy_full.index(slot), to)
                mbarrier.wait(z_empty.index(slot), phase)
                mbarrier.expect(z_full.index(slot), L * BZ * 2)
                tma_load(f_d, [state, part * BZ], z_full.index(slot), z_s.index(slot))
        slot = k % ST
        phase = ((k // ST) & 1) ^ 1
        k += 1
        row = (bh // H) * T + c * LC + s * L
        o_vec = (bh.to(gl.int64) * NC + c) * LC + s * L
        mbarrier.wait(xy_empty.index(slot), phase)
        mbarrier.expect(xy_full.index(slot), L * DX * 4)
        tma_load(x_d, [row, at_x], xy_full.index(slot), x_s.index(slot))
        tma_load(y_d, [row, at_x], xy_full.index(slot), y_s.index(slot))
        copy_vector(v_s.index(slot * 5), col_p + o_vec, L)
        copy_vector(v_s.index(slot * 5 + 1), col_rest_p + o_vec, L)
        if REVERSE:
            copy_vector(v_s.index(slot * 5 + 2), row_p + o_vec, L)
            copy_vector(v_s.index(slot * 5 + 3), row_rest_p + o_vec, L)
            of_row = sign_p if HALVES else rho_p
            copy_vector(v_s.index(slot * 5 + 4), of_row + o_vec, L)
        else:
            copy_vector(v_s.index(slot * 5 + 2), b_p + o_vec, L)
            copy_vector(v_s.index(slot * 5 + 3), br_p + o_vec, L)
            copy_vector(v_s.index(slot * 5 + 4), peak_p + o_vec, L)
        async_copy.mbarrier_arrive(xy_full.index(slot), increment_count=False)
        mbarrier.wait(z_empty.index(slot), phase)
        mbarrier.expect(z_full.index(slot), L * BZ * (4 if HALVES else 2))
        tma_load(z_d, [row, at_z], z_full.index(slot), z_s.index(slot))
        if HALVES:
            tma_load(h_d, [row, at_z], z_full.index(slot), h_s.index(slot))
    async_copy.wait_group(0)
