"""The sLSTM in Triton for 16-bit numbers, a head's programs one cluster: they exchange h, and
backwards the gate gradients, through each other's shared memory.

Every warp works for itself, with its part of the recurrent kernel in registers (slstm_lanes.py):
forwards 8 units by 8 rows, all four gates; backwards four warps share 16 units by 8 rows, a gate's
part of the sum each. What a step exchanges has a slot of three in turn, in every program: a word is
MISSING until it is there. Who has read all of a slot knows that all have read the slot before: it
is cleared for the step after next.

A slot's rows are chunks of 16 words (32 units), in odd rows swapped in pairs: lanes that read two
rows at once then read different banks of the memory.
"""

import triton
import triton.language as tl
from keras_xlstm.backends.triton import slstm_lanes as lanes
from keras_xlstm.backends.triton.slstm_kernels import NEVER, _kernel
from keras_xlstm.backends.triton.slstm_lanes import MISSING


@triton.jit
def _cell(i, f, z, o, c, n, m, EXP_FORGET: tl.constexpr):
    """Eqs. 8-17, and the slope of log f."""
    if EXP_FORGET:
        log_f, slope = f, f
    else:
        y = lanes.exp(-tl.abs(f))
        log_f = tl.minimum(f, 0.0) - lanes.log(1.0 + y)
        slope = tl.where(f < 0.0, 1.0, y) * lanes.reciprocal(1.0 + y)
    new_m = tl.maximum(log_f + m, i)
    i = lanes.exp(i - new_m)
    f = lanes.exp((m - new_m) + log_f)
    y = lanes.exp(-2.0 * tl.abs(z))
    far = (1.0 - y) * lanes.reciprocal(1.0 + y)
    t = z * z
    near = z * (1.0 + t * (-1 / 3 + t * (2 / 15 + t * (-17 / 315 + t * (62 / 2835)))))
    z = tl.where(t < 0.06, near, tl.where(z < 0.0, -far, far))
    o = lanes.reciprocal(1.0 + lanes.exp(-o))
    c = f * c + i * z
    n = f * n + i
    return o * (c / n), c, n, new_m, i, f, z, o, slope


@triton.jit
def _raw(p, step, at):
    """Bits of i, f, z, o at p, which are `step` apart."""
    return (
        lanes.load_half(p, at), lanes.load_half(p + step, at), lanes.load_half(p + 2 * step, at),
        lanes.load_half(p + 3 * step, at),
    )  # fmt: skip


@triton.jit
def _numbers(i, f, z, o, dtype: tl.constexpr):
    return (
        lanes.number(i, dtype), lanes.number(f, dtype), lanes.number(z, dtype),
        lanes.number(o, dtype),
    )  # fmt: skip


@triton.jit
def _first(c0_p, n0_p, m0_p, o, at):
    """c, n, m of a state; what holds nothing (the official zeros) is a fresh start."""
    c, n, m = lanes.load(c0_p + o, at), lanes.load(n0_p + o, at), lanes.load(m0_p + o, at)
    return c, n, tl.where(n != 0.0, m, NEVER)


