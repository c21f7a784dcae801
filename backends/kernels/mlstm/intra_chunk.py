"""The mLSTM within a chunk, in Triton (in some sizes on Hopper: hopper_intra_chunk.py): one kernel
in four roles of one form,

    out_row = sum over cols of exp(row + col) (x_row . y_col + rho) z_col
              + exp(row + border) (x_row . S + rho n)

  role   rows  x   y   z   S      rho of        causal
  "h"    i     q   k   v   C      -             cols <= rows
  "dq"   i     dh  v   k   C^T    rows          cols <= rows
  "dk"   j     v   dh  q   dC^T   cols          cols >= rows
  "dv"   j     k   q   dh  dC     -             cols >= rows

Conventions as in inter_chunk.py. "dk" and "dv" as one kernel, which would read their inputs once,
took half as long again as the two together: their sums leave no registers.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.mlstm.inter_chunk import (
    NEVER,
    jit_kernel,
    load_segments,
    load_tile,
    load_transposed_tile,
    rounded,
)


@triton.jit
def _slice(
    p, x_p, y_p, rows, cols, cs, stride, here, D: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """p + x y^T over the columns cs of both."""
    x = load_tile(x_p, rows, cs, stride, here, D, EVEN, FULL)
    yt = load_transposed_tile(y_p, cols, cs, stride, here, D, EVEN, FULL)
    return tl.dot(x, yt, p, input_precision=PREC)


@triton.jit
def _products(
    x, x_p, y_p, rows, cols, cx, stride, here, D: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x y^T [L, LN]; x is a tile where it has one block of columns, otherwise None."""
    BX: tl.constexpr = cx.shape[0]
    NX: tl.constexpr = (D + BX - 1) // BX
    if NX == 1:
        yt = load_transposed_tile(y_p, cols, cx, stride, here, D, EVEN, FULL)  # [BX, LN]
        p = tl.dot(x, yt, input_precision=PREC)
    else:
        p = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        if NX == 2:
            p = _slice(p, x_p, y_p, rows, cols, cx, stride, here, D, EVEN, FULL, PREC)
            c1 = BX + cx
            p = _slice(p, x_p, y_p, rows, cols, c1, stride, here, D, EVEN, FULL, PREC)
        else:
            for kx in range(NX):
                c2 = kx * BX + cx
                p = _slice(p, x_p, y_p, rows, cols, c2, stride, here, D, EVEN, FULL, PREC)
    return p


