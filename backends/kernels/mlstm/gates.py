"""The mLSTM's gates in Triton: running sums and peaks of their logs in every chunk, m at the chunk
borders, and their gradients. Conventions as in inter_chunk.py.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.mlstm.inter_chunk import NEVER, jit_kernel, load_segments, rounded


@triton.jit
def log_sigmoid(x):
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


@jit_kernel
def gates(
    i_p, f_p, seg_p, u_p, ur_p, b_p, br_p, own_p, chunk_p, parts_p, T, H, NC,
    LC: tl.constexpr, LEAST: tl.constexpr, SIGMOID: tl.constexpr, SEG: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """b: running sum of log f; u = i - b; own: the largest u so far; of a chunk: the sum of its
    log f (whole, rest), the peak of what reaches its end, NEVER if what enters does not; of each
    of its PARTS: the largest u before it."""
    c = tl.program_id(0) % NC
    bh = (tl.program_id(0) // NC).to(tl.int64)
    o = tl.arange(0, LC)
    in_bounds = c * LC + o < T
    o_gate = ((bh // H) * T + c * LC + o) * H + bh % H
    f = tl.load(f_p + o_gate, mask=in_bounds, other=0.0).to(tl.float32)
    i = tl.load(i_p + o_gate, mask=in_bounds, other=0.0).to(tl.float32)
    i = log_sigmoid(i) if SIGMOID else i
    i = tl.where(in_bounds, i, NEVER)
    log_f = tl.where(in_bounds, tl.maximum(log_sigmoid(f), LEAST), 0.0)
    f_whole, i_whole = rounded(log_f), rounded(i)
    b = tl.cumsum(f_whole, 0)
    br = tl.cumsum(log_f - f_whole, 0)
    u, ur = i_whole - b, (i - i_whole) - br
    total, rest = tl.sum(f_whole, 0), tl.sum(log_f - f_whole, 0)
    reaching = (total + u) + (ur + rest)
    hold = 0.0
    if SEG:
        seg, before, last = load_segments(seg_p + (bh // H) * T, T, c, o, LC)
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
    for s in tl.static_range(PARTS):
        before = tl.where(o < s * (LC // PARTS), u + ur, NEVER)
        tl.store(parts_p + ((bh * NC + c) * PARTS + s) * 4 + 3, tl.max(before, 0))


@jit_kernel
def chunks(
    chunk_p, m0_p, m_p, through_p, last_p, parts_p, NC, HAS_STATE: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """m at every border, and what is left of a state after each chunk.

    Of each of a chunk's PARTS: what the state that enters it is over, as a log; what a log weight
    of its steps lacks at its end, whole and rest; m at the chunk's start (hopper_fused.py).
    """
    bh = tl.program_id(0).to(tl.int64)
    m = tl.load(m0_p + bh) if HAS_STATE else NEVER
    m_p += bh * (NC + 1)
    tl.store(m_p, m)
    chunk_p += bh * NC * 4
    for start in range(0, NC, N):
        c = start + tl.arange(0, N)
        in_bounds = c < NC
        total = tl.load(chunk_p + c * 4, mask=in_bounds, other=0.0)
        rest = tl.load(chunk_p + c * 4 + 1, mask=in_bounds, other=0.0)
        peak = tl.load(chunk_p + c * 4 + 2, mask=in_bounds, other=NEVER)
        hold = tl.load(chunk_p + c * 4 + 3, mask=in_bounds, other=0.0)
        decay, own = tl.associative_scan((total + rest + hold, peak), 0, _decay_then_peak)
        after = tl.maximum(m + decay, own)
        tl.store(m_p + 1 + c, after, mask=in_bounds)
        tl.debug_barrier()
        before = tl.load(m_p + c, mask=in_bounds, other=0.0)
        through = tl.exp(((rounded(before) - rounded(after)) + total) + hold + rest)
        tl.store(through_p + bh * NC + c, through, mask=in_bounds)
        p = parts_p + (bh * NC + c) * (PARTS * 4)
        for s in tl.static_range(PARTS):
            peak = tl.load(p + s * 4 + 3, mask=in_bounds, other=0.0)
            tl.store(p + s * 4, rounded(tl.maximum(before, peak)), mask=in_bounds)
            if s + 1 < PARTS:
                peak = tl.load(p + s * 4 + 7, mask=in_bounds, other=0.0)
                tl.store(p + s * 4 + 1, -rounded(tl.maximum(before, peak)), mask=in_bounds)
                tl.store(p + s * 4 + 2, tl.zeros_like(rest), mask=in_bounds)
            else:
                tl.store(p + s * 4 + 1, total - rounded(after), mask=in_bounds)
                tl.store(p + s * 4 + 2, rest, mask=in_bounds)
            tl.store(p + s * 4 + 3, before, mask=in_bounds)
        m = tl.sum(tl.where(c == tl.minimum(start + N, NC) - 1, after, 0.0), 0)
    tl.store(last_p + bh, tl.where(m <= NEVER / 2, 0.0, m))


@jit_kernel
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
    in_bounds = c * LC + o < T
    o_vec = (bh * NC + c) * LC + o
    q_dot = tl.load(q_dot_p + o_vec, mask=in_bounds, other=0.0)
    k_dot = tl.load(k_dot_p + o_vec, mask=in_bounds, other=0.0)
    parts = tl.arange(0, P)
    leaving = tl.load(inner_p + (bh * NC + c) * PARTS + parts, mask=parts < PARTS, other=0.0)
    leaving = tl.sum(leaving, 0)
    if SEG:
        seg, _, last = load_segments(seg_p + (bh // H) * T, T, c, o, LC)
        _, x = tl.associative_scan((seg, q_dot - k_dot), 0, _sum_in_segment, reverse=True)
        x += tl.where(seg == last, leaving, 0.0)
        step = tl.maximum(c * LC + o - 1, 0)
        earlier = tl.load(seg_p + (bh // H) * T + tl.minimum(step, T - 1))
        earlier = tl.where(c * LC + o == 0, 0, earlier)
        x = tl.where(seg == earlier, x, 0.0)  # a segment's first f reaches nothing
    else:
        x = tl.cumsum(q_dot - k_dot, 0, reverse=True) + leaving
    o_gate = ((bh // H) * T + c * LC + o) * H + bh % H
    f = tl.load(f_p + o_gate, mask=in_bounds, other=0.0).to(tl.float32)
    x = tl.where(log_sigmoid(f) > LEAST, x * tl.sigmoid(-f), 0.0)
    tl.store(df_p + o_gate, x.to(df_p.dtype.element_ty), mask=in_bounds)
    if SIGMOID:
        i = tl.load(i_p + o_gate, mask=in_bounds, other=0.0).to(tl.float32)
        k_dot *= tl.sigmoid(-i)
    tl.store(di_p + o_gate, k_dot.to(di_p.dtype.element_ty), mask=in_bounds)