@triton.jit
def _place(row, unit, D: tl.constexpr):
    """The word of a row (of 8) and an even unit in a slot."""
    chunk = unit // 32
    if D % 64 == 0:
        chunk ^= row & 1
    return row * (D // 2) + chunk * 16 + unit % 32 // 2


@triton.jit
def _clear(memory, word, lane, FROM: tl.constexpr, TO: tl.constexpr, LANES: tl.constexpr):
    """A slot's words, between all lanes."""
    for r in tl.static_range((TO - FROM + 4 * LANES - 1) // (4 * LANES)):
        e = FROM + (r * LANES + lane) * 4
        lanes.put_four(memory, word + e, tl.zeros_like(e) + MISSING, (e < TO).to(tl.int32))


@triton.jit
def _next(slot, SLOT: tl.constexpr):
    return tl.where(slot == 2 * SLOT, 0, slot + SLOT)


@_kernel
def forward(
    x_p, R_p, bias_p, hold_p, reset_p, scale_p, h0_p, c0_p, n0_p, m0_p,
    h_p, saved_p, h1_p, c1_p, n1_p, m1_p, memory_p, B, T, H,
    D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EXP_FORGET: tl.constexpr,
):  # fmt: skip
    """N programs of W warps, 8 N W = D. A lane's two cells are unit u in rows 2 q and 2 q + 1 of 8;
    saved (B, T, H, D, 8): i, f, z, o as they act, c, n, the slope of f."""
    dtype: tl.constexpr = h_p.dtype.element_ty
    LANES: tl.constexpr = 32 * W
    CHUNKS: tl.constexpr = D // 32
    SLOT: tl.constexpr = 4 * D
    rank, group = tl.program_id(0) % N, tl.program_id(0) // N
    head, first = group % H, group // H * 8
    lane = tl.arange(0, LANES)
    g, q = lane // 4 % 8, lane % 4
    u = (rank * W + lane // 32) * 8 + g
    HD = H * D
    b0 = (first + 2 * q).to(tl.int64)
    b1 = b0 + 1
    at0, at1 = (b0 < B).to(tl.int32), (b1 < B).to(tl.int32)
    memory = lanes.shared_memory(lane, memory_p, 3 * SLOT)
    _clear(memory, 0, lane, 0, 3 * SLOT, LANES)

    # a of the products: rows are gates by units, columns the units before. Column 8 h + 2 q + l of
    # the product s of a chunk is unit 8 q + 4 s + 2 h + l of it: what a lane reads at once.
    R, all_lanes = (), tl.full((LANES,), 1, tl.int32)
    for j in tl.static_range(2 * CHUNKS):
        for part in tl.static_range(8):  # gates i, f; columns 0 to 7, 8 to 15; gates z, o
            k = j // 2 * 32 + q * 8 + j % 2 * 4 + part // 2 % 2 * 2
            p = R_p + (head * D + k).to(tl.int64) * 4 * D + (part // 4 * 2 + part % 2) * D + u
            low, high = lanes.load_half(p, all_lanes), lanes.load_half(p + 4 * D, all_lanes)
            R += (low | (high << 16),)
    lanes.meet(lane, N)

    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u  # of states
    zero = tl.zeros((LANES,), tl.float32)
    scale0, scale1 = zero + 1.0, zero + 1.0
    if scale_p is not None:
        scale0, scale1 = lanes.load(scale_p + o0, at0), lanes.load(scale_p + o1, at1)
    if bias_p is not None:
        p = bias_p + head * D + u
        bi, bf = lanes.load(p, all_lanes), lanes.load(p + HD, all_lanes)
        bz, bo = lanes.load(p + 2 * HD, all_lanes), lanes.load(p + 3 * HD, all_lanes)
    if h0_p is not None:
        h0, h1 = lanes.load(h0_p + o0, at0), lanes.load(h0_p + o1, at1)
        c0, n0, m0 = _first(c0_p, n0_p, m0_p, o0, at0)
        c1, n1, m1 = _first(c0_p, n0_p, m0_p, o1, at1)
    else:
        h0, c0, n0, m0 = zero, zero, zero, zero + NEVER
        h1, c1, n1, m1 = h0, c0, n0, m0
    # Of a pair of lanes, units u and u + 1 (or u - 1), the even one has the words of its even row.
    odd = g % 2 == 1
    row = 2 * q + g % 2
    sent = _place(row, u - g % 2, D)
    out = (first + row).to(tl.int64)
    at_out = (out < B).to(tl.int32)
    out = h_p + out * T * HD + head * D + u - g % 2
    read, swap = g * (D // 2) + q * 4, (g % 2) * 16 if D % 64 == 0 else g * 0
    slot = 0
    lanes.send(memory, sent, _two_units(h0 * scale0, h1 * scale1, odd, dtype, LANES), N)

    b_read = tl.minimum(first + g, B - 1).to(tl.int64) * T
    o0, o1 = (b0 * T) * HD + head * D + u, (b1 * T) * HD + head * D + u  # of steps
    x0, x1 = x_p + (b0 * T) * 4 * HD + head * D + u, x_p + (b1 * T) * 4 * HD + head * D + u
    # Inputs arrive while two steps are computed: memory takes longer than one.
    xi0, xf0, xz0, xo0 = _raw(x0, HD, at0)
    xi1, xf1, xz1, xo1 = _raw(x1, HD, at1)
    x0 += 4 * HD
    x1 += 4 * HD
    later = (T > 1).to(tl.int32)
    yi0, yf0, yz0, yo0 = _raw(x0, HD, at0 * later)
    yi1, yf1, yz1, yo1 = _raw(x1, HD, at1 * later)
    for step in range(0, T):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        i0, f0, z0, v0 = _numbers(xi0, xf0, xz0, xo0, dtype)
        i1, f1, z1, v1 = _numbers(xi1, xf1, xz1, xo1, dtype)
        xi0, xf0, xz0, xo0, xi1, xf1, xz1, xo1 = yi0, yf0, yz0, yo0, yi1, yf1, yz1, yo1
        x0 += 4 * HD
        x1 += 4 * HD
        later = (t + 2 < T).to(tl.int32)
        yi0, yf0, yz0, yo0 = _raw(x0, HD, at0 * later)
        yi1, yf1, yz1, yo1 = _raw(x1, HD, at1 * later)
        if bias_p is not None:
            i0, f0, z0, v0 = i0 + bi, f0 + bf, z0 + bz, v0 + bo
            i1, f1, z1, v1 = i1 + bi, f1 + bf, z1 + bz, v1 + bo
        h0_old, c0_old, n0_old, m0_old = h0, c0, n0, m0
        h1_old, c1_old, n1_old, m1_old = h1, c1, n1, m1
        if reset_p is not None:
            starts = lanes.load_flag(reset_p + b_read + t, all_lanes)
            m0 = tl.where(lanes.load_flag(reset_p + b0 * T + t, at0) != 0, NEVER, m0)
            m1 = tl.where(lanes.load_flag(reset_p + b1 * T + t, at1) != 0, NEVER, m1)

        h = lanes.receive(memory, slot + read, swap, CHUNKS)
        # Products of even and odd columns do not wait for each other.
        s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in tl.static_range(CHUNKS):
            w0, w1, w2, w3 = h[4 * j], h[4 * j + 1], h[4 * j + 2], h[4 * j + 3]
            if reset_p is not None:
                w0, w1 = tl.where(starts != 0, 0, w0), tl.where(starts != 0, 0, w1)
                w2, w3 = tl.where(starts != 0, 0, w2), tl.where(starts != 0, 0, w3)
            i0, i1, f0, f1 = lanes.product(R, 16 * j, w0, w1, i0, i1, f0, f1, dtype, LANES)
            z0, z1, v0, v1 = lanes.product(R, 16 * j + 4, w0, w1, z0, z1, v0, v1, dtype, LANES)
            s0, s1, s2, s3 = lanes.product(R, 16 * j + 8, w2, w3, s0, s1, s2, s3, dtype, LANES)
            s4, s5, s6, s7 = lanes.product(R, 16 * j + 12, w2, w3, s4, s5, s6, s7, dtype, LANES)
        i0, i1, f0, f1 = i0 + s0, i1 + s1, f0 + s2, f1 + s3
        z0, z1, v0, v1 = z0 + s4, z1 + s5, v0 + s6, v1 + s7

        h0, c0, n0, m0, i0, f0, z0, v0, slope0 = _cell(i0, f0, z0, v0, c0, n0, m0, EXP_FORGET)
        h1, c1, n1, m1, i1, f1, z1, v1, slope1 = _cell(i1, f1, z1, v1, c1, n1, m1, EXP_FORGET)
        if hold_p is not None:
            held = lanes.load_flag(hold_p + b0 * T + t, at0) != 0
            h0, c0 = tl.where(held, h0_old, h0), tl.where(held, c0_old, c0)
            n0, m0 = tl.where(held, n0_old, n0), tl.where(held, m0_old, m0)
            held = lanes.load_flag(hold_p + b1 * T + t, at1) != 0
            h1, c1 = tl.where(held, h1_old, h1), tl.where(held, c1_old, c1)
            n1, m1 = tl.where(held, n1_old, n1), tl.where(held, m1_old, m1)
        free = _next(_next(slot, SLOT), SLOT)
        _clear(memory, free, lane, 0, SLOT, LANES)
        slot = _next(slot, SLOT)
        word = _two_units(h0, h1, odd, dtype, LANES)
        if scale_p is None:
            lanes.send(memory, slot + sent, word, N)
        else:
            lanes.send(memory, slot + sent, _two_units(h0 * scale0, h1 * scale1, odd, dtype, LANES), N)
        lanes.store_pair(out, word, at_out)
        out += HD
        if saved_p is not None:
            lanes.store_four(saved_p + o0 * 8, i0, f0, z0, v0, at0)
            lanes.store_four(saved_p + o0 * 8 + 4, c0, n0, slope0, zero, at0)
            lanes.store_four(saved_p + o1 * 8, i1, f1, z1, v1, at1)
            lanes.store_four(saved_p + o1 * 8 + 4, c1, n1, slope1, zero, at1)
        o0 += HD
        o1 += HD
    lanes.meet(lane, N)  # nobody may send to a program that is gone
    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u
    lanes.store(h1_p + o0, h0, at0)
    lanes.store(h1_p + o1, h1, at1)
    lanes.store(c1_p + o0, c0, at0)
    lanes.store(c1_p + o1, c1, at1)
    lanes.store(n1_p + o0, n0, at0)
    lanes.store(n1_p + o1, n1, at1)
    lanes.store(m1_p + o0, tl.where(m0 <= NEVER / 2, 0.0, m0), at0)
    lanes.store(m1_p + o1, tl.where(m1 <= NEVER / 2, 0.0, m1), at1)


@triton.jit
def _two_units(x0, x1, odd, dtype: tl.constexpr, LANES: tl.constexpr):
    """Of unit u, rows 2 q and 2 q + 1, a word of units u and u + 1 (or u - 1) in one row."""
    own = lanes.pair(x0, x1, dtype)
    # An even lane gives its odd row, an odd lane its even one.
    got = lanes.other(own, LANES)
    return tl.where(odd, ((got >> 16) & 0xFFFF) | (own & -65536), (own & 0xFFFF) | (got << 16))


@_kernel
def backward(
    dh_p, saved_p, R_p, hold_p, reset_p, scale_p, c0_p, n0_p, dh1_p, dc1_p, dn1_p,
    dx_p, dh0_p, dc0_p, dn0_p, memory_p, B, T, H, clip,
    D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EXP_FORGET: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """N programs of W warps, 4 N W = D. A lane's cell is one of a tile's 16 units by 8 rows."""
    dtype: tl.constexpr = dx_p.dtype.element_ty
    LANES: tl.constexpr = 32 * W
    CHUNKS: tl.constexpr = D // 32
    SCRATCH: tl.constexpr = 128 * W  # where a tile's warps add up, in a slot that is free
    SLOT: tl.constexpr = max(16 * D, SCRATCH)
    rank, group = tl.program_id(0) % N, tl.program_id(0) // N
    head, first = group % H, group // H * 8
    lane = tl.arange(0, LANES)
    s, g, q = lane // 32 % 4, lane // 4 % 8, lane % 4
    tile = lane // 128
    units = (rank * (W // 4) + tile) * 16
    HD = H * D
    memory = lanes.shared_memory(lane, memory_p, 3 * SLOT)
    _clear(memory, 0, lane, 0, 3 * SLOT, LANES)

    # a of the products: rows are the tile's units, columns gate s of all units; as in `forward`.
    R, all_lanes = (), tl.full((LANES,), 1, tl.int32)
    for j in tl.static_range(2 * CHUNKS):
        for part in tl.static_range(4):  # units g, g + 8; columns 0 to 7, 8 to 15
            k = j // 2 * 32 + q * 8 + j % 2 * 4 + part // 2 * 2
            p = R_p + (head * D + units + g + part % 2 * 8).to(tl.int64) * 4 * D + s * D + k
            low, high = lanes.load_half(p, all_lanes), lanes.load_half(p + 1, all_lanes)
            R += (low | (high << 16),)
    lanes.meet(lane, N)

    u, row = units + g + s // 2 * 8, 2 * q + s % 2
    b = (first + row).to(tl.int64)
    at = (b < B).to(tl.int32)
    o_state = b * HD + head * D + u
    zero = tl.zeros((LANES,), tl.float32)
    scale = zero
    if scale_p is not None:
        scale = lanes.load(scale_p + o_state, at)
    kept = lanes.load(dh1_p + o_state, at)
    dh = kept
    dc, dn = lanes.load(dc1_p + o_state, at), lanes.load(dn1_p + o_state, at)
    c_first, n_first = zero, zero
    if c0_p is not None:
        c_first, n_first = lanes.load(c0_p + o_state, at), lanes.load(n0_p + o_state, at)
    # Of a pair of lanes, units u and u + 1 (or u - 1), the even one has the words of gates i and f,
    # the odd one those of z and o.
    odd = g % 2 == 1
    gate = 2 * (g % 2)
    sent = gate * (4 * D) + _place(row, u - g % 2, D)
    out = dx_p + ((b * T + T - 1) * 4 + gate) * HD + head * D + u - g % 2
    read = s * (4 * D) + g * (D // 2) + q * 4
    swap = (g % 2) * 16 if D % 64 == 0 else g * 0
    scratch = tile * 512 + lane % 32  # words of a warp's four registers, 32 each
    slot = 0
    lanes.send(memory, sent, lane * 0, N)
    lanes.send(memory, sent + 4 * D, lane * 0, N)

    # What a step needs arrives while two are computed.
    o = (b * T + T - 1) * HD + head * D + u
    c, n, slope, _ = lanes.load_four(saved_p + o * 8 + 4, at)
    i, f, z, v = lanes.load_four(saved_p + o * 8, at)
    up = lanes.load_half(dh_p + o, at)
    o -= HD
    later = at * (T > 1).to(tl.int32)
    c_in, n_in, next_slope, _ = lanes.load_four(saved_p + o * 8 + 4, later)
    next_i, next_f, next_z, next_v = lanes.load_four(saved_p + o * 8, later)
    next_up = lanes.load_half(dh_p + o, later)
    for step in range(0, T + 1):
        t = T - 1 - tl.cast(step, tl.int32)
        o -= HD
        later = at * (t > 1).to(tl.int32)
        last_c, last_n, last_slope, _ = lanes.load_four(saved_p + o * 8 + 4, later)
        last_i, last_f, last_z, last_v = lanes.load_four(saved_p + o * 8, later)
        last_up = lanes.load_half(dh_p + o, later)
        c_in, n_in = tl.where(t == 0, c_first, c_in), tl.where(t == 0, n_first, n_in)

        dg = lanes.receive(memory, slot + read, swap, CHUNKS)
        p0, p1, p2, p3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in tl.static_range(CHUNKS):
            w0, w1, w2, w3 = dg[4 * j], dg[4 * j + 1], dg[4 * j + 2], dg[4 * j + 3]
            p0, p1, p2, p3 = lanes.product(R, 8 * j, w0, w1, p0, p1, p2, p3, dtype, LANES)
            s0, s1, s2, s3 = lanes.product(R, 8 * j + 4, w2, w3, s0, s1, s2, s3, dtype, LANES)
        free = _next(_next(slot, SLOT), SLOT)
        # Each warp adds up one register of all four: a cell of every lane.
        place = free + scratch + s * 128
        lanes.put(memory, place, (p0 + s0).to(tl.int32, bitcast=True), all_lanes)
        lanes.put(memory, place + 32, (p1 + s1).to(tl.int32, bitcast=True), all_lanes)
        lanes.put(memory, place + 64, (p2 + s2).to(tl.int32, bitcast=True), all_lanes)
        lanes.put(memory, place + 96, (p3 + s3).to(tl.int32, bitcast=True), all_lanes)
        _clear(memory, free, lane, SCRATCH, SLOT, LANES)
        lanes.meet_tile(tile)
        back = zero
        for w in tl.static_range(4):
            place = free + scratch + w * 128 + s * 32
            back += lanes.get(memory, place).to(tl.float32, bitcast=True)
            lanes.put(memory, place, lane * 0 + MISSING, all_lanes)

        if scale_p is not None:
            back *= scale
        if CLIP:
            back = tl.minimum(tl.maximum(back, -clip), clip)
        if reset_p is not None:
            after = at * (t + 1 < T).to(tl.int32)
            back = tl.where(lanes.load_flag(reset_p + b * T + t + 1, after) != 0, 0.0, back)
        dh = back + kept + lanes.number(up, dtype)
        # The cell's gradients; a held step has none but what goes through.
        r = tl.where(n == 0.0, 0.0, 1.0 / n)  # nothing there: a held fresh start
        y = v * r
        h = y * c
        new_dc, new_dn = dc + dh * y, dn - dh * h * r
        di = i * (z * new_dc + new_dn)
        df = f * (c_in * new_dc + n_in * new_dn)
        if not EXP_FORGET:
            df *= slope
        dz = i * new_dc * ((1.0 - z) * (1.0 + z))
        do = dh * h * (1.0 - v)
        kept, inside = zero, t >= 0
        if hold_p is not None:
            held = lanes.load_flag(hold_p + b * T + t, at * inside.to(tl.int32)) != 0
            di, df, dz = tl.where(held, 0.0, di), tl.where(held, 0.0, df), tl.where(held, 0.0, dz)
            do, kept = tl.where(held, 0.0, do), tl.where(held, dh, 0.0)
            inside = inside & (held == 0)
        dc, dn = tl.where(inside, f * new_dc, dc), tl.where(inside, f * new_dn, dn)
        own = lanes.pair(tl.where(odd, dz, di), tl.where(odd, do, df), dtype)
        got = lanes.pair(tl.where(odd, di, dz), tl.where(odd, df, do), dtype)
        got = lanes.other(got, LANES)
        low, high = tl.where(odd, got, own), tl.where(odd, own, got)
        word0 = (low & 0xFFFF) | (high << 16)
        word1 = ((low >> 16) & 0xFFFF) | (high & -65536)
        slot = _next(slot, SLOT)
        lanes.send(memory, slot + sent, word0, N)
        lanes.send(memory, slot + sent + 4 * D, word1, N)
        at_out = at * (t >= 0).to(tl.int32)
        lanes.store_pair(out, word0, at_out)
        lanes.store_pair(out + HD, word1, at_out)
        out -= 4 * HD
        i, f, z, v, slope, c, n, up = next_i, next_f, next_z, next_v, next_slope, c_in, n_in, next_up
        next_i, next_f, next_z, next_v, next_slope = last_i, last_f, last_z, last_v, last_slope
        c_in, n_in, next_up = last_c, last_n, last_up
    lanes.meet(lane, N)
    lanes.store(dh0_p + o_state, dh, at)
    lanes.store(dc0_p + o_state, dc, at)
    lanes.store(dn0_p + o_state, dn, at)