@triton.jit
def _row_dots(
    r, x, x_p, n_p, h_p, slot, o_row, rows, here, H, ROLE: tl.constexpr, DX: tl.constexpr,
    BX: tl.constexpr, BS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """r [L] + x . n in "h", + x . h in "dq".

    Not in the loop over S: Triton (3.6, 3.9) keeps a buffer too few of what both a product on
    Hopper and something else read, and overwrites it while the product still reads it.
    """
    NX: tl.constexpr = (DX + BX - 1) // BX
    STEP: tl.constexpr = BX if NX == 1 else BS
    for start in tl.range(0, DX, STEP, num_stages=1):
        cs = start + tl.arange(0, STEP)
        if NX == 1:
            xs = x
        else:
            xs = load_tile(x_p, rows, cs, H * DX, here, DX, EVEN, DX % STEP == 0)
        if ROLE == "h":
            n = tl.load(n_p + slot * DX + cs, mask=cs < DX, other=0.0)
            r += tl.sum(xs.to(tl.float32) * n[None, :], 1)
        else:
            h = load_tile(h_p + o_row * DX, rows, cs, H * DX, here, DX, EVEN, DX % STEP == 0)
            r += tl.sum(xs.to(tl.float32) * h.to(tl.float32), 1)
    return r


@triton.jit
def _exponents(b_p, br_p, peak_p, o_vec, rows, entering):
    """Of rows [L] in "h": the exponents (whole, rest), and as they were, and what was taken off."""
    b = tl.load(b_p + o_vec + rows)
    row_rest = tl.load(br_p + o_vec + rows)
    row_m = (b + row_rest) + tl.maximum(tl.load(peak_p + o_vec + rows), entering)
    whole = rounded(row_m)
    return b - whole, row_rest, row_m, whole


@triton.jit
def _denominator(r, row_m, whole, eps):
    """d [L] over exp(whole), and its least."""
    floor = tl.exp(tl.where(whole > -80.0, -whole, 80.0))
    d = tl.maximum(tl.abs(r), floor) + eps * tl.exp(row_m - whole)
    return d, floor


@triton.jit
def _place(
    H, NC, ROLE: tl.constexpr, NZ: tl.constexpr, NR: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Block of columns, chunk, batch and head, first row of this thread block."""
    pid = tl.program_id(0)
    jz, block, rest = pid % NZ, (pid // NZ) % NR, pid // (NZ * NR)
    if ROLE == "h" or ROLE == "dv":
        # All heads of a chunk, which lie side by side: 1 % faster here, slower in other roles.
        c, bh = rest // H % NC, (rest // (H * NC) * H + rest % H).to(tl.int64)
    else:
        c, bh = rest % NC, (rest // NC).to(tl.int64)
    # Long rows first: they take longest.
    return jz, c, bh, (block if ROLE == "dk" or ROLE == "dv" else NR - 1 - block) * L


@triton.jit
def _load_state(
    s_p, cs, cz, DX, DZ, TURNED: tl.constexpr, FULL_S: tl.constexpr, FULL_Z: tl.constexpr
):
    """Rows cs and columns cz of S."""
    if TURNED:
        S = load_transposed_tile(s_p, cz, cs, DX, DZ, DX, FULL_Z, FULL_S)
    else:
        S = load_tile(s_p, cs, cz, DZ, DX, DZ, FULL_S, FULL_Z)
    return S


@triton.jit
def _border_weight(
    row, row_rest, border, chunk_p, m_p, bh, c, NC, rows, here, seg, of_state,
    REVERSE: tl.constexpr, SEG: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The weight [L] of what comes over the border; `of_state` is that state's segment."""
    if REVERSE:
        p_chunk = chunk_p + (bh * NC + c) * 4
        leaving = rounded(tl.load(m_p + bh * (NC + 1) + c + 1))
        w = tl.exp((row + (tl.load(p_chunk) - leaving)) + (row_rest + tl.load(p_chunk + 1)))
    else:
        w = tl.exp((row + rounded(border)) + row_rest)
    if SEG:
        w = tl.where(seg == of_state, w, 0.0)
    if not EVEN:
        w = tl.where(rows < here, w, 0.0)
    return w


@triton.jit
def _weighted(
    p, row, row_rest, col_p, col_rest_p, o_vec, rows, cols, seg, seg_p, c, T, here,
    REVERSE: tl.constexpr, LC: tl.constexpr, SEG: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """p [L, LN] with the weights of its pairs of steps."""
    log_w = row[:, None] + tl.load(col_p + o_vec + cols)[None, :]
    log_w += row_rest[:, None] + tl.load(col_rest_p + o_vec + cols)[None, :]
    keep = rows[:, None] <= cols[None, :] if REVERSE else rows[:, None] >= cols[None, :]
    if SEG:
        seg_col = tl.load(seg_p + tl.minimum(c * LC + cols, T - 1))
        keep &= seg[:, None] == seg_col[None, :]
    if not EVEN:
        keep &= cols[None, :] < here
    return tl.where(keep, p * tl.exp(log_w), 0.0)


@triton.jit
def _store_row_terms(row_p, row_rest_p, sign_p, o_vec, rows, row, row_rest, r, d, floor):
    """What the other roles read of rows."""
    tl.store(row_p + o_vec + rows, row)
    tl.store(row_rest_p + o_vec + rows, row_rest - tl.log(d))
    sign = tl.where(r > 0, 1.0, -1.0)
    tl.store(sign_p + o_vec + rows, tl.where(tl.abs(r) > floor, sign, 0.0))


@jit_kernel
def intra_chunk(
    x_p, y_p, z_p, s_p, n_p, out_p, own_p, dot_p, h_p, sign_p, rho_p, seg_p, m_p, chunk_p,
    row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p,
    T, H, NC, scale, eps,
    ROLE: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    BS: tl.constexpr, L: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr, SEG: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, ST: tl.constexpr,
):  # fmt: skip
    """See the head of this file. "h" also writes the row exponents and signs that the other roles
    read, "dq" rho; "dq" and "dk" write dot = own . out for the gates, own being q or k."""
    NX: tl.constexpr = (DX + BX - 1) // BX
    NZ: tl.constexpr = (DZ + BZ - 1) // BZ
    REVERSE: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    TURNED: tl.constexpr = ROLE == "dq" or ROLE == "dk"  # S is stored (DZ, DX)
    FULL_X: tl.constexpr = DX % BX == 0
    FULL_Z: tl.constexpr = DZ % BZ == 0
    jz, c, bh, first = _place(H, NC, ROLE, NZ, LC // L, L)
    here = tl.minimum(LC, T - c * LC)
    if first >= here:
        return
    o_row = ((bh // H) * T + c * LC) * H + bh % H
    x_p, y_p, z_p = x_p + o_row * DX, y_p + o_row * DX, z_p + o_row * DZ
    rows = first + tl.arange(0, L)
    cx, cz = tl.arange(0, BX), jz * BZ + tl.arange(0, BZ)
    o_vec = (bh * NC + c) * LC
    seg, before, last = None, None, None
    if SEG:
        seg_p += (bh // H) * T
        seg, before, last = load_segments(seg_p, T, c, rows, LC)

    # The row's exponents, and the weight of what comes over the border.
    border = tl.load(m_p + bh * (NC + 1) + c)
    if ROLE == "h":
        entering = border
        if SEG:
            entering = tl.where(seg == before, border, NEVER)
        row, row_rest, row_m, whole = _exponents(b_p, br_p, peak_p, o_vec, rows, entering)
    else:
        row = tl.load(row_p + o_vec + rows)
        row_rest = tl.load(row_rest_p + o_vec + rows)
    w = _border_weight(
        row, row_rest, border, chunk_p, m_p, bh, c, NC, rows, here, seg,
        last if REVERSE else before, REVERSE, SEG, EVEN,
    )  # fmt: skip
    # Over the border.
    slot = bh * (NC if REVERSE else NC + 1) + c
    s_p += slot * DX * DZ
    acc, r = tl.zeros((L, BZ), tl.float32), tl.zeros((L,), tl.float32)
    dtype = s_p.dtype.element_ty
    for start in tl.range(0, DX, BS, num_stages=ST):
        cs = start + tl.arange(0, BS)
        xs = load_tile(x_p, rows, cs, H * DX, here, DX, EVEN, DX % BS == 0)  # [L, BS]
        S = _load_state(s_p, cs, cz, DX, DZ, TURNED, DX % BS == 0, FULL_Z)  # [BS, BZ]
        acc = tl.dot(xs.to(dtype), S, acc, input_precision=PREC)
    x = None
    if NX == 1:
        x = load_tile(x_p, rows, cx, H * DX, here, DX, EVEN, FULL_X)  # [L, BX]
    if ROLE == "h" or ROLE == "dq":
        r = _row_dots(r, x, x_p, n_p, h_p, slot, o_row, rows, here, H, ROLE, DX, BX, BS, EVEN)
    if ROLE == "dq":
        rho_row = -tl.load(sign_p + o_vec + rows) * r
        tl.store(rho_p + o_vec + rows, rho_row)
    acc *= w[:, None]
    r *= w
    if TURNED:
        n = tl.load(n_p + slot * DZ + cz, mask=cz < DZ, other=0.0)
        acc += (w * rho_row if ROLE == "dq" else w)[:, None] * n[None, :]

    # Within the chunk.
    start = first if REVERSE else 0
    end = here if REVERSE else tl.minimum(first + L, here)
    for j in tl.range(start, end, LN, num_stages=ST):
        cols = j + tl.arange(0, LN)
        p = _products(x, x_p, y_p, rows, cols, cx, H * DX, here, DX, EVEN, FULL_X, PREC)
        if ROLE == "dq":
            p += rho_row[:, None]
        elif ROLE == "dk":
            p += tl.load(rho_p + o_vec + cols)[None, :]
        p = _weighted(
            p, row, row_rest, col_p, col_rest_p, o_vec, rows, cols, seg, seg_p, c, T, here,
            REVERSE, LC, SEG, EVEN,
        )  # fmt: skip
        if ROLE == "h":
            r += tl.sum(p, 1)
        z = load_tile(z_p, cols, cz, H * DZ, here, DZ, EVEN, FULL_Z)  # [LN, BZ]
        acc = tl.dot(p.to(dtype), z.to(dtype), acc, input_precision=PREC)

    if ROLE == "h":
        r *= scale
        d, floor = _denominator(r, row_m, whole, eps)
        acc *= (scale / d)[:, None]
        if jz == 0:
            _store_row_terms(row_p, row_rest_p, sign_p, o_vec, rows, row, row_rest, r, d, floor)
    else:
        acc *= scale
    if TURNED:
        own = load_tile(own_p + o_row * DZ, rows, cz, H * DZ, here, DZ, EVEN, FULL_Z)
        tl.store(dot_p + o_vec + rows, tl.sum(own.to(tl.float32) * acc, 1))
    inside = (rows[:, None] < here) & (cz[None, :] < DZ)
    out_p += o_row * DZ + rows[:, None] * (H * DZ) + cz[None, :]
    tl.store(out_p, acc.to(out_p.dtype.element_ty), mask=inside)
