"""The mLSTM in Triton: kernels for whole sequences, forward and backward.

A sequence is cut into chunks of LC steps. Stages, each over all chunks at once where it can be:

    gates           running sums of the log gates in each chunk, the peak of what reaches its end
    chunks          m at every chunk border (gates.py, as the last)
    chunk_states    the state at every border (backwards: its gradient), with `scan_chunk_states`
                    if need be
    intra_chunk     what happens within a chunk, and what comes over its border (intra_chunk.py)
    gate_gradients  from q . dq and k . dk, without any L x L matrix

The gradient is exact: the denominator d of h is in the row's exponent of the backward pass
(row - log d), and what flows through it is rho_i = -sign(r_i) dh_i . h_i where |r_i| bounds d.

As in chunkwise.py, log weights are sums of whole numbers, which float32 adds exactly, and of small
rests; m is rounded wherever it is a reference. Names: _p pointers, o_ offsets; comments give tile
shapes. Tensors are contiguous: q, k, v, h (B, T, H, D); vectors (B * H, NC * LC) in float32.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton

NEVER = tl.constexpr(-(2.0**100))


# Triton would otherwise compile again for lengths and counts of 1 or a multiple of 16.
jit_kernel = triton.jit(do_not_specialize=["T", "H", "NC"])


@triton.jit
def rounded(x):
    return tl.floor(x + 0.5)


@triton.jit
def load_tile(p, rows, cols, stride, n_rows, n_cols, EVEN: tl.constexpr, FULL: tl.constexpr):
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
def load_transposed_tile(
    p, rows, cols, stride, n_rows, n_cols, EVEN: tl.constexpr, FULL: tl.constexpr
):
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
def load_segments(seg_p, T, c, rows, LC: tl.constexpr):
    """Segment ids of rows of chunk c, of the step before the chunk, of its last step."""
    seg = tl.load(seg_p + tl.minimum(c * LC + rows, T - 1))
    before = tl.load(seg_p + tl.maximum(c * LC - 1, 0))
    last = tl.load(seg_p + tl.minimum(c * LC + LC, T) - 1)
    return seg, tl.where(c == 0, 0, before), last


@triton.jit
def _decay_and_reference(chunk_p, m_p, through_p, bh, c, NC, REVERSE: tl.constexpr):
    """What is left of a state after chunk c, and what the log weights of its steps are over, as
    a whole number and a rest. `m_p` is that of this head."""
    if REVERSE:
        ref = rounded(tl.load(m_p + c))
        rest = tl.cast(0.0, tl.float32)
    else:
        p = chunk_p + (bh * NC + c) * 4
        ref = tl.load(p) - rounded(tl.load(m_p + c + 1))
        rest = tl.load(p + 1)
    return tl.load(through_p + bh * NC + c), ref, rest


@triton.jit
def _rests(m_p, NC):
    """exp(m - its whole part) of the first state, exp(its whole part - m) of the last."""
    rest_in = tl.load(m_p)
    rest_in = tl.exp(rest_in - rounded(rest_in))
    rest_out = tl.load(m_p + NC)
    return rest_in, tl.exp(rounded(rest_out) - rest_out)


@triton.jit
def _store_state(s_p, n_p, slot, S, n, o_s, cx, jz, inside, DX, DZ):
    """Tile S [BZ, BX], and n [N, BX] summed, as the state of this slot."""
    tl.store(s_p + slot * DX * DZ + o_s, S.to(s_p.dtype.element_ty), mask=inside)
    if jz == 0:
        tl.store(n_p + slot * DX + cx, tl.sum(n, 0), mask=cx < DX)


@triton.jit
def _product_with_state(fs_p, fn_p, slot, S, n, o_s, cx, jz, inside, DX, DZ):
    """The product of the tile and n with the forward pass's state of this slot."""
    F = tl.load(fs_p + slot * DX * DZ + o_s, mask=inside, other=0.0)
    # Axis by axis, Triton 3.6 would not compile it for Blackwell.
    product = tl.sum(F.to(tl.float32) * S)
    if jz == 0:
        F_n = tl.load(fn_p + slot * DX + cx, mask=cx < DX, other=0.0)
        product += tl.sum(tl.sum(F_n[None, :] * n, 1), 0)
    return product


