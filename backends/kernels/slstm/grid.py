"""The sLSTM in Triton for 16-bit numbers and heads too large for a cluster: a thread
block has 16 units by 8 rows, and exchanges h, and backwards the gate gradients, through the output
itself.

Outputs are filled with MISSING, words that no arithmetic makes, and a reader repeats its loads
until none is left. All thread blocks of a launch must be resident at once; where they cannot be,
the host launches one step at a time.

Its 8 warps take a part of each sum (warp.py), with their part of the recurrent kernel in
registers, and meet once a step. The cells are those of the first four warps' lanes: unit g, or
g + 8, in row 2 q, or 2 q + 1.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm import mailbox, warp
from keras_xlstm.backends.kernels.slstm.cell import NEVER, cell, cell_gradient, jit_kernel
from keras_xlstm.backends.kernels.slstm.cluster import AHEAD, first_state, hold_cell, hold_gradients

LANES = tl.constexpr(256)


@triton.jit
def _together(x, LANES: tl.constexpr):
    """x of the lane whose unit is the other one of a pair."""
    return warp.other(x.to(tl.int32, bitcast=True), LANES).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(word, low, high, dtype: tl.constexpr):
    low *= warp.number(word & 0xFFFF, dtype)
    high *= warp.number((word >> 16) & 0xFFFF, dtype)
    return warp.pair(low, high, dtype)


@triton.jit
def _recurrent(
    i, f, z, v, words, R, starts, scale, memory, sums, lane, at, dtype: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The cells' i, f, z, o with what h before adds to them."""
    zero = tl.zeros((LANES,), tl.float32)
    a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for j in tl.static_range(2 * CHUNKS):
        w0, w1 = words[2 * j], words[2 * j + 1]
        if starts is not None:
            w0, w1 = tl.where(starts, 0, w0), tl.where(starts, 0, w1)
        if len(scale) > 0:
            w0 = _scaled(w0, scale[4 * j], scale[4 * j + 1], dtype)
            w1 = _scaled(w1, scale[4 * j + 2], scale[4 * j + 3], dtype)
        a0, a1, a2, a3 = warp.product(R, 16 * j, w0, w1, a0, a1, a2, a3, dtype, LANES)
        a4, a5, a6, a7 = warp.product(R, 16 * j + 4, w0, w1, a4, a5, a6, a7, dtype, LANES)
        s0, s1, s2, s3 = warp.product(R, 16 * j + 8, w0, w1, s0, s1, s2, s3, dtype, LANES)
        s4, s5, s6, s7 = warp.product(R, 16 * j + 12, w0, w1, s4, s5, s6, s7, dtype, LANES)
    place = sums + lane // 32 * 512 + lane % 32 * 4
    mailbox.put_gates(memory, place, a0, a2, a4, a6)
    mailbox.put_gates(memory, place + 128, a1, a3, a5, a7)
    mailbox.put_gates(memory, place + 256, s0, s2, s4, s6)
    mailbox.put_gates(memory, place + 384, s1, s3, s5, s7)
    mailbox.meet_here(lane)
    di, df, dz, dv = zero, zero, zero, zero
    for part in tl.static_range(8):
        place = sums + part * 512 + lane % 128 * 4
        pi, pf, pz, pv = mailbox.get_gates(memory, place, at)
        di, df, dz, dv = di + pi, df + pf, dz + pz, dv + pv
    return i + di, f + df, z + dz, v + dv


