"""The sLSTM in Triton, a head in several programs of BU units each.

They exchange h, and backwards the gate gradients, through the output itself, at every step. That
needs no flags and no barriers: outputs are filled with a NaN that no arithmetic produces, MISSING,
and a reader repeats its loads until none is left. All programs of a launch must be resident at
once; where they cannot be, the host launches one step at a time.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm.cell import (
    NEVER,
    cell,
    cell_gradient,
    first_state,
    jit_kernel,
    limited,
    load_gates,
    load_saved,
    mask_if,
    save,
    split_gates,
    state_before,
    store_gates,
)


@triton.jit
def _exchanged(p, o, in_bounds, WAIT: tl.constexpr):
    """A tile that other programs write; WAIT: until all of it is there."""
    if WAIT:
        # As whole numbers: all bits set are MISSING.
        bits: tl.constexpr = tl.int16 if p.dtype.element_ty.primitive_bitwidth == 16 else tl.int32
        q = p.to(tl.pointer_type(bits), bitcast=True)
        tile = tl.load(q + o, mask=in_bounds, other=0, volatile=True)
        while tl.min(tl.where(tile == -1, 0, 1)) == 0:
            tile = tl.load(q + o, mask=in_bounds, other=0, volatile=True)
        return tile.to(p.dtype.element_ty, bitcast=True)
    else:
        return tl.load(p + o, mask=in_bounds, other=0.0)


@triton.jit
def _published(x, dtype: tl.constexpr):
    """In the dtype of the exchange, never MISSING."""
    return tl.where(x == x, x, float("nan")).to(dtype)


@triton.jit
def _quarters(x, BB: tl.constexpr, K: tl.constexpr):
    """Columns 0, 2, 1, 3 of every four: products over a quarter each do not wait for each other."""
    even, odd = tl.split(tl.reshape(x, (BB, K // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _recurrent(
    p, o, k, in_bounds, R, starts, scale_p, o_scale,
    D: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr, KR: tl.constexpr, WAIT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """h of one step, (BB, D), times R, in rounds of KR units: i, f, z, o, each (BB, BU)."""
    g = tl.zeros((BB, 4 * BU), tl.float32)
    for j in tl.static_range((D + KR - 1) // KR):
        at = in_bounds & (j * KR + k < D)[None, :]
        h = _exchanged(p, o + j * KR, at, WAIT)
        if starts is not None:
            h = tl.where(starts, 0.0, h)
        if scale_p is not None:
            h *= tl.load(scale_p + o_scale + j * KR, mask=at, other=0.0)
        h0, h1, h2, h3 = _quarters(h.to(p.dtype.element_ty), BB, KR)
        even = tl.dot(h0, R[4 * j], input_precision=PREC)
        even += tl.dot(h2, R[4 * j + 2], input_precision=PREC)
        odd = tl.dot(h1, R[4 * j + 1], input_precision=PREC)
        odd += tl.dot(h3, R[4 * j + 3], input_precision=PREC)
        g += even + odd
    return split_gates(tl.permute(tl.reshape(g, (BB, 2, BU, 2)), (0, 2, 1, 3)))


@jit_kernel
def forward(
    x_p, R_p, bias_p, hold_p, reset_p, scale_p, first_p, h0_p, c0_p, n0_p, m0_p,
    h_p, saved_p, h1_p, c1_p, n1_p, m1_p, B, T, H, start, stop, group,
    D: tl.constexpr, KR: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr,
    EXP_FORGET: tl.constexpr, WAIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Steps start to stop - 1. `first_p` is h0 in h's dtype, or None; `group` the first one."""
    P: tl.constexpr = (D + BU - 1) // BU
    group += tl.program_id(0) // P
    tile, head = tl.program_id(0) % P, group % H
    b = (group // H) * BB + tl.arange(0, BB).to(tl.int64)
    u, k = tile * BU + tl.arange(0, BU), tl.arange(0, KR)
    HD = H * D
    at = (b < B)[:, None] & (u < D)[None, :]
    o_state = b[:, None] * HD + head * D + u[None, :]
    o_h = (b[:, None] * T + start) * HD + head * D + u[None, :]
    o_x = (b[:, None] * T + start) * 4 * HD + head * D + u[None, :]
    row = (b < B)[:, None] & (k >= 0)[None, :]
    # The four gates of a unit side by side: a column is two of them in each half.
    j = tl.arange(0, 4 * BU)
    gate, unit = j // (2 * BU) * 2 + j % 2, tile * BU + j % (2 * BU) // 2
    r = tl.arange(0, KR // 4) * 4
    o_R = (head * D + r[:, None]) * 4 * D + gate[None, :] * D + unit[None, :]
    R = ()
    for j in tl.static_range((D + KR - 1) // KR * 4):
        at_R = (unit < D)[None, :] & (r + (j // 4 * KR + j % 4) < D)[:, None]
        R += (tl.load(R_p + o_R + (j // 4 * KR + j % 4) * 4 * D, mask=at_R, other=0.0),)
    if bias_p is not None:
        bi, bf, bz, bo = load_gates(bias_p + head * D + u[None, :], HD, (u < D)[None, :])
    if h0_p is not None:
        h = tl.load(h0_p + o_state, mask=at, other=0.0)
        c, n, m = first_state(c0_p, n0_p, m0_p, o_state, at)
    else:
        h = tl.zeros((BB, BU), tl.float32)
        c, n, m = h, h, h + NEVER
    plane = tl.cast(B, tl.int64) * T * HD
    dtype: tl.constexpr = h_p.dtype.element_ty

    o_row = b[:, None] * T * HD + head * D + k[None, :]
    o_scale = b[:, None] * HD + head * D + k[None, :]
    o_row += (tl.cast(start, tl.int64) - 1) * HD
    xi, xf, xz, xo = load_gates(x_p + o_x, HD, at)
    for step in range(start, stop):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        h_old, c_old, n_old, m_old = h, c, n, m
        starts = None
        if reset_p is not None:
            starts = tl.load(reset_p + b * T + t, mask=b < B, other=0)[:, None] != 0
            m = tl.where(starts, NEVER, m)
        if t > 0:
            i, f, z, o = _recurrent(
                h_p, o_row, k, row, R, starts, scale_p, o_scale, D, BB, BU, KR, WAIT, PREC
            )
        elif first_p is not None:
            i, f, z, o = _recurrent(
                first_p, o_scale, k, row, R, starts, scale_p, o_scale, D, BB, BU, KR, False, PREC
            )
        else:
            i = tl.zeros((BB, BU), tl.float32)
            f, z, o = i, i, i
        o_row += HD
        i, f, z, o = i + xi, f + xf, z + xz, o + xo
        if bias_p is not None:
            i, f, z, o = i + bi, f + bf, z + bz, o + bo
        h, c, n, m, i, f, z, o, slope = cell(i, f, z, o, c, n, m, EXP_FORGET)
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=b < B, other=0)[:, None] != 0
            h, c = tl.where(held, h_old, h), tl.where(held, c_old, c)
            n, m = tl.where(held, n_old, n), tl.where(held, m_old, m)
        tl.store(h_p + o_h, _published(h, dtype), mask=at)
        # The next step's inputs arrive while the programs wait for each other.
        o_x += 4 * HD
        later = mask_if(t + 1 < stop, at)
        xi, xf, xz, xo = load_gates(x_p + o_x, HD, later)
        if saved_p is not None:
            save(saved_p, plane, o_h, at, i, f, z, o, c, n, slope, EXP_FORGET)
        o_h += HD
    tl.store(h1_p + o_state, h, mask=at)
    tl.store(c1_p + o_state, c, mask=at)
    tl.store(n1_p + o_state, n, mask=at)
    tl.store(m1_p + o_state, tl.where(m <= NEVER / 2, 0.0, m), mask=at)


@jit_kernel
def backward(
    dh_p, saved_p, R_p, hold_p, reset_p, scale_p, c0_p, n0_p, dh1_p, dc1_p, dn1_p, c1_p, n1_p,
    dx_p, dh0_p, dc0_p, dn0_p, B, T, H, start, stop, group, clip,
    D: tl.constexpr, KR: tl.constexpr, S: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr,
    EXP_FORGET: tl.constexpr, CLIP: tl.constexpr, WAIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Steps stop - 1 down to start; -1 stands for the initial state. The gate gradients meet the
    recurrent kernel in rounds of KR units, S pieces side by side, each of them of one gate."""
    P: tl.constexpr = (D + BU - 1) // BU
    KP: tl.constexpr = 4 * KR // S
    group += tl.program_id(0) // P
    tile, head = tl.program_id(0) % P, group % H
    b = (group // H) * BB + tl.arange(0, BB).to(tl.int64)
    u = tile * BU + tl.arange(0, BU)
    HD = H * D
    at = (b < B)[:, None] & (u < D)[None, :]
    o_state = b[:, None] * HD + head * D + u[None, :]
    o_h = (b[:, None] * T + stop - 1) * HD + head * D + u[None, :]
    o_x = (b[:, None] * T + stop - 1) * 4 * HD + head * D + u[None, :]
    s, k = tl.arange(0, S)[:, None, None], tl.arange(0, KP)
    d_a, d_R = s // 4 * KP + k[None, None, :], s // 4 * KP + k[None, :, None]
    o_R = (head * D + u[None, None, :]) * 4 * D + s % 4 * D + d_R  # [piece, out, in]
    R = ()
    for j in tl.static_range((D + KR - 1) // KR):
        at_R = (u < D)[None, None, :] & (j * KR + d_R < D)
        R += (tl.load(R_p + o_R + j * KR, mask=at_R, other=0.0),)
    o_a = (b[None, :, None] * T + stop) * 4 * HD + s % 4 * HD + head * D + d_a
    dh = tl.load(dh1_p + o_state, mask=at, other=0.0)
    dc = tl.load(dc1_p + o_state, mask=at, other=0.0)
    dn = tl.load(dn1_p + o_state, mask=at, other=0.0)
    c = tl.load(c1_p + o_state, mask=mask_if(stop == T, at), other=0.0)
    n = tl.load(n1_p + o_state, mask=mask_if(stop == T, at), other=1.0)
    plane = tl.cast(B, tl.int64) * T * HD
    dtype: tl.constexpr = dx_p.dtype.element_ty
    if stop < T:
        c, n = state_before(saved_p, plane, o_h, at, stop, c0_p, n0_p, o_state, at)

    in_bounds = mask_if(stop > 0, at)
    upstream = tl.load(dh_p + o_h, mask=in_bounds, other=0.0)
    i, f, z, o, slope = load_saved(saved_p, plane, o_h, in_bounds, EXP_FORGET)
    c_in, n_in = state_before(
        saved_p, plane, o_h - HD, in_bounds, stop - 1, c0_p, n0_p, o_state, at
    )
    for step in range(0, stop - start):
        t = stop - 1 - tl.cast(step, tl.int32)
        if t + 1 < T:
            pieces = tl.zeros((S, BB, BU), tl.float32)
            for j in tl.static_range((D + KR - 1) // KR):
                at_a = (b < B)[None, :, None] & (j * KR + d_a < D)
                a = _exchanged(dx_p, o_a + j * KR, at_a, WAIT)
                pieces = tl.dot(a, R[j], pieces, input_precision=PREC)
            starts = None
            if reset_p is not None:
                starts = tl.load(reset_p + b * T + t + 1, mask=b < B, other=0)[:, None] != 0
            back = limited(tl.sum(pieces, 0), scale_p, o_state, at, starts, clip, CLIP)
            if hold_p is not None:  # a held step's gate gradients are zero: so is `back`
                held = tl.load(hold_p + b * T + t + 1, mask=b < B, other=0)[:, None] != 0
                back += tl.where(held, dh, 0.0)
            dh = back
        o_a -= 4 * HD
        in_bounds = mask_if(t >= 0, at)
        dh += upstream
        old_dc, old_dn = dc, dn
        di, df, dz, do, dc, dn = cell_gradient(
            dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope, EXP_FORGET
        )
        keep = t < 0
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=mask_if(t >= 0, b < B), other=1)[:, None] != 0
            di, df = tl.where(held, 0.0, di), tl.where(held, 0.0, df)
            dz, do = tl.where(held, 0.0, dz), tl.where(held, 0.0, do)
            keep = keep | held
        dc, dn = tl.where(keep, old_dc, dc), tl.where(keep, old_dn, dn)
        di, df = _published(di, dtype), _published(df, dtype)
        dz, do = _published(dz, dtype), _published(do, dtype)
        store_gates(dx_p + o_x, HD, in_bounds, di, df, dz, do)
        o_x -= 4 * HD
        c, n = c_in, n_in
        o_h -= HD
        in_bounds = mask_if((t > start) & (t > 0), at)
        upstream = tl.load(dh_p + o_h, mask=in_bounds, other=0.0)
        i, f, z, o, slope = load_saved(saved_p, plane, o_h, in_bounds, EXP_FORGET)
        c_in, n_in = state_before(
            saved_p, plane, o_h - HD, in_bounds, t - 1, c0_p, n0_p, o_state, at
        )
    tl.store(dh0_p + o_state, dh, mask=at)
    tl.store(dc0_p + o_state, dc, mask=at)
    tl.store(dn0_p + o_state, dn, mask=at)
