"""The sLSTM in Triton: loops over time that keep the recurrent kernel and the states on chip.

    whole            a program has all units of a head: steps pass h on in registers
    split            a program has BU units of a head: programs exchange h, and backwards the gate
                     gradients, through the output itself, at every step
    kernel_gradient  of the recurrent kernel and the bias, over all steps at once

The exchange of `split` needs no flags and no barriers: outputs are filled with a NaN that no
arithmetic produces, MISSING, and a reader repeats its loads until none is left. All programs of a
launch must be resident at once; where they cannot be, the host launches one step at a time.

Names: _p pointers, o_ offsets; comments give tile shapes. Tensors are contiguous: x and its
gradient (B, T, 4, H, D), h (B, T, H, D), states (B, H, D), the recurrent kernel (H, D, 4, D). What
the backward pass needs is in `saved` (planes, B, T, H, D): i, f, z, o as they act, c, n, and the
slope of f. m is a constant: the output does not depend on it.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2.0**100))
_kernel = triton.jit(do_not_specialize=["B", "T", "H", "start", "stop", "group", "rows"])


@triton.jit
def _tanh(x):
    y = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - y) / (1.0 + y)
    t = x * x
    near = x * (1.0 + t * (-1 / 3 + t * (2 / 15 + t * (-17 / 315 + t * (62 / 2835)))))
    return tl.where(t < 0.06, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _cell(i, f, z, o, c, n, m, EXP_FORGET: tl.constexpr):
    """Eqs. 8-17, and the slope of log f."""
    if EXP_FORGET:
        log_f, slope = f, f
    else:
        y = tl.exp(-tl.abs(f))
        log_f = tl.minimum(f, 0.0) - tl.log(1.0 + y)
        slope = tl.where(f < 0.0, 1.0, y) / (1.0 + y)
    new_m = tl.maximum(log_f + m, i)
    i = tl.exp(i - new_m)
    f = tl.exp((m - new_m) + log_f)
    z, o = _tanh(z), _sigmoid(o)
    c = f * c + i * z
    n = f * n + i
    return o * (c / n), c, n, new_m, i, f, z, o, slope


@triton.jit
def _cell_gradient(dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope, EXP_FORGET: tl.constexpr):
    """The gate gradients, and those of the c and n before."""
    r = tl.where(n == 0.0, 0.0, 1.0 / n)  # nothing there: beyond the units, or a held fresh start
    y = o * r
    h = y * c
    dc += dh * y
    dn -= dh * h * r
    di = i * (z * dc + dn)
    df = f * (c_in * dc + n_in * dn)
    if not EXP_FORGET:
        df *= slope
    dz = i * dc * ((1.0 - z) * (1.0 + z))
    do = dh * h * (1.0 - o)
    return di, df, dz, do, f * dc, f * dn


@triton.jit
def _four(g):
    """i, f, z, o, which are the last two axes (2, 2)."""
    i_z, f_o = tl.split(g)
    i, z = tl.split(i_z)
    f, o = tl.split(f_o)
    return i, f, z, o


@triton.jit
def _if(condition, there):
    """A mask where a scalar condition holds. (The interpreter's & would make it whole numbers.)"""
    return tl.where(condition, there, there & False)


@triton.jit
def _first(c0_p, n0_p, m0_p, o, there):
    """c, n, m of a state; what holds nothing (the official zeros) is a fresh start."""
    c = tl.load(c0_p + o, mask=there, other=0.0)
    n = tl.load(n0_p + o, mask=there, other=0.0)
    m = tl.load(m0_p + o, mask=there, other=0.0)
    return c, n, tl.where(n != 0.0, m, NEVER)


@triton.jit
def _save(p, plane, o, there, i, f, z, o_gate, c, n, slope, EXP_FORGET: tl.constexpr):
    tl.store(p + o, i, mask=there)
    tl.store(p + plane + o, f, mask=there)
    tl.store(p + 2 * plane + o, z, mask=there)
    tl.store(p + 3 * plane + o, o_gate, mask=there)
    tl.store(p + 4 * plane + o, c, mask=there)
    tl.store(p + 5 * plane + o, n, mask=there)
    if not EXP_FORGET:
        tl.store(p + 6 * plane + o, slope, mask=there)


@triton.jit
def _saved(p, plane, o, there, EXP_FORGET: tl.constexpr):
    i = tl.load(p + o, mask=there, other=0.0)
    f = tl.load(p + plane + o, mask=there, other=0.0)
    z = tl.load(p + 2 * plane + o, mask=there, other=0.0)
    o_gate = tl.load(p + 3 * plane + o, mask=there, other=0.0)
    slope = i
    if not EXP_FORGET:
        slope = tl.load(p + 6 * plane + o, mask=there, other=0.0)
    return i, f, z, o_gate, slope


@triton.jit
def _before(p, plane, o, there, t, c0_p, n0_p, o_state, at):
    """c and n before step t: saved, or the initial ones (None: zero)."""
    c = tl.load(p + 4 * plane + o, mask=_if(t > 0, there), other=0.0)
    n = tl.load(p + 5 * plane + o, mask=_if(t > 0, there), other=0.0)
    if c0_p is not None:
        c += tl.load(c0_p + o_state, mask=_if(t == 0, at), other=0.0)
        n += tl.load(n0_p + o_state, mask=_if(t == 0, at), other=0.0)
    return c, n


# ------------------------------------------------------------------------ a head in one program


@_kernel
def forward_whole(
    x_p, R_p, bias_p, hold_p, reset_p, scale_p, h0_p, c0_p, n0_p, m0_p,
    h_p, saved_p, h1_p, c1_p, n1_p, m1_p, B, T, H,
    D: tl.constexpr, DP: tl.constexpr, BB: tl.constexpr, EXP_FORGET: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Tiles are (DP units, BB rows): few rows are then the narrow side of the tensor cores."""
    head = tl.program_id(0) % H
    b = (tl.program_id(0) // H) * BB + tl.arange(0, BB).to(tl.int64)
    u, k = tl.arange(0, DP), tl.arange(0, DP)
    HD = H * D
    at = (u < D)[:, None] & (b < B)[None, :]
    o_state = b[None, :] * HD + head * D + u[:, None]
    o_h = b[None, :] * T * HD + head * D + u[:, None]
    o_x = b[None, :] * T * 4 * HD + head * D + u[:, None]
    j = tl.arange(0, 4 * DP)
    gate, unit = j // DP, j % DP
    o_R = (head * D + k[None, :]) * 4 * D + gate[:, None] * D + unit[:, None]  # [gate and out, in]
    R = tl.load(R_p + o_R, mask=(unit < D)[:, None] & (k < D)[None, :], other=0.0)
    if bias_p is not None:
        o_bias = head * D + u
        bi = tl.load(bias_p + o_bias, mask=u < D, other=0.0).to(tl.float32)[:, None]
        bf = tl.load(bias_p + HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[:, None]
        bz = tl.load(bias_p + 2 * HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[:, None]
        bo = tl.load(bias_p + 3 * HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[:, None]
    if scale_p is not None:
        scale = tl.load(scale_p + o_state, mask=at, other=0.0)
    if h0_p is not None:
        h = tl.load(h0_p + o_state, mask=at, other=0.0)
        c, n, m = _first(c0_p, n0_p, m0_p, o_state, at)
    else:
        h = tl.zeros((DP, BB), tl.float32)
        c, n, m = h, h, h + NEVER
    plane = tl.cast(B, tl.int64) * T * HD
    dtype = h_p.dtype.element_ty

    xi = tl.load(x_p + o_x, mask=at, other=0.0)
    xf = tl.load(x_p + HD + o_x, mask=at, other=0.0)
    xz = tl.load(x_p + 2 * HD + o_x, mask=at, other=0.0)
    xo = tl.load(x_p + 3 * HD + o_x, mask=at, other=0.0)
    for step in range(0, T):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        h_old, c_old, n_old, m_old = h, c, n, m
        if reset_p is not None:
            starts = tl.load(reset_p + b * T + t, mask=b < B, other=0)[None, :] != 0
            h, m = tl.where(starts, 0.0, h), tl.where(starts, NEVER, m)
        if scale_p is not None:
            h *= scale
        g = tl.reshape(tl.dot(R, h.to(dtype), input_precision=PREC), (2, 2, DP, BB))
        i, f, z, o = _four(tl.permute(g, (2, 3, 0, 1)))
        i, f, z, o = i + xi, f + xf, z + xz, o + xo
        # The next step's inputs arrive while this one is computed.
        o_x += 4 * HD
        later = _if(t + 1 < T, at)
        xi = tl.load(x_p + o_x, mask=later, other=0.0)
        xf = tl.load(x_p + HD + o_x, mask=later, other=0.0)
        xz = tl.load(x_p + 2 * HD + o_x, mask=later, other=0.0)
        xo = tl.load(x_p + 3 * HD + o_x, mask=later, other=0.0)
        if bias_p is not None:
            i, f, z, o = i + bi, f + bf, z + bz, o + bo
        h, c, n, m, i, f, z, o, slope = _cell(i, f, z, o, c, n, m, EXP_FORGET)
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=b < B, other=0)[None, :] != 0
            h, c = tl.where(held, h_old, h), tl.where(held, c_old, c)
            n, m = tl.where(held, n_old, n), tl.where(held, m_old, m)
        tl.store(h_p + o_h, h.to(dtype), mask=at)
        if saved_p is not None:
            _save(saved_p, plane, o_h, at, i, f, z, o, c, n, slope, EXP_FORGET)
        o_h += HD
    tl.store(h1_p + o_state, h, mask=at)
    tl.store(c1_p + o_state, c, mask=at)
    tl.store(n1_p + o_state, n, mask=at)
    tl.store(m1_p + o_state, tl.where(m <= NEVER / 2, 0.0, m), mask=at)


@triton.jit
def _back(
    d_if, d_zo, R_if, R_zo, scale_p, o_scale, at, starts, clip,
    CLIP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What h hears from the next step's gates (2 DP, BB): a held step's are zero."""
    back_if = tl.dot(R_if, d_if, input_precision=PREC)
    back_zo = tl.dot(R_zo, d_zo, input_precision=PREC)
    # Not back_if + back_zo, which would keep all else in the tensor core's layout: every load and
    # store would then pass through shared memory.
    dh = tl.sum(tl.join(back_if, back_zo), 2)
    return _limited(dh, scale_p, o_scale, at, starts, clip, CLIP)


@triton.jit
def _limited(dh, scale_p, o_scale, at, starts, clip, CLIP: tl.constexpr):
    if scale_p is not None:
        dh *= tl.load(scale_p + o_scale, mask=at, other=0.0)
    if CLIP:
        dh = tl.minimum(tl.maximum(dh, -clip), clip)
    if starts is not None:
        dh = tl.where(starts, 0.0, dh)
    return dh


@_kernel
def backward_whole(
    dh_p, saved_p, R_p, hold_p, reset_p, scale_p, c0_p, n0_p, dh1_p, dc1_p, dn1_p, c1_p, n1_p,
    dx_p, dh0_p, dc0_p, dn0_p, B, T, H, clip,
    D: tl.constexpr, DP: tl.constexpr, BB: tl.constexpr, EXP_FORGET: tl.constexpr,
    CLIP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    b = (tl.program_id(0) // H) * BB + tl.arange(0, BB).to(tl.int64)
    u = tl.arange(0, DP)
    HD = H * D
    at = (u < D)[:, None] & (b < B)[None, :]
    o_state = b[None, :] * HD + head * D + u[:, None]
    o_h = (b[None, :] * T + T - 1) * HD + head * D + u[:, None]
    o_x = (b[None, :] * T + T - 1) * 4 * HD + head * D + u[:, None]
    j = tl.arange(0, 2 * DP)
    o_R = (head * D + u[:, None]) * 4 * D + (j // DP * D + j % DP)[None, :]  # [in, gate and out]
    at_R = (u < D)[:, None] & (j % DP < D)[None, :]
    R_if = tl.load(R_p + o_R, mask=at_R, other=0.0)
    R_zo = tl.load(R_p + o_R + 2 * D, mask=at_R, other=0.0)
    kept = tl.load(dh1_p + o_state, mask=at, other=0.0)
    dc = tl.load(dc1_p + o_state, mask=at, other=0.0)
    dn = tl.load(dn1_p + o_state, mask=at, other=0.0)
    c = tl.load(c1_p + o_state, mask=at, other=0.0)
    n = tl.load(n1_p + o_state, mask=at, other=1.0)
    plane = tl.cast(B, tl.int64) * T * HD
    dtype = dx_p.dtype.element_ty

    upstream = tl.load(dh_p + o_h, mask=at, other=0.0)
    i, f, z, o, slope = _saved(saved_p, plane, o_h, at, EXP_FORGET)
    c_in, n_in = _before(saved_p, plane, o_h - HD, at, T - 1, c0_p, n0_p, o_state, at)
    d_if = tl.zeros((2 * DP, BB), dtype)
    d_zo = d_if
    for step in range(0, T):
        t = T - 1 - tl.cast(step, tl.int32)
        starts = None
        if reset_p is not None:
            after = b * T + tl.minimum(t + 1, T - 1)
            starts = tl.load(reset_p + after, mask=b < B, other=0)[None, :] != 0
        dh = _back(d_if, d_zo, R_if, R_zo, scale_p, o_state, at, starts, clip, CLIP, PREC)
        dh += kept + upstream
        old_dc, old_dn = dc, dn
        di, df, dz, do, dc, dn = _cell_gradient(
            dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope, EXP_FORGET
        )
        kept = tl.zeros((DP, BB), tl.float32)
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=b < B, other=0)[None, :] != 0
            di, df = tl.where(held, 0.0, di), tl.where(held, 0.0, df)
            dz, do = tl.where(held, 0.0, dz), tl.where(held, 0.0, do)
            dc, dn = tl.where(held, old_dc, dc), tl.where(held, old_dn, dn)
            kept = tl.where(held, dh, 0.0)
        di, df, dz, do = di.to(dtype), df.to(dtype), dz.to(dtype), do.to(dtype)
        tl.store(dx_p + o_x, di, mask=at)
        tl.store(dx_p + HD + o_x, df, mask=at)
        tl.store(dx_p + 2 * HD + o_x, dz, mask=at)
        tl.store(dx_p + 3 * HD + o_x, do, mask=at)
        o_x -= 4 * HD
        d_if = tl.reshape(tl.permute(tl.join(di, df), (2, 0, 1)), (2 * DP, BB))
        d_zo = tl.reshape(tl.permute(tl.join(dz, do), (2, 0, 1)), (2 * DP, BB))
        c, n = c_in, n_in
        o_h -= HD
        earlier = _if(t > 0, at)
        upstream = tl.load(dh_p + o_h, mask=earlier, other=0.0)
        i, f, z, o, slope = _saved(saved_p, plane, o_h, earlier, EXP_FORGET)
        c_in, n_in = _before(saved_p, plane, o_h - HD, earlier, t - 1, c0_p, n0_p, o_state, at)
    starts = None
    if reset_p is not None:
        starts = tl.load(reset_p + b * T, mask=b < B, other=0)[None, :] != 0
    dh = _back(d_if, d_zo, R_if, R_zo, scale_p, o_state, at, starts, clip, CLIP, PREC) + kept
    tl.store(dh0_p + o_state, dh, mask=at)
    tl.store(dc0_p + o_state, dc, mask=at)
    tl.store(dn0_p + o_state, dn, mask=at)


# -------------------------------------------------------------------- a head in several programs


@triton.jit
def _exchanged(p, o, there, WAIT: tl.constexpr):
    """A tile that other programs write; WAIT: until all of it is there."""
    if WAIT:
        # As whole numbers: all bits set are MISSING.
        bits: tl.constexpr = tl.int16 if p.dtype.element_ty.primitive_bitwidth == 16 else tl.int32
        q = p.to(tl.pointer_type(bits), bitcast=True)
        tile = tl.load(q + o, mask=there, other=0, volatile=True)
        while tl.min(tl.where(tile == -1, 0, 1)) == 0:
            tile = tl.load(q + o, mask=there, other=0, volatile=True)
        return tile.to(p.dtype.element_ty, bitcast=True)
    else:
        return tl.load(p + o, mask=there, other=0.0)


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
    p, o, k, there, R, starts, scale_p, o_scale,
    D: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr, KR: tl.constexpr, WAIT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """h of one step, (BB, D), times R, in rounds of KR units: i, f, z, o, each (BB, BU)."""
    g = tl.zeros((BB, 4 * BU), tl.float32)
    for j in tl.static_range((D + KR - 1) // KR):
        at = there & (j * KR + k < D)[None, :]
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
    return _four(tl.permute(tl.reshape(g, (BB, 2, BU, 2)), (0, 2, 1, 3)))


@_kernel
def forward_split(
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
        o_bias = head * D + u
        bi = tl.load(bias_p + o_bias, mask=u < D, other=0.0).to(tl.float32)[None, :]
        bf = tl.load(bias_p + HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[None, :]
        bz = tl.load(bias_p + 2 * HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[None, :]
        bo = tl.load(bias_p + 3 * HD + o_bias, mask=u < D, other=0.0).to(tl.float32)[None, :]
    if h0_p is not None:
        h = tl.load(h0_p + o_state, mask=at, other=0.0)
        c, n, m = _first(c0_p, n0_p, m0_p, o_state, at)
    else:
        h = tl.zeros((BB, BU), tl.float32)
        c, n, m = h, h, h + NEVER
    plane = tl.cast(B, tl.int64) * T * HD
    dtype: tl.constexpr = h_p.dtype.element_ty

    o_row = b[:, None] * T * HD + head * D + k[None, :]
    o_scale = b[:, None] * HD + head * D + k[None, :]
    o_row += (tl.cast(start, tl.int64) - 1) * HD
    xi = tl.load(x_p + o_x, mask=at, other=0.0)
    xf = tl.load(x_p + HD + o_x, mask=at, other=0.0)
    xz = tl.load(x_p + 2 * HD + o_x, mask=at, other=0.0)
    xo = tl.load(x_p + 3 * HD + o_x, mask=at, other=0.0)
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
        h, c, n, m, i, f, z, o, slope = _cell(i, f, z, o, c, n, m, EXP_FORGET)
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=b < B, other=0)[:, None] != 0
            h, c = tl.where(held, h_old, h), tl.where(held, c_old, c)
            n, m = tl.where(held, n_old, n), tl.where(held, m_old, m)
        tl.store(h_p + o_h, _published(h, dtype), mask=at)
        # The next step's inputs arrive while the programs wait for each other.
        o_x += 4 * HD
        later = _if(t + 1 < stop, at)
        xi = tl.load(x_p + o_x, mask=later, other=0.0)
        xf = tl.load(x_p + HD + o_x, mask=later, other=0.0)
        xz = tl.load(x_p + 2 * HD + o_x, mask=later, other=0.0)
        xo = tl.load(x_p + 3 * HD + o_x, mask=later, other=0.0)
        if saved_p is not None:
            _save(saved_p, plane, o_h, at, i, f, z, o, c, n, slope, EXP_FORGET)
        o_h += HD
    tl.store(h1_p + o_state, h, mask=at)
    tl.store(c1_p + o_state, c, mask=at)
    tl.store(n1_p + o_state, n, mask=at)
    tl.store(m1_p + o_state, tl.where(m <= NEVER / 2, 0.0, m), mask=at)


@_kernel
def backward_split(
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
    c = tl.load(c1_p + o_state, mask=_if(stop == T, at), other=0.0)
    n = tl.load(n1_p + o_state, mask=_if(stop == T, at), other=1.0)
    plane = tl.cast(B, tl.int64) * T * HD
    dtype: tl.constexpr = dx_p.dtype.element_ty
    if stop < T:
        c, n = _before(saved_p, plane, o_h, at, stop, c0_p, n0_p, o_state, at)

    there = _if(stop > 0, at)
    upstream = tl.load(dh_p + o_h, mask=there, other=0.0)
    i, f, z, o, slope = _saved(saved_p, plane, o_h, there, EXP_FORGET)
    c_in, n_in = _before(saved_p, plane, o_h - HD, there, stop - 1, c0_p, n0_p, o_state, at)
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
            back = _limited(tl.sum(pieces, 0), scale_p, o_state, at, starts, clip, CLIP)
            if hold_p is not None:  # a held step's gate gradients are zero: so is `back`
                held = tl.load(hold_p + b * T + t + 1, mask=b < B, other=0)[:, None] != 0
                back += tl.where(held, dh, 0.0)
            dh = back
        o_a -= 4 * HD
        there = _if(t >= 0, at)
        dh += upstream
        old_dc, old_dn = dc, dn
        di, df, dz, do, dc, dn = _cell_gradient(
            dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope, EXP_FORGET
        )
        keep = t < 0
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=_if(t >= 0, b < B), other=1)[:, None] != 0
            di, df = tl.where(held, 0.0, di), tl.where(held, 0.0, df)
            dz, do = tl.where(held, 0.0, dz), tl.where(held, 0.0, do)
            keep = keep | held
        dc, dn = tl.where(keep, old_dc, dc), tl.where(keep, old_dn, dn)
        tl.store(dx_p + o_x, _published(di, dtype), mask=there)
        tl.store(dx_p + HD + o_x, _published(df, dtype), mask=there)
        tl.store(dx_p + 2 * HD + o_x, _published(dz, dtype), mask=there)
        tl.store(dx_p + 3 * HD + o_x, _published(do, dtype), mask=there)
        o_x -= 4 * HD
        c, n = c_in, n_in
        o_h -= HD
        there = _if((t > start) & (t > 0), at)
        upstream = tl.load(dh_p + o_h, mask=there, other=0.0)
        i, f, z, o, slope = _saved(saved_p, plane, o_h, there, EXP_FORGET)
        c_in, n_in = _before(saved_p, plane, o_h - HD, there, t - 1, c0_p, n0_p, o_state, at)
    tl.store(dh0_p + o_state, dh, mask=at)
    tl.store(dc0_p + o_state, dc, mask=at)
    tl.store(dn0_p + o_state, dn, mask=at)


# --------------------------------------------------------------------------------- all at once


@_kernel
def kernel_gradient(
    h_p, dx_p, first_p, reset_p, scale_p, dR_p, dbias_p, B, T, H, rows,
    D: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A tile (BK of h, BN of a gate) of the recurrent kernel's gradient, summed over `rows` of
    the B T steps; and the bias'. dR (splits, H, D, 4, D), dbias (splits, 4, H, D)."""
    tiles_k: tl.constexpr = (D + BK - 1) // BK
    tiles_n: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0)
    tile_k, pid = pid % tiles_k, pid // tiles_k
    tile_n, pid = pid % tiles_n, pid // tiles_n
    gate, pid = pid % 4, pid // 4
    head, split = pid % H, (pid // H).to(tl.int64)
    k, u = tile_k * BK + tl.arange(0, BK), tile_n * BN + tl.arange(0, BN)
    HD = H * D
    dtype: tl.constexpr = h_p.dtype.element_ty
    acc = tl.zeros((BK, BN), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    # Offsets within a block of rows are short: pointers would fill the registers.
    block = tl.arange(0, L)
    o_dg = block[:, None] * 4 * HD + u[None, :]
    o_h = block[None, :] * HD + k[:, None]
    for step in range(0, rows, L):
        begin = split * rows + tl.cast(step, tl.int64)
        r = begin + block
        t, b = (r % T).to(tl.int32), (r // T).to(tl.int32)
        there = (step + block < rows) & (b < B)
        dg = tl.load(
            dx_p + (begin * 4 + gate) * HD + head * D + o_dg,
            mask=there[:, None] & (u < D)[None, :], other=0.0,
        )  # fmt: skip
        at = there[None, :] & (k < D)[:, None]
        at_h = at & (t > 0)[None, :]
        h = tl.load(h_p + (begin - 1) * HD + head * D + o_h, mask=at_h, other=0.0)
        o_state = b[None, :] * HD + head * D + k[:, None]
        if first_p is not None:
            h += tl.load(first_p + o_state, mask=at & (t == 0)[None, :], other=0.0)
        if reset_p is not None:
            starts = tl.load(reset_p + r, mask=there, other=0) != 0
            h = tl.where(starts[None, :], 0.0, h)
        if scale_p is not None:
            h *= tl.load(scale_p + o_state, mask=at, other=0.0)
        acc = tl.dot(h.to(dtype), dg, acc, input_precision=PREC)
        if tile_k == 0:
            total += tl.sum(dg.to(tl.float32), 0)
    o_R = ((split * H + head) * D + k[:, None]) * 4 * D + gate * D + u[None, :]
    tl.store(dR_p + o_R, acc, mask=(k < D)[:, None] & (u < D)[None, :])
    if dbias_p is not None and tile_k == 0:
        tl.store(dbias_p + (split * 4 + gate) * HD + head * D + u, total, mask=u < D)