@jit_kernel
def chunk_states(
    x_p, z_p, w_p, wr_p, rho_p, seg_p, chunk_p, m_p, through_p, s_p, n_p,
    s0_p, n0_p, s_last_p, n_last_p, fs_p, fn_p, inner_p, T, H, NC, scale,
    DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, L: tl.constexpr,
    LC: tl.constexpr, SERIAL: tl.constexpr, REVERSE: tl.constexpr,
    HAS_STATE: tl.constexpr, SEG: tl.constexpr, EVEN: tl.constexpr, PREC: tl.constexpr,
    ST: tl.constexpr,
):  # fmt: skip
    """S = sum_t w_t x_t z_t^T and n = sum_t w_t (rho_t) x_t.

    Forward w_t is the weight of step t in the state at its chunk's end; in reverse that of the
    state that enters the chunk, at t, and S is the gradient of that state over `scale`.

    SERIAL: a thread block takes its tile through all chunks and writes it at every border: the
    state that enters, slot NC the last; in reverse the gradient of the state that leaves, and
    `inner`, its product with that state. Otherwise a thread block per chunk writes what it adds,
    and `scan_chunk_states` does the rest: for few heads, whose serial thread blocks would leave SMs
    idle.
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
    slots = bh * (NC if REVERSE else NC + 1)
    o_x = ((bh // H) * T * H + bh % H) * DX
    o_z = ((bh // H) * T * H + bh % H) * DZ
    cx, cz = jx * BX + tl.arange(0, BX), jz * BZ + tl.arange(0, BZ)
    o = tl.arange(0, L)
    o_s = cx[None, :] * DZ + cz[:, None]
    inside = (cx[None, :] < DX) & (cz[:, None] < DZ)
    dtype = s_p.dtype.element_ty
    m_p += bh * (NC + 1)
    rest_in, rest_out = _rests(m_p, NC)
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
    through, ref, ref_rest = _decay_and_reference(chunk_p, m_p, through_p, bh, c, NC, REVERSE)
    # Those of this chunk, set at every border. Were they set to `ref` here, Triton (3.6 to 3.9)
    # would keep them so in every chunk (test_kernel_sources.py).
    own_ref, own_rest = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for t in tl.range(0, NC * STEPS if SERIAL else STEPS, num_stages=ST):
        if SERIAL:
            c = NC - 1 - t // STEPS if REVERSE else t // STEPS
            if t % STEPS == 0:
                slot = slots + c
                if REVERSE:
                    leaving = bh * (NC + 1) + c + 1
                    product = _product_with_state(
                        fs_p, fn_p, leaving, S, n, o_s, cx, jz, inside, DX, DZ
                    )
                    tl.store(inner_p + (bh * NC + c) * NX * NZ + tile, product * scale)
                _store_state(s_p, n_p, slot, S, n, o_s, cx, jz, inside, DX, DZ)
                S *= through
                n *= through
                own_ref, own_rest = ref, ref_rest
                following = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, NC - 1)
                through, ref, ref_rest = _decay_and_reference(
                    chunk_p, m_p, through_p, bh, following, NC, REVERSE
                )
        rows = (t % STEPS) * L + o
        here = tl.minimum(LC, T - c * LC)
        o_vec = (bh * NC + c) * LC + rows
        if not SERIAL:
            own_ref, own_rest = ref, ref_rest
        w = tl.exp((tl.load(w_p + o_vec) + own_ref) + (tl.load(wr_p + o_vec) + own_rest))  # [L]
        if SEG:
            seg, earlier, last = load_segments(seg_p + (bh // H) * T, T, c, rows, LC)
            w = tl.where(seg == (earlier if REVERSE else last), w, 0.0)
        if not EVEN:
            w = tl.where(rows < here, w, 0.0)
        p_x = x_p + o_x + tl.cast(c, tl.int64) * (LC * H * DX)
        p_z = z_p + o_z + tl.cast(c, tl.int64) * (LC * H * DZ)
        x = load_tile(p_x, rows, cx, H * DX, here, DX, EVEN, DX % BX == 0)  # [L, BX]
        zt = load_transposed_tile(p_z, rows, cz, H * DZ, here, DZ, EVEN, DZ % BZ == 0)  # [BZ, L]
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
            slot = slots + NC
            _store_state(s_p, n_p, slot, S, n, o_s, cx, jz, inside, DX, DZ)
    else:
        slot = slots + c
        _store_state(s_p, n_p, slot, S, n, o_s, cx, jz, inside, DX, DZ)


@jit_kernel
def scan_chunk_states(
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
    first = rounded(tl.load(m_p + bh * (NC + 1)))
    m_last = tl.load(m_p + bh * (NC + 1) + NC)
    rest_in = tl.exp(tl.load(m_p + bh * (NC + 1)) - first)
    rest_out = tl.exp(rounded(m_last) - m_last)
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
    in_bounds = o < SIZE
    through_p += bh * NC
    dtype = p.dtype.element_ty
    if HAS_STATE:  # in reverse: the last state's gradient
        s = tl.load(first_p + bh * SIZE + o, mask=in_bounds, other=0.0)
        s *= rest_out / scale if REVERSE else rest_in
    else:
        s = tl.zeros(o.shape, tl.float32)
    if REVERSE:
        p += bh * NC * SIZE
        f_p += bh * (NC + 1) * SIZE
        inner_p += bh * NC * PARTS + tile
        for k in tl.range(0, NC, num_stages=ST):
            c = NC - 1 - k
            added = tl.load(p + tl.cast(c, tl.int64) * SIZE + o, mask=in_bounds, other=0.0).to(
                tl.float32
            )
            state = tl.load(f_p + tl.cast(c + 1, tl.int64) * SIZE + o, mask=in_bounds, other=0.0)
            tl.store(inner_p + c * PARTS, tl.sum(state.to(tl.float32) * s, 0) * scale)
            tl.store(p + tl.cast(c, tl.int64) * SIZE + o, s.to(dtype), mask=in_bounds)
            s = tl.load(through_p + c) * s + added
        tl.store(last_p + bh * SIZE + o, s * rest_in * scale, mask=in_bounds)
    else:
        p += bh * (NC + 1) * SIZE
        for c in tl.range(0, NC, num_stages=ST):
            o_c = tl.cast(c, tl.int64) * SIZE + o
            added = tl.load(p + o_c, mask=in_bounds, other=0.0).to(tl.float32)
            tl.store(p + o_c, s.to(dtype), mask=in_bounds)
            s = tl.load(through_p + c) * s + added
        tl.store(p + tl.cast(NC, tl.int64) * SIZE + o, s.to(dtype), mask=in_bounds)
        tl.store(last_p + bh * SIZE + o, s * rest_out, mask=in_bounds)
