"""The sLSTM in Triton for 16-bit numbers, the thread blocks of a head one cluster: they exchange h,
and backwards its gradients, through each other's shared memory.

A warp's cells are 8 units by 8 rows, two to a lane, with its part of the recurrent kernel in
registers (cluster_products.py). Forwards every warp needs the whole h. What a step sends goes to
one of three slots in turn in every thread block; a slot's words are MISSING until they come. A
thread block that has read all of a slot knows that all others have read the slot before, and clears
that one for the step after next. (Whoever stores there next has heard from this thread block again,
so after the clearing.) Backwards a thread block has the gate gradients of its own units, and sends
the others what these add to the gradients of h: half the bytes of the gate gradients. A word has
one reader, who clears it.

Rows of h are chunks of 16 words (32 units), in odd rows swapped in pairs: lanes that read two rows
at once then read different banks of the memory.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm import mailbox, warp
from keras_xlstm.backends.kernels.slstm.cell import NEVER, cell, cell_gradient, jit_kernel
from keras_xlstm.backends.kernels.slstm.cluster_products import (
    load_kernel_columns,
    load_kernel_rows,
    recurrent,
    send_products,
)
from keras_xlstm.backends.kernels.slstm.mailbox import MISSING

AHEAD = tl.constexpr(6)  # steps


@triton.jit
def first_state(c0_p, n0_p, m0_p, o, at):
    """c, n, m of a state; what holds nothing (the official zeros) is a fresh start."""
    c, n, m = warp.load(c0_p + o, at), warp.load(n0_p + o, at), warp.load(m0_p + o, at)
    return c, n, tl.where(n != 0.0, m, NEVER)


@triton.jit
def hold_cell(p, at, h, c, n, m, h_old, c_old, n_old, m_old):
    """A cell, as it was before where flag p is set."""
    held = warp.load_flag(p, at) != 0
    h, c = tl.where(held, h_old, h), tl.where(held, c_old, c)
    return h, c, tl.where(held, n_old, n), tl.where(held, m_old, m)


@triton.jit
def hold_gradients(p, at, di, df, dz, do, dc, dn, dc_old, dn_old):
    """And whether: a held step has no gradients but what goes through."""
    held = warp.load_flag(p, at) != 0
    di, df = tl.where(held, 0.0, di), tl.where(held, 0.0, df)
    dz, do = tl.where(held, 0.0, dz), tl.where(held, 0.0, do)
    return di, df, dz, do, tl.where(held, dc_old, dc), tl.where(held, dn_old, dn), held


@triton.jit
def _within(row, unit, COUNT: tl.constexpr):
    """The word of an even unit in its row of COUNT."""
    chunk = unit // 32
    if COUNT % 64 == 0:
        chunk ^= row & 1
    return chunk * 16 + unit % 32 // 2


@triton.jit
def _clear(memory, word, lane, FROM: tl.constexpr, TO: tl.constexpr, LANES: tl.constexpr):
    """A slot's words, between all lanes."""
    for r in tl.static_range((TO - FROM + 4 * LANES - 1) // (4 * LANES)):
        e = FROM + (r * LANES + lane) * 4
        mailbox.put(memory, word + e, tl.zeros_like(e) + MISSING, (e < TO).to(tl.int32), COUNT=4)


@triton.jit
def _next(slot, SLOT: tl.constexpr):
    return tl.where(slot == 2 * SLOT, 0, slot + SLOT)


@triton.jit
def _place(H, N: tl.constexpr, LANES: tl.constexpr):
    """This thread block's rank in its cluster, head and first row; its lanes."""
    rank, group = tl.program_id(0) % N, tl.program_id(0) // N
    head, first = group % H, group // H * 8
    return rank, head, first, tl.arange(0, LANES)


@triton.jit
def _load_bias(p, step, at):
    i, f = warp.load(p, at), warp.load(p + step, at)
    return i, f, warp.load(p + 2 * step, at), warp.load(p + 3 * step, at)


@triton.jit
def _store_two(p, o0, o1, x0, x1, at0, at1):
    """Of both cells of a lane."""
    warp.store(p + o0, x0, at0)
    warp.store(p + o1, x1, at1)


@triton.jit
def _save(p, i, f, z, o, c, n, slope, zero, at):
    warp.store_four(p, i, f, z, o, at)
    warp.store_four(p + 4, c, n, slope, zero, at)


@triton.jit
def _clipped(x, clip):
    return tl.minimum(tl.maximum(x, -clip), clip)


@triton.jit
def _unless(p, at, x):
    """x, or 0 where flag p is set."""
    return tl.where(warp.load_flag(p, at) != 0, 0.0, x)


@triton.jit
def _held_gradients(p, at, gradients, dc, dn, dh):
    """Gradients of i, f, z, o, c and n, and the part of h's gradient that a held step passes on."""
    di, df, dz, do, dc, dn, held = hold_gradients(p, at, *gradients, dc, dn)
    return (di, df, dz, do, dc, dn), tl.where(held, dh, 0.0)


@jit_kernel
def forward(
    x_p, R_p, bias_p, hold_p, reset_p, scale_p, h0_p, c0_p, n0_p, m0_p,
    h_p, saved_p, h1_p, c1_p, n1_p, m1_p, memory_p, B, T, H,
    D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EXP_FORGET: tl.constexpr,
):  # fmt: skip
    """N thread blocks of W warps, 8 N W = D. A lane's two cells are unit u in rows 2 q and 2 q + 1
    of 8; saved (B, T, H, D, 8): i, f, z, o as they act, c, n, the slope of f."""
    dtype: tl.constexpr = h_p.dtype.element_ty
    LANES: tl.constexpr = 32 * W
    SLOT: tl.constexpr = 4 * D
    rank, head, first, lane = _place(H, N, LANES)
    g, q = lane // 4 % 8, lane % 4
    u = (rank * W + lane // 32) * 8 + g
    HD = H * D
    b0 = (first + 2 * q).to(tl.int64)
    b1 = b0 + 1
    at0, at1 = (b0 < B).to(tl.int32), (b1 < B).to(tl.int32)
    memory = mailbox.shared_memory(lane, memory_p, 3 * SLOT)
    _clear(memory, 0, lane, 0, 3 * SLOT, LANES)

    all_lanes = tl.full((LANES,), 1, tl.int32)
    R = load_kernel_columns(R_p, head, u, q, all_lanes, D)
    mailbox.meet(lane, N)

    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u  # of states
    zero = tl.zeros((LANES,), tl.float32)
    scale0, scale1 = zero + 1.0, zero + 1.0
    if scale_p is not None:
        scale0, scale1 = warp.load(scale_p + o0, at0), warp.load(scale_p + o1, at1)
    if bias_p is not None:
        bi, bf, bz, bo = _load_bias(bias_p + head * D + u, HD, all_lanes)
    if h0_p is not None:
        h0, h1 = warp.load(h0_p + o0, at0), warp.load(h0_p + o1, at1)
        c0, n0, m0 = first_state(c0_p, n0_p, m0_p, o0, at0)
        c1, n1, m1 = first_state(c0_p, n0_p, m0_p, o1, at1)
    else:
        h0, c0, n0, m0 = zero, zero, zero, zero + NEVER
        h1, c1, n1, m1 = h0, c0, n0, m0
    # Of a pair of lanes, units u and u + 1 (or u - 1), the even one has the words of its even row.
    odd = g % 2 == 1
    row = 2 * q + g % 2
    sent = row * (D // 2) + _within(row, u - g % 2, D)
    out = (first + row).to(tl.int64)
    at_out = (out < B).to(tl.int32)
    out = h_p + out * T * HD + head * D + u - g % 2
    slot, read, swap = 0, g * (D // 2) + q * 4, (g % 2) * 16 if D % 64 == 0 else g * 0
    mailbox.send(memory, sent, warp.two_units(h0 * scale0, h1 * scale1, odd, dtype, LANES), N)
    b_read = tl.minimum(first + g, B - 1).to(tl.int64) * T
    o0, o1 = (b0 * T) * HD + head * D + u, (b1 * T) * HD + head * D + u  # of steps
    x0, x1 = x_p + (b0 * T) * 4 * HD + head * D + u, x_p + (b1 * T) * 4 * HD + head * D + u
    # Inputs arrive while a step is computed; a lane asks for those of row g, gate q, 8 units ahead.
    bits0, bits1 = warp.load_gates(x0, HD, at0), warp.load_gates(x1, HD, at1)
    ahead = x_p + (b_read + AHEAD) * 4 * HD + q * HD + head * D + u - g
    for step in range(0, T):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        i0, f0, z0, v0 = warp.numbers(*bits0, dtype)
        i1, f1, z1, v1 = warp.numbers(*bits1, dtype)
        x0, x1 = x0 + 4 * HD, x1 + 4 * HD
        later = (t + 1 < T).to(tl.int32)
        bits0, bits1 = warp.load_gates(x0, HD, at0 * later), warp.load_gates(x1, HD, at1 * later)
        warp.soon(ahead, (t + AHEAD < T).to(tl.int32) + all_lanes * 0)
        ahead += 4 * HD
        if bias_p is not None:
            i0, f0, z0, v0 = i0 + bi, f0 + bf, z0 + bz, v0 + bo
            i1, f1, z1, v1 = i1 + bi, f1 + bf, z1 + bz, v1 + bo
        old0 = h0, c0, n0, m0
        old1 = h1, c1, n1, m1
        starts = None
        if reset_p is not None:
            starts = warp.load_flag(reset_p + b_read + t, all_lanes)
            m0 = tl.where(warp.load_flag(reset_p + b0 * T + t, at0) != 0, NEVER, m0)
            m1 = tl.where(warp.load_flag(reset_p + b1 * T + t, at1) != 0, NEVER, m1)

        h = mailbox.receive(memory, slot + read, swap, D // 32, True)
        i0, i1, f0, f1, z0, z1, v0, v1 = recurrent(
            i0, i1, f0, f1, z0, z1, v0, v1, h, R, starts, dtype, D // 32, LANES
        )
        h0, c0, n0, m0, i0, f0, z0, v0, slope0 = cell(i0, f0, z0, v0, c0, n0, m0, EXP_FORGET, True)
        h1, c1, n1, m1, i1, f1, z1, v1, slope1 = cell(i1, f1, z1, v1, c1, n1, m1, EXP_FORGET, True)
        if hold_p is not None:
            h0, c0, n0, m0 = hold_cell(hold_p + b0 * T + t, at0, h0, c0, n0, m0, *old0)
            h1, c1, n1, m1 = hold_cell(hold_p + b1 * T + t, at1, h1, c1, n1, m1, *old1)
        _clear(memory, _next(_next(slot, SLOT), SLOT), lane, 0, SLOT, LANES)
        slot = _next(slot, SLOT)
        word = warp.two_units(h0, h1, odd, dtype, LANES)
        to, scaled = slot + sent, word
        if scale_p is not None:
            scaled = warp.two_units(h0 * scale0, h1 * scale1, odd, dtype, LANES)
        mailbox.send(memory, to, scaled, N)
        warp.store_pair(out, word, at_out)
        out += HD
        if saved_p is not None:
            _save(saved_p + o0 * 8, i0, f0, z0, v0, c0, n0, slope0, zero, at0)
            _save(saved_p + o1 * 8, i1, f1, z1, v1, c1, n1, slope1, zero, at1)
        o0, o1 = o0 + HD, o1 + HD
    mailbox.meet(lane, N)  # nobody may send to a thread block that is gone
    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u
    _store_two(h1_p, o0, o1, h0, h1, at0, at1)
    _store_two(c1_p, o0, o1, c0, c1, at0, at1)
    _store_two(n1_p, o0, o1, n0, n1, at0, at1)
    warp.store(m1_p + o0, tl.where(m0 <= NEVER / 2, 0.0, m0), at0)
    warp.store(m1_p + o1, tl.where(m1 <= NEVER / 2, 0.0, m1), at1)


@jit_kernel
def backward(
    dh_p, saved_p, R_p, hold_p, reset_p, scale_p, c0_p, n0_p, dh1_p, dc1_p, dn1_p,
    dx_p, dh0_p, dc0_p, dn0_p, memory_p, B, T, H, clip,
    D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EXP_FORGET: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """As `forward`. A warp multiplies its block's gate gradients by R for TILES by 16 units."""
    dtype: tl.constexpr = dx_p.dtype.element_ty
    LANES: tl.constexpr = 32 * W
    U: tl.constexpr = 8 * W  # units of a thread block
    CHUNKS: tl.constexpr = W  # of 32 gate gradients
    TILES: tl.constexpr = (D // 16 + W - 1) // W
    GATES: tl.constexpr = 16 * U  # words: two buffers, then two slots
    SLOT: tl.constexpr = N * 64 * W
    rank, head, first, lane = _place(H, N, LANES)
    w, g, q = lane // 32, lane // 4 % 8, lane % 4
    u = rank * U + w * 8 + g
    HD = H * D
    b0 = (first + 2 * q).to(tl.int64)
    b1 = b0 + 1
    at0, at1 = (b0 < B).to(tl.int32), (b1 < B).to(tl.int32)
    memory = mailbox.shared_memory(lane, memory_p, 2 * GATES + 2 * SLOT)
    _clear(memory, 2 * GATES, lane, 0, 2 * SLOT, LANES)

    R = load_kernel_rows(R_p, head, rank * U, w, g, q, D, U, CHUNKS, TILES)
    mailbox.meet(lane, N)

    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u  # of states
    zero = tl.zeros((LANES,), tl.float32)
    if scale_p is not None:
        scale0, scale1 = warp.load(scale_p + o0, at0), warp.load(scale_p + o1, at1)
    kept0, kept1 = warp.load(dh1_p + o0, at0), warp.load(dh1_p + o1, at1)
    dh0, dh1 = kept0, kept1
    dc0, dc1 = warp.load(dc1_p + o0, at0), warp.load(dc1_p + o1, at1)
    dn0, dn1 = warp.load(dn1_p + o0, at0), warp.load(dn1_p + o1, at1)
    first_c0, first_n0, first_c1, first_n1 = zero, zero, zero, zero
    if c0_p is not None:
        first_c0, first_n0 = warp.load(c0_p + o0, at0), warp.load(n0_p + o0, at0)
        first_c1, first_n1 = warp.load(c0_p + o1, at1), warp.load(n0_p + o1, at1)
    odd = g % 2 == 1
    row = 2 * q + g % 2
    even = w * 8 + g - g % 2
    put = ()
    for gate in tl.static_range(4):
        put += (row * (2 * U) + _within(row, even + gate * U, 4 * U),)
    out = (first + row).to(tl.int64)
    at_out = (out < B).to(tl.int32)
    out = dx_p + (out * T + T - 1) * 4 * HD + head * D + u - g % 2
    read, swap = g * (2 * U) + q * 4, (g % 2) * 16
    own = 2 * GATES + lane * 2
    b_read = tl.minimum(first + g, B - 1).to(tl.int64) * T + T - 1

    o0, o1 = (b0 * T + T - 1) * HD + head * D + u, (b1 * T + T - 1) * HD + head * D + u  # of steps
    acts0 = warp.load_four(saved_p + o0 * 8, at0)
    acts1 = warp.load_four(saved_p + o1 * 8, at1)
    c0, n0, slope0, _ = warp.load_four(saved_p + o0 * 8 + 4, at0)
    c1, n1, slope1, _ = warp.load_four(saved_p + o1 * 8 + 4, at1)
    up0, up1 = warp.load_half(dh_p + o0, at0), warp.load_half(dh_p + o1, at1)
    later = (T > 1).to(tl.int32)
    in0, in1 = saved_p + (o0 - HD) * 8 + 4, saved_p + (o1 - HD) * 8 + 4
    c_in0, n_in0, slope_in0, _ = warp.load_four(in0, at0 * later)
    c_in1, n_in1, slope_in1, _ = warp.load_four(in1, at1 * later)
    # A lane asks for its own cells' (a prefetch brings 32 bytes), and for dh of 8 units.
    ahead0, ahead1 = saved_p + (o0 - AHEAD * HD) * 8, saved_p + (o1 - AHEAD * HD) * 8
    ahead_dh = dh_p + (b_read - AHEAD) * HD + head * D + u - g
    slot, gates = 0, 0
    for step in range(0, T + 1):
        t = T - 1 - tl.cast(step, tl.int32)
        # What the next step needs arrives while this one is computed.
        o0, o1 = o0 - HD, o1 - HD
        later0, later1 = at0 * (t > 0).to(tl.int32), at1 * (t > 0).to(tl.int32)
        next_acts0 = warp.load_four(saved_p + o0 * 8, later0)
        next_acts1 = warp.load_four(saved_p + o1 * 8, later1)
        next_up0 = warp.load_half(dh_p + o0, later0)
        next_up1 = warp.load_half(dh_p + o1, later1)
        later0, later1 = at0 * (t > 1).to(tl.int32), at1 * (t > 1).to(tl.int32)
        in0, in1 = saved_p + (o0 - HD) * 8 + 4, saved_p + (o1 - HD) * 8 + 4
        last_c0, last_n0, last_slope0, _ = warp.load_four(in0, later0)
        last_c1, last_n1, last_slope1, _ = warp.load_four(in1, later1)
        warp.soon(ahead0, at0 * (t >= AHEAD).to(tl.int32))
        warp.soon(ahead1, at1 * (t >= AHEAD).to(tl.int32))
        warp.soon(ahead_dh, ((t >= AHEAD) & (q == 0)).to(tl.int32))
        ahead0 -= 8 * HD
        ahead1 -= 8 * HD
        ahead_dh -= HD
        if step > 0:
            back0, back1 = mailbox.receive_two(memory, slot + own, N, 64 * W)
            for j in tl.static_range(N):
                mailbox.put(memory, slot + own + j * 64 * W, lane * 0 + MISSING, COUNT=2)
            slot = SLOT - slot
            if scale_p is not None:
                back0, back1 = back0 * scale0, back1 * scale1
            if CLIP:
                back0, back1 = _clipped(back0, clip), _clipped(back1, clip)
            if reset_p is not None:
                back0 = _unless(reset_p + b0 * T + t + 1, at0, back0)
                back1 = _unless(reset_p + b1 * T + t + 1, at1, back1)
            dh0, dh1 = kept0 + back0, kept1 + back1
        if t >= 0:
            dh0, dh1 = dh0 + warp.number(up0, dtype), dh1 + warp.number(up1, dtype)
            if t == 0:
                c_in0, n_in0, c_in1, n_in1 = first_c0, first_n0, first_c1, first_n1
            g0 = cell_gradient(
                dh0, dc0, dn0, c0, n0, c_in0, n_in0, *acts0, slope0, EXP_FORGET, True
            )
            g1 = cell_gradient(
                dh1, dc1, dn1, c1, n1, c_in1, n_in1, *acts1, slope1, EXP_FORGET, True
            )
            kept0, kept1 = zero, zero
            if hold_p is not None:
                g0, kept0 = _held_gradients(hold_p + b0 * T + t, at0, g0, dc0, dn0, dh0)
                g1, kept1 = _held_gradients(hold_p + b1 * T + t, at1, g1, dc1, dn1, dh1)
            dc0, dn0, dc1, dn1 = g0[4], g0[5], g1[4], g1[5]
            words = ()
            for gate in tl.static_range(4):
                words += (warp.two_units(g0[gate], g1[gate], odd, dtype, LANES),)
            for gate in tl.static_range(4):
                mailbox.put(memory, gates + put[gate], words[gate])
            mailbox.meet_here(lane)
            dg = mailbox.receive(memory, gates + read, swap, CHUNKS, False)
            gates = GATES - gates
            send_products(
                memory, slot, rank, lane, w, dg, R, dtype, D, N, W, GATES, CHUNKS, TILES,
            )  # fmt: skip
            for gate in tl.static_range(4):
                warp.store_pair(out + gate * HD, words[gate], at_out)
            out -= 4 * HD
        c0, n0, slope0, c1, n1, slope1 = c_in0, n_in0, slope_in0, c_in1, n_in1, slope_in1
        acts0, up0, acts1, up1 = next_acts0, next_up0, next_acts1, next_up1
        c_in0, n_in0, slope_in0, c_in1, n_in1, slope_in1 = (
            last_c0, last_n0, last_slope0, last_c1, last_n1, last_slope1,
        )  # fmt: skip
    mailbox.meet(lane, N)  # nobody may send to a thread block that is gone
    o0, o1 = b0 * HD + head * D + u, b1 * HD + head * D + u
    _store_two(dh0_p, o0, o1, dh0, dh1, at0, at1)
    _store_two(dc0_p, o0, o1, dc0, dc1, at0, at1)
    _store_two(dn0_p, o0, o1, dn0, dn1, at0, at1)
