"""The mLSTM in Triton: kernels for whole sequences, forward and backward.

A sequence is cut into chunks of LC steps. Stages, each over all chunks at once where it can be:

    gates           running sums of the log gates in each chunk, the peak of what reaches its end
    chunks          m at every chunk border
    states          the state at every border (backwards: its gradient), with `borders` if need be
    attend          what happens within a chunk, and what comes over its border (mlstm_attend.py)
    gate_gradients  from q . dq and k . dk, without any L x L matrix

The gradient is exact: the denominator d of h is in the row's exponent of the backward pass
(row - log d), and what flows through it is rho_i = -sign(r_i) dh_i . h_i where |r_i| bounds d.

As in chunkwise.py, log weights are sums of whole numbers, which float32 adds exactly, and of small
rests; m is rounded wherever it is a reference. Names: _p pointers, o_ offsets; comments give tile
shapes. Tensors are contiguous: q, k, v, h (B, T, H, D); vectors (B * H, NC * LC) in float32.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2.0**100))


# Lengths and counts would otherwise compile anew where they are 1 or a multiple of 16.
_kernel = triton.jit(do_not_specialize=["T", "H", "NC"])


@triton.jit
def _round(x):
    return tl.floor(x + 0.5)


@triton.jit
def _log_sigmoid(x):
    # log(1 + y) = 2 artanh(y / (2 + y)), as a series: tl.log is not exact enough near 1, and an
    # open forget gate's log is summed over many steps.
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    t = s * s
    series = 1.0 + t * (
        1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15)))))
    )
    return tl.minimum(x, 0.0) - 2.0 * s * series


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _larger_in_segment(s1, a1, s2, a2):
    return s2, tl.where(s1 == s2, tl.maximum(a1, a2), a2)


@triton.jit
def _sum_in_segment(s1, a1, s2, a2):
    return s2, tl.where(s1 == s2, a1 + a2, a2)


@triton.jit
def _decay_then_peak(g1, m1, g2, m2):
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit
def _load(p, rows, cols, stride, n_rows, n_cols, EVEN: tl.constexpr, FULL: tl.constexpr):
    """A tile [rows, cols], zero outside. EVEN: every row is there; FULL: every column."""
    p += rows[:, None] * stride + cols[None, :]
    if EVEN and FULL:
        tile = tl.load(p)
    elif EVEN:
        tile = tl.load(p, mask=cols[None, :] < n_cols, other=0.0)
    elif FULL:
        tile = tl.load(p, mask=rows[:, None] < n_rows, other=0.0)
    else:
        tile = tl.load(p, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols), other=0.0)
    return tile


@triton.jit
def _load_turned(p, rows, cols, stride, n_rows, n_cols, EVEN: tl.constexpr, FULL: tl.constexpr):
    """The tile [cols, rows]: turned while loading, for Triton (3.4-3.7) may compile tl.trans of a
    product wrongly on Hopper."""
    p += rows[None, :] * stride + cols[:, None]
    if EVEN and FULL:
        tile = tl.load(p)
    elif EVEN:
        tile = tl.load(p, mask=cols[:, None] < n_cols, other=0.0)
    elif FULL:
        tile = tl.load(p, mask=rows[None, :] < n_rows, other=0.0)
    else:
        tile = tl.load(p, mask=(rows[None, :] < n_rows) & (cols[:, None] < n_cols), other=0.0)
    return tile


@triton.jit
def _segments(seg_p, T, c, rows, LC: tl.constexpr):
    """Segment ids of rows of chunk c, of the step before the chunk, of its last step."""
    seg = tl.load(seg_p + tl.minimum(c * LC + rows, T - 1))
    before = tl.load(seg_p + tl.maximum(c * LC - 1, 0))
    last = tl.load(seg_p + tl.minimum(c * LC + LC, T) - 1)
    return seg, tl.where(c == 0, 0, before), last


@_kernel
def gates(
    i_p, f_p, seg_p, u_p, ur_p, b_p, br_p, own_p, chunk_p, T, H, NC,
    LC: tl.constexpr, LEAST: tl.constexpr, SIGMOID: tl.constexpr, SEG: tl.constexpr,
):  # fmt: skip
    """b: running sum of log f; u = i - b; own: the largest u so far; of a chunk: the sum of its
    log f (whole, rest), the peak of what reaches its end, NEVER if what enters does not."""
    c = tl.program_id(0) % NC
    bh = (tl.program_id(0) // NC).to(tl.int64)
    o = tl.arange(0, LC)
    there = c * LC + o < T
    o_gate = ((bh // H) * T + c * LC + o) * H + bh % H
    f = tl.load(f_p + o_gate, mask=there, other=0.0).to(tl.float32)
    i = tl.load(i_p + o_gate, mask=there, other=0.0).to(tl.float32)
    i = _log_sigmoid(i) if SIGMOID else i
    i = tl.where(there, i, NEVER)
    log_f = tl.where(there, tl.maximum(_log_sigmoid(f), LEAST), 0.0)
    f_whole, i_whole = _round(log_f), _round(i)
    b = tl.cumsum(f_whole, 0)
    br = tl.cumsum(log_f - f_whole, 0)
    u, ur = i_whole - b, (i - i_whole) - br
    total, rest = tl.sum(f_whole, 0), tl.sum(log_f - f_whole, 0)
    reaching = (total + u) + (ur + rest)
    hold = 0.0
    if SEG:
        seg, before, last = _segments(seg_p + (bh // H) * T, T, c, o, LC)
        _, own = tl.associative_scan((seg, u + ur), 0, _larger_in_segment)
        reaching = tl.where(seg == last, reaching, NEVER)
        hold = tl.where(before == last, 0.0, NEVER)
    else:
        own = tl.associative_scan(u + ur, 0, _larger)
    o_vec = (bh * NC + c) * LC + o
    tl.store(u_p + o_vec, u)
    tl.store(ur_p + o_vec, ur)
    tl.store(b_p + o_vec, b)
    tl.store(br_p + o_vec, br)
    tl.store(own_p + o_vec, own)
    chunk_p += (bh * NC + c) * 4
    tl.store(chunk_p, total)
    tl.store(chunk_p + 1, rest)
    tl.store(chunk_p + 2, tl.max(reaching, 0))
    tl.store(chunk_p + 3, hold)


@_kernel
def chunks(chunk_p, m0_p, m_p, through_p, last_p, NC, HAS_STATE: tl.constexpr, N: tl.constexpr):
    """m at every border, and what is left of a state after each chunk."""
    bh = tl.program_id(0).to(tl.int64)
    m = tl.load(m0_p + bh) if HAS_STATE else NEVER
    m_p += bh * (NC + 1)
    tl.store(m_p, m)
    chunk_p += bh * NC * 4
    for start in range(0, NC, N):
        c = start + tl.arange(0, N)
        there = c < NC
        total = tl.load(chunk_p + c * 4, mask=there, other=0.0)
        rest = tl.load(chunk_p + c * 4 + 1, mask=there, other=0.0)
        peak = tl.load(chunk_p + c * 4 + 2, mask=there, other=NEVER)
        hold = tl.load(chunk_p + c * 4 + 3, mask=there, other=0.0)
        decay, own = tl.associative_scan((total + rest + hold, peak), 0, _decay_then_peak)
        after = tl.maximum(m + decay, own)
        tl.store(m_p + 1 + c, after, mask=there)
        tl.debug_barrier()
        before = tl.load(m_p + c, mask=there, other=0.0)
        through = tl.exp(((_round(before) - _round(after)) + total) + hold + rest)
        tl.store(through_p + bh * NC + c, through, mask=there)
        m = tl.sum(tl.where(c == tl.minimum(start + N, NC) - 1, after, 0.0), 0)
    tl.store(last_p + bh, tl.where(m <= NEVER / 2, 0.0, m))


@triton.jit
def _reference(chunk_p, m_p, through_p, bh, c, NC, REVERSE: tl.constexpr):
    """What is left of a state after chunk c, and what the log weights of its steps are over, as
    a whole number and a rest. `m_p` is that of this head."""
    if REVERSE:
        ref = _round(tl.load(m_p + c))
        rest = tl.cast(0.0, tl.float32)
    else:
        p = chunk_p + (bh * NC + c) * 4
        ref = tl.load(p) - _round(tl.load(m_p + c + 1))
        rest = tl.load(p + 1)
    return tl.load(through_p + bh * NC + c), ref, rest


@_kernel
def states(
    x_p, z_p, w_p, wr_p, rho_p, seg_p, chunk_p, m_p, through_p, s_p, n_p,
    s0_p, n0_p, s_last_p, n_last_p, fs_p, fn_p, inner_p, T, H, NC, scale,
    DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, L: tl.constexpr,
    LC: tl.constexpr, NS: tl.constexpr, SERIAL: tl.constexpr, REVERSE: tl.constexpr,
    HAS_STATE: tl.constexpr, SEG: tl.constexpr, EVEN: tl.constexpr, PREC: tl.constexpr,
    ST: tl.constexpr,
):  # fmt: skip
    """S = sum_t w_t x_t z_t^T and n = sum_t w_t (rho_t) x_t.

    Forward w_t is the weight of step t in the state at its chunk's end; in reverse that of the
    state that enters the chunk, at t, and S is the gradient of that state over `scale`.

    SERIAL: one program takes its tile through all chunks and writes it at every border: the state
    that enters, slot NC the last; in reverse the gradient of the state that leaves, and `inner`,
    its product with that state. Otherwise one program a chunk writes what it adds, and `borders`
    does the rest: for few heads, whose serial programs would leave the device idle.
    """
    NX: tl.constexpr = (DX + BX - 1) // BX
    NZ: tl.constexpr = (DZ + BZ - 1) // BZ
    pid = tl.program_id(0)
    tile = pid % (NX * NZ)
    jx, jz = tile % NX, tile // NX
    pid = pid // (NX * NZ)
    STEPS: tl.constexpr = LC // L
    c = pid % NC
    if SERIAL:
        c = NC - 1 if REVERSE else 0
    bh = (pid if SERIAL else pid // NC).to(tl.int64)
    o_x = ((bh // H) * T * H + bh % H) * DX
    o_z = ((bh // H) * T * H + bh % H) * DZ
    cx, cz = jx * BX + tl.arange(0, BX), jz * BZ + tl.arange(0, BZ)
    o = tl.arange(0, L)
    o_s = cx[None, :] * DZ + cz[:, None]
    inside = (cx[None, :] < DX) & (cz[:, None] < DZ)
    dtype = s_p.dtype.element_ty
    m_p += bh * (NC + 1)
    rest_in = tl.load(m_p)
    rest_in = tl.exp(rest_in - _round(rest_in))
    rest_out = tl.load(m_p + NC)
    rest_out = tl.exp(_round(rest_out) - rest_out)
    # S is turned, so that what is computed (x with its weights) is the second operand of the tensor
    # cores: the first would pass through registers once more. n is kept as N rows, summed where it
    # is needed: at every step that would be an exchange between warps.
    S = tl.zeros((BZ, BX), tl.float32)
    N: tl.constexpr = 16
    n = tl.zeros((N, BX), tl.float32)
    if SERIAL and HAS_STATE:
        before = rest_out / scale if REVERSE else rest_in
        S = tl.load(s0_p + bh * DX * DZ + o_s, mask=inside, other=0.0) * before
        only = (tl.arange(0, N) == 0)[:, None] & (cx < DX)[None, :]
        n = tl.load(n0_p + bh * DX + cx[None, :], mask=only, other=0.0) * before
    # One loop through all chunks, and what the next chunk's weights refer to is loaded one chunk
    # ahead: no load waits at a border.
    through, ref, ref_rest = _reference(chunk_p, m_p, through_p, bh, c, NC, REVERSE)
    own_ref, own_rest = ref, ref_rest
    for t in tl.range(0, NC * STEPS if SERIAL else STEPS, num_stages=ST):
        if SERIAL:
            c = NC - 1 - t // STEPS if REVERSE else t // STEPS
            if t % STEPS == 0:
                slot = bh * NS + c
                if REVERSE:
                    leaving = bh * (NS + 1) + c + 1
                    F = tl.load(fs_p + leaving * DX * DZ + o_s, mask=inside, other=0.0)
                    # Axis by axis, Triton 3.6 would not compile it for Blackwell.
                    product = tl.sum(F.to(tl.float32) * S)
                    if jz == 0:
                        F_n = tl.load(fn_p + leaving * DX + cx, mask=cx < DX, other=0.0)
                        product += tl.sum(tl.sum(F_n[None, :] * n, 1), 0)
                    tl.store(inner_p + (bh * NC + c) * NX * NZ + tile, product * scale)
                tl.store(s_p + slot * DX * DZ + o_s, S.to(dtype), mask=inside)
                if jz == 0:
                    tl.store(n_p + slot * DX + cx, tl.sum(n, 0), mask=cx < DX)
                S *= through
                n *= through
                own_ref, own_rest = ref, ref_rest
                following = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, NC - 1)
                through, ref, ref_rest = _reference(
                    chunk_p, m_p, through_p, bh, following, NC, REVERSE
                )
        rows = (t % STEPS) * L + o
        here = tl.minimum(LC, T - c * LC)
        o_vec = (bh * NC + c) * LC + rows
        w = tl.exp((tl.load(w_p + o_vec) + own_ref) + (tl.load(wr_p + o_vec) + own_rest))  # [L]
        if SEG:
            seg, earlier, last = _segments(seg_p + (bh // H) * T, T, c, rows, LC)
            w = tl.where(seg == (earlier if REVERSE else last), w, 0.0)
        if not EVEN:
            w = tl.where(rows < here, w, 0.0)
        p_x = x_p + o_x + tl.cast(c, tl.int64) * (LC * H * DX)
        p_z = z_p + o_z + tl.cast(c, tl.int64) * (LC * H * DZ)
        x = _load(p_x, rows, cx, H * DX, here, DX, EVEN, DX % BX == 0)  # [L, BX]
        zt = _load_turned(p_z, rows, cz, H * DZ, here, DZ, EVEN, DZ % BZ == 0)  # [BZ, L]
        xw = x.to(tl.float32) * w[:, None]
        S = tl.dot(zt.to(dtype), xw.to(dtype), S, input_precision=PREC)
        if REVERSE:
            rho = tl.load(rho_p + o_vec, mask=rows < here, other=0.0)  # beyond, nobody wrote it
            xw *= rho[:, None]
        n += tl.sum(tl.reshape(xw, (L // N, N, BX)), 0)
    if SERIAL:
        after = rest_in * scale if REVERSE else rest_out
        tl.store(s_last_p + bh * DX * DZ + o_s, S * after, mask=inside)
        if jz == 0:
            tl.store(n_last_p + bh * DX + cx, tl.sum(n, 0) * after, mask=cx < DX)
        if not REVERSE:
            slot = bh * NS + NC
            tl.store(s_p + slot * DX * DZ + o_s, S.to(dtype), mask=inside)
            if jz == 0:
                tl.store(n_p + slot * DX + cx, tl.sum(n, 0), mask=cx < DX)
    else:
        slot = bh * NS + c
        tl.store(s_p + slot * DX * DZ + o_s, S.to(dtype), mask=inside)
        if jz == 0:
            tl.store(n_p + slot * DX + cx, tl.sum(n, 0), mask=cx < DX)


@_kernel
def borders(
    s_p, n_p, s0_p, n0_p, through_p, m_p, s_last_p, n_last_p, fs_p, fn_p, inner_p,
    NC, scale, KV: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr, ST: tl.constexpr,
):  # fmt: skip
    """In place, what chunks add becomes the state that enters each, and slot NC the last state.

    In reverse: what chunks add to the gradient becomes the gradient of the state that leaves each,
    over `scale`; inner is its product with that state, in parts.
    """
    TILES: tl.constexpr = (KV + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = TILES + (K + BLOCK - 1) // BLOCK
    tile, bh = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS).to(tl.int64)
    first = _round(tl.load(m_p + bh * (NC + 1)))
    m_last = tl.load(m_p + bh * (NC + 1) + NC)
    rest_in = tl.exp(tl.load(m_p + bh * (NC + 1)) - first)
    rest_out = tl.exp(_round(m_last) - m_last)
    if tile < TILES:
        o = tile * BLOCK + tl.arange(0, BLOCK)
        _border(
            s_p, s0_p, s_last_p, fs_p, inner_p, through_p, o, tile, bh, NC,
            scale, rest_in, rest_out, KV, PARTS, HAS_STATE, REVERSE, ST,
        )  # fmt: skip
    else:
        o = (tile - TILES) * BLOCK + tl.arange(0, BLOCK)
        _border(
            n_p, n0_p, n_last_p, fn_p, inner_p, through_p, o, tile, bh, NC,
            scale, rest_in, rest_out, K, PARTS, HAS_STATE, REVERSE, ST,
        )  # fmt: skip


@triton.jit
def _border(
    p, first_p, last_p, f_p, inner_p, through_p, o, tile, bh, NC, scale, rest_in, rest_out,
    SIZE: tl.constexpr, PARTS: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr,
    ST: tl.constexpr,
):  # fmt: skip
    there = o < SIZE
    through_p += bh * NC
    dtype = p.dtype.element_ty
    if HAS_STATE:  # in reverse: the last state's gradient
        s = tl.load(first_p + bh * SIZE + o, mask=there, other=0.0)
        s *= rest_out / scale if REVERSE else rest_in
    else:
        s = tl.zeros(o.shape, tl.float32)
    if REVERSE:
        p += bh * NC * SIZE
        f_p += bh * (NC + 1) * SIZE
        inner_p += bh * NC * PARTS + tile
        for k in tl.range(0, NC, num_stages=ST):
            c = NC - 1 - k
            added = tl.load(p + tl.cast(c, tl.int64) * SIZE + o, mask=there, other=0.0).to(
                tl.float32
            )
            state = tl.load(f_p + tl.cast(c + 1, tl.int64) * SIZE + o, mask=there, other=0.0)
            tl.store(inner_p + c * PARTS, tl.sum(state.to(tl.float32) * s, 0) * scale)
            tl.store(p + tl.cast(c, tl.int64) * SIZE + o, s.to(dtype), mask=there)
            s = tl.load(through_p + c) * s + added
        tl.store(last_p + bh * SIZE + o, s * rest_in * scale, mask=there)
    else:
        p += bh * (NC + 1) * SIZE
        for c in tl.range(0, NC, num_stages=ST):
            o_c = tl.cast(c, tl.int64) * SIZE + o
            added = tl.load(p + o_c, mask=there, other=0.0).to(tl.float32)
            tl.store(p + o_c, s.to(dtype), mask=there)
            s = tl.load(through_p + c) * s + added
        tl.store(p + tl.cast(NC, tl.int64) * SIZE + o, s.to(dtype), mask=there)
        tl.store(last_p + bh * SIZE + o, s * rest_out, mask=there)


@_kernel
def gate_gradients(
    i_p, f_p, seg_p, q_dot_p, k_dot_p, inner_p, di_p, df_p, T, H, NC,
    LC: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, LEAST: tl.constexpr,
    SIGMOID: tl.constexpr, SEG: tl.constexpr,
):  # fmt: skip
    """Scaling exp(i_j) scales k_j; scaling f_t scales every k before t against every q from t on,
    which is what crosses t: pairs within the chunk, and the product at its end."""
    c = tl.program_id(0) % NC
    bh = (tl.program_id(0) // NC).to(tl.int64)
    o = tl.arange(0, LC)
    there = c * LC + o < T
    o_vec = (bh * NC + c) * LC + o
    q_dot = tl.load(q_dot_p + o_vec, mask=there, other=0.0)
    k_dot = tl.load(k_dot_p + o_vec, mask=there, other=0.0)
    parts = tl.arange(0, P)
    leaving = tl.load(inner_p + (bh * NC + c) * PARTS + parts, mask=parts < PARTS, other=0.0)
    leaving = tl.sum(leaving, 0)
    if SEG:
        seg, _, last = _segments(seg_p + (bh // H) * T, T, c, o, LC)
        _, x = tl.associative_scan((seg, q_dot - k_dot), 0, _sum_in_segment, reverse=True)
        x += tl.where(seg == last, leaving, 0.0)
        step = tl.maximum(c * LC + o - 1, 0)
        earlier = tl.load(seg_p + (bh // H) * T + tl.minimum(step, T - 1))
        earlier = tl.where(c * LC + o == 0, 0, earlier)
        x = tl.where(seg == earlier, x, 0.0)  # a segment's first f reaches nothing
    else:
        x = tl.cumsum(q_dot - k_dot, 0, reverse=True) + leaving
    o_gate = ((bh // H) * T + c * LC + o) * H + bh % H
    f = tl.load(f_p + o_gate, mask=there, other=0.0).to(tl.float32)
    x = tl.where(_log_sigmoid(f) > LEAST, x * tl.sigmoid(-f), 0.0)
    tl.store(df_p + o_gate, x.to(df_p.dtype.element_ty), mask=there)
    if SIGMOID:
        i = tl.load(i_p + o_gate, mask=there, other=0.0).to(tl.float32)
        k_dot *= tl.sigmoid(-i)
    tl.store(di_p + o_gate, k_dot.to(di_p.dtype.element_ty), mask=there)