@triton.jit
def _place(group, H, D: tl.constexpr):
    """This thread block's first unit, head and first row, of those from `group` on; lanes, their
    warps, g and q."""
    group += tl.program_id(0) // (D // 16)
    lane = tl.arange(0, LANES)
    units = tl.program_id(0) % (D // 16) * 16
    return units, group % H, group // H * 8, lane, lane // 32, lane // 4 % 8, lane % 4


@triton.jit
def _cells(units, first, w, g, q, B):
    """Lanes' units and rows, and which have a cell."""
    b = (first + 2 * q + w % 2).to(tl.int64)
    return units + g + w // 2 % 2 * 8, b, ((b < B) & (w < 4)).to(tl.int32)


@triton.jit
def _load_kernel_columns(
    R_p, head, units, chunk, w, g, q, D: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """A lane's part of R for `forward`: rows are gates by units, columns the units before."""
    R = ()
    for j in tl.static_range(2 * CHUNKS):
        new = (chunk + j // 2 >= w * CHUNKS).to(tl.int32)
        for part in tl.static_range(16):  # as in cluster.py; units g, then g + 8
            k = (chunk + j // 2) * 32 + q * 8 + j % 2 * 4 + part // 2 % 2 * 2
            p = R_p + (head * D + k).to(tl.int64) * 4 * D + (part // 4 % 2 * 2 + part % 2) * D
            p += units + part // 8 * 8 + g
            R += (warp.load_half(p, new) | (warp.load_half(p + 4 * D, new) << 16),)
    return R


@triton.jit
def _load_kernel_rows(
    R_p, head, units, chunk, w, g, q, D: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """A lane's part of R for `backward`: rows are units, columns a gate's units."""
    R = ()
    for j in tl.static_range(2 * CHUNKS):
        new = chunk + j // 2 >= w % 2 * CHUNKS
        for part in tl.static_range(4):  # units g, g + 8; columns 0 to 7, 8 to 15
            k = (chunk + j // 2) * 32 + q * 8 + j % 2 * 4 + part // 2 * 2
            p = R_p + (head * D + units + g + part % 2 * 8).to(tl.int64) * 4 * D + w // 2 * D + k
            R += (tl.where(new, warp.load_pair(p), 0),)
    return R


@triton.jit
def _gradient_of_h(
    dg, R, memory, sums, lane, w, dtype: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """What the gate gradients of the step after add to the gradient of h."""
    zero = tl.zeros((LANES,), tl.float32)
    p0, p1, p2, p3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero, zero
    for j in tl.static_range(CHUNKS):
        w0, w1, w2, w3 = dg[4 * j], dg[4 * j + 1], dg[4 * j + 2], dg[4 * j + 3]
        p0, p1, p2, p3 = warp.product(R, 8 * j, w0, w1, p0, p1, p2, p3, dtype, LANES)
        s0, s1, s2, s3 = warp.product(R, 8 * j + 4, w2, w3, s0, s1, s2, s3, dtype, LANES)
    place = sums + w * 128 + lane % 32
    mailbox.put(memory, place, (p0 + s0).to(tl.int32, bitcast=True))
    mailbox.put(memory, place + 32, (p1 + s1).to(tl.int32, bitcast=True))
    mailbox.put(memory, place + 64, (p2 + s2).to(tl.int32, bitcast=True))
    mailbox.put(memory, place + 96, (p3 + s3).to(tl.int32, bitcast=True))
    mailbox.meet_here(lane)
    back = zero
    for part in tl.static_range(8):
        back += mailbox.get(memory, sums + part * 128 + lane % 128)
    return back


@triton.jit
def _store_gates(out, step, odd, di, df, dz, do, at, dtype: tl.constexpr):
    """Words of two units: an even lane stores those of gates i and f, an odd one of z and o."""
    own = warp.pair(tl.where(odd, dz, di), tl.where(odd, do, df), dtype)
    got = warp.pair(tl.where(odd, di, dz), tl.where(odd, df, do), dtype)
    got = warp.other(got, LANES)
    low, high = tl.where(odd, got, own), tl.where(odd, own, got)
    warp.store_pair(out, (low & 0xFFFF) | (high << 16), at)
    warp.store_pair(out + step, ((low >> 16) & 0xFFFF) | (high & -65536), at)


@jit_kernel
def forward(
    x_p, R_p, bias_p, hold_p, reset_p, scale_p, first_p, h0_p, c0_p, n0_p, m0_p,
    h_p, saved_p, h1_p, c1_p, n1_p, m1_p, memory_p, B, T, H, start, stop, group,
    D: tl.constexpr, EXP_FORGET: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Steps start to stop - 1. `first_p` is h0 in h's dtype, or None; `group` the first one."""
    dtype: tl.constexpr = h_p.dtype.element_ty
    ALL: tl.constexpr = D // 32  # chunks of h
    CHUNKS: tl.constexpr = (ALL + 7) // 8
    SUMS: tl.constexpr = 8 * 4 * 32 * 4  # words: all warps' part of every cell's four gates
    units, head, first, lane, w, g, q = _place(group, H, D)
    HD = H * D
    memory = mailbox.shared_memory(lane, memory_p, 2 * SUMS)
    # The last warps with work read some chunks twice, where there are too few; R is zero for those.
    chunk = tl.minimum(w * CHUNKS, ALL - CHUNKS)
    all_lanes = tl.full((LANES,), 1, tl.int32)
    R = _load_kernel_columns(R_p, head, units, chunk, w, g, q, D, CHUNKS)
    b_read = tl.minimum(first + g, B - 1).to(tl.int64)
    scale = ()
    if scale_p is not None:
        row = scale_p + b_read * HD + head * D + chunk * 32 + q * 8
        for j in tl.static_range(8 * CHUNKS):
            scale += (warp.load(row + j // 8 * 32 + j % 8, all_lanes),)

    u, b, at = _cells(units, first, w, g, q, B)
    at_out = at * (g % 2 == 0).to(tl.int32)
    o = b * HD + head * D + u
    zero = tl.zeros((LANES,), tl.float32)
    if bias_p is not None:
        bias = bias_p + head * D + u
        bi, bf = warp.load(bias, all_lanes), warp.load(bias + HD, all_lanes)
        bz, bo = warp.load(bias + 2 * HD, all_lanes), warp.load(bias + 3 * HD, all_lanes)
    if h0_p is not None:
        h = warp.load(h0_p + o, at)
        c, n, m = first_state(c0_p, n0_p, m0_p, o, at)
    else:
        h, c, n, m = zero, zero, zero, zero + NEVER
    sums = 0
    o = (b * T + start) * HD + head * D + u
    x = x_p + (b * T + start) * 4 * HD + head * D + u
    read = h_p + (b_read * T + start - 1) * HD + head * D + chunk * 32 + q * 8
    xi, xf, xz, xo = warp.load_gates(x, HD, at)
    # A lane of the first warp asks for gate q of 16 units in row g; one of the second for where
    # h will be, which was filled too long ago to be in the cache that all thread blocks read.
    asks = tl.where(w == 1, (q == 0).to(tl.int32), (w == 0).to(tl.int32))
    ahead, unit = b_read * T + start + AHEAD, head * D + units
    ahead = tl.where(w == 0, x_p + (ahead * 4 + q) * HD + unit, h_p + ahead * HD + unit)
    next_ahead = tl.where(w == 0, 4 * HD, HD)
    for step in range(start, stop):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        i, f, z, v = warp.numbers(xi, xf, xz, xo, dtype)
        x += 4 * HD
        xi, xf, xz, xo = warp.load_gates(x, HD, at * (t + 1 < stop).to(tl.int32))
        warp.soon(ahead, asks * (t + AHEAD < stop).to(tl.int32))
        ahead += next_ahead
        if bias_p is not None:
            i, f, z, v = i + bi, f + bf, z + bz, v + bo
        h_old, c_old, n_old, m_old = h, c, n, m
        if reset_p is not None:
            starts = warp.load_flag(reset_p + b_read * T + t, all_lanes) != 0
            m = tl.where(warp.load_flag(reset_p + b * T + t, at) != 0, NEVER, m)
        else:
            starts = None
        if t > 0:
            words = mailbox.receive_far(read, CHUNKS, WAIT)
            i, f, z, v = _recurrent(
                i, f, z, v, words, R, starts, scale, memory, sums, lane, at, dtype, CHUNKS
            )  # fmt: skip
            sums = SUMS - sums
        elif first_p is not None:
            before = first_p + b_read * HD + head * D + chunk * 32 + q * 8
            i, f, z, v = _recurrent(
                i, f, z, v, mailbox.receive_far(before, CHUNKS, False), R, starts, scale, memory,
                sums, lane, at, dtype, CHUNKS,
            )  # fmt: skip
            sums = SUMS - sums
        read += HD
        h, c, n, m, i, f, z, v, slope = cell(i, f, z, v, c, n, m, EXP_FORGET, True)
        if hold_p is not None:
            h, c, n, m = hold_cell(hold_p + b * T + t, at, h, c, n, m, h_old, c_old, n_old, m_old)
        warp.store_pair(h_p + o, warp.pair(h, _together(h, LANES), dtype), at_out)
        mailbox.meet_here(lane)  # nobody looks for the others' earlier
        if saved_p is not None:
            warp.store_four(saved_p + o * 8, i, f, z, v, at)
            warp.store_four(saved_p + o * 8 + 4, c, n, slope, zero, at)
        o += HD
    o = b * HD + head * D + u
    warp.store(h1_p + o, h, at)
    warp.store(c1_p + o, c, at)
    warp.store(n1_p + o, n, at)
    warp.store(m1_p + o, tl.where(m <= NEVER / 2, 0.0, m), at)


@jit_kernel
def backward(
    dh_p, saved_p, R_p, hold_p, reset_p, scale_p, c0_p, n0_p, dh1_p, dc1_p, dn1_p,
    dx_p, dh0_p, dc0_p, dn0_p, memory_p, B, T, H, start, stop, group, clip,
    D: tl.constexpr, EXP_FORGET: tl.constexpr, CLIP: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Steps stop - 1 down to start; -1 stands for the initial state. Two warps a gate."""
    dtype: tl.constexpr = dx_p.dtype.element_ty
    ALL: tl.constexpr = D // 32  # chunks of a gate
    CHUNKS: tl.constexpr = (ALL + 1) // 2
    SUMS: tl.constexpr = 8 * 4 * 32  # words: all warps' part of every cell
    units, head, first, lane, w, g, q = _place(group, H, D)
    HD = H * D
    memory = mailbox.shared_memory(lane, memory_p, 2 * SUMS)
    chunk = tl.minimum(w % 2 * CHUNKS, ALL - CHUNKS)
    R = _load_kernel_rows(R_p, head, units, chunk, w, g, q, D, CHUNKS)
    u, b, at = _cells(units, first, w, g, q, B)
    o_state = b * HD + head * D + u
    zero = tl.zeros((LANES,), tl.float32)
    scale = zero
    if scale_p is not None:
        scale = warp.load(scale_p + o_state, at)
    dh, dc = warp.load(dh1_p + o_state, at), warp.load(dc1_p + o_state, at)
    dn = warp.load(dn1_p + o_state, at)
    c_first, n_first = zero, zero
    if c0_p is not None:
        c_first, n_first = warp.load(c0_p + o_state, at), warp.load(n0_p + o_state, at)
    # Of a pair of lanes, units u and u + 1, the even one has the words of gates i and f, the odd
    # one those of z and o.
    odd = g % 2 == 1
    gate = 2 * (g % 2)
    out = dx_p + ((b * T + stop - 1) * 4 + gate) * HD + head * D + u - g % 2
    b_read = tl.minimum(first + g, B - 1).to(tl.int64)
    read = dx_p + ((b_read * T + stop) * 4 + w // 2) * HD + head * D + chunk * 32 + q * 8
    sums = 0

    o = (b * T + stop - 1) * HD + head * D + u
    in_bounds = at * (stop > 0).to(tl.int32)
    c, n, slope, _ = warp.load_four(saved_p + o * 8 + 4, in_bounds)
    i, f, z, v = warp.load_four(saved_p + o * 8, in_bounds)
    up = warp.load_half(dh_p + o, in_bounds)
    in_bounds = at * (stop > 1).to(tl.int32)
    c_in, n_in, slope_in, _ = warp.load_four(saved_p + (o - HD) * 8 + 4, in_bounds)
    # A lane asks for its own cell's (a prefetch brings 32 bytes); one of the fifth warp for dh of
    # 16 units, one of the sixth for where the gradient of gate q will be (see `forward`).
    ahead = saved_p + (o - AHEAD * HD) * 8
    asks = tl.where(w == 4, (q == 0).to(tl.int32), (w == 5).to(tl.int32))
    more, unit = b_read * T + stop - 1 - AHEAD, head * D + units
    more = tl.where(w == 4, dh_p + more * HD + unit, dx_p + (more * 4 + q) * HD + unit)
    next_ahead = tl.where(w == 4, HD, 4 * HD)
    for step in range(0, stop - start):
        t = stop - 1 - tl.cast(step, tl.int32)
        # What the next step needs arrives while this one is computed.
        o -= HD
        in_bounds = at * ((t > 0) & (t > start)).to(tl.int32)
        next_i, next_f, next_z, next_v = warp.load_four(saved_p + o * 8, in_bounds)
        next_up = warp.load_half(dh_p + o, in_bounds)
        in_bounds = at * ((t > 1) & (t > start)).to(tl.int32)
        last_c, last_n, last_slope, _ = warp.load_four(saved_p + (o - HD) * 8 + 4, in_bounds)
        warp.soon(ahead, at * (t - AHEAD > start).to(tl.int32))
        warp.soon(more, asks * (t - AHEAD > start).to(tl.int32))
        ahead -= 8 * HD
        more -= next_ahead
        if t + 1 < T:
            dg = mailbox.receive_far(read, CHUNKS, WAIT)
            back = _gradient_of_h(dg, R, memory, sums, lane, w, dtype, CHUNKS)
            sums = SUMS - sums
            if scale_p is not None:
                back *= scale
            if CLIP:
                back = tl.minimum(tl.maximum(back, -clip), clip)
            if reset_p is not None:
                back = tl.where(warp.load_flag(reset_p + b * T + t + 1, at) != 0, 0.0, back)
            if hold_p is not None:  # a held step's gate gradients are zero: so is `back`
                held = warp.load_flag(hold_p + b * T + t + 1, at) != 0
                back += tl.where(held, dh, 0.0)
            dh = back
        read -= 4 * HD
        if t >= 0:
            dh += warp.number(up, dtype)
            if t == 0:
                c_in, n_in = c_first, n_first
            di, df, dz, do, new_dc, new_dn = cell_gradient(
                dh, dc, dn, c, n, c_in, n_in, i, f, z, v, slope, EXP_FORGET, True
            )
            if hold_p is not None:
                di, df, dz, do, new_dc, new_dn, _through = hold_gradients(
                    hold_p + b * T + t, at, di, df, dz, do, new_dc, new_dn, dc, dn
                )
            dc, dn = new_dc, new_dn
            _store_gates(out, HD, odd, di, df, dz, do, at, dtype)
            mailbox.meet_here(lane)
            out -= 4 * HD
        i, f, z, v, slope, up = next_i, next_f, next_z, next_v, slope_in, next_up
        c, n, c_in, n_in, slope_in = c_in, n_in, last_c, last_n, last_slope
    warp.store(dh0_p + o_state, dh, at)
    warp.store(dc0_p + o_state, dc, at)
    warp.store(dn0_p + o_state, dn, at)
