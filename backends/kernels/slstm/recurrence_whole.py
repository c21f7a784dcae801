"""The sLSTM in Triton, a head in one program: h, c, n, m never leave its registers."""

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


@jit_kernel
def forward(
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
        bi, bf, bz, bo = load_gates(bias_p + head * D + u[:, None], HD, (u < D)[:, None])
    if scale_p is not None:
        scale = tl.load(scale_p + o_state, mask=at, other=0.0)
    if h0_p is not None:
        h = tl.load(h0_p + o_state, mask=at, other=0.0)
        c, n, m = first_state(c0_p, n0_p, m0_p, o_state, at)
    else:
        h = tl.zeros((DP, BB), tl.float32)
        c, n, m = h, h, h + NEVER
    plane = tl.cast(B, tl.int64) * T * HD
    dtype = h_p.dtype.element_ty

    xi, xf, xz, xo = load_gates(x_p + o_x, HD, at)
    for step in range(0, T):
        t = tl.cast(step, tl.int32)  # the interpreter has a Python number
        h_old, c_old, n_old, m_old = h, c, n, m
        if reset_p is not None:
            starts = tl.load(reset_p + b * T + t, mask=b < B, other=0)[None, :] != 0
            h, m = tl.where(starts, 0.0, h), tl.where(starts, NEVER, m)
        if scale_p is not None:
            h *= scale
        g = tl.reshape(tl.dot(R, h.to(dtype), input_precision=PREC), (2, 2, DP, BB))
        i, f, z, o = split_gates(tl.permute(g, (2, 3, 0, 1)))
        i, f, z, o = i + xi, f + xf, z + xz, o + xo
        # The next step's inputs arrive while this one is computed.
        o_x += 4 * HD
        later = mask_if(t + 1 < T, at)
        xi, xf, xz, xo = load_gates(x_p + o_x, HD, later)
        if bias_p is not None:
            i, f, z, o = i + bi, f + bf, z + bz, o + bo
        h, c, n, m, i, f, z, o, slope = cell(i, f, z, o, c, n, m, EXP_FORGET)
        if hold_p is not None:
            held = tl.load(hold_p + b * T + t, mask=b < B, other=0)[None, :] != 0
            h, c = tl.where(held, h_old, h), tl.where(held, c_old, c)
            n, m = tl.where(held, n_old, n), tl.where(held, m_old, m)
        tl.store(h_p + o_h, h.to(dtype), mask=at)
        if saved_p is not None:
            save(saved_p, plane, o_h, at, i, f, z, o, c, n, slope, EXP_FORGET)
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
    return limited(dh, scale_p, o_scale, at, starts, clip, CLIP)


@jit_kernel
def backward(
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
    i, f, z, o, slope = load_saved(saved_p, plane, o_h, at, EXP_FORGET)
    c_in, n_in = state_before(saved_p, plane, o_h - HD, at, T - 1, c0_p, n0_p, o_state, at)
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
        di, df, dz, do, dc, dn = cell_gradient(
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
        store_gates(dx_p + o_x, HD, at, di, df, dz, do)
        o_x -= 4 * HD
        d_if = tl.reshape(tl.permute(tl.join(di, df), (2, 0, 1)), (2 * DP, BB))
        d_zo = tl.reshape(tl.permute(tl.join(dz, do), (2, 0, 1)), (2 * DP, BB))
        c, n = c_in, n_in
        o_h -= HD
        earlier = mask_if(t > 0, at)
        upstream = tl.load(dh_p + o_h, mask=earlier, other=0.0)
        i, f, z, o, slope = load_saved(saved_p, plane, o_h, earlier, EXP_FORGET)
        c_in, n_in = state_before(saved_p, plane, o_h - HD, earlier, t - 1, c0_p, n0_p, o_state, at)
    starts = None
    if reset_p is not None:
        starts = tl.load(reset_p + b * T, mask=b < B, other=0)[None, :] != 0
    dh = _back(d_if, d_zo, R_if, R_zo, scale_p, o_state, at, starts, clip, CLIP, PREC) + kept
    tl.store(dh0_p + o_state, dh, mask=at)
    tl.store(dc0_p + o_state, dc, mask=at)
    tl.store(dn0_p + o_state, dn, mask=at)
