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
    NR: tl.constexpr = LC // L
    REVERSE: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    TURNED: tl.constexpr = ROLE == "dq" or ROLE == "dk"  # S is stored (DZ, DX)
    FULL_X: tl.constexpr = DX % BX == 0
    FULL_Z: tl.constexpr = DZ % BZ == 0
    pid = tl.program_id(0)
    jz, block, rest = pid % NZ, (pid // NZ) % NR, pid // (NZ * NR)
    if ROLE == "h" or ROLE == "dv":
        # All heads of a chunk, which lie side by side: 1 % faster here, slower in other roles.
        c, bh = rest // H % NC, (rest // (H * NC) * H + rest % H).to(tl.int64)
    else:
        c, bh = rest % NC, (rest // NC).to(tl.int64)
    # Long rows first: they take longest.
    first = (block if REVERSE else NR - 1 - block) * L
    here = tl.minimum(LC, T - c * LC)
    if first >= here:
        return
    o_row = ((bh // H) * T + c * LC) * H + bh % H
    x_p += o_row * DX
    y_p += o_row * DX
    z_p += o_row * DZ
    rows = first + tl.arange(0, L)
    cx, cz = tl.arange(0, BX), jz * BZ + tl.arange(0, BZ)
    o_vec = (bh * NC + c) * LC
    if SEG:
        seg_p += (bh // H) * T
        seg, before, last = load_segments(seg_p, T, c, rows, LC)

    # The row's exponents, and the weight of what comes over the border.
    border = tl.load(m_p + bh * (NC + 1) + c)
    if ROLE == "h":
        entering = border
        if SEG:
            entering = tl.where(seg == before, border, NEVER)
        b = tl.load(b_p + o_vec + rows)
        row_rest = tl.load(br_p + o_vec + rows)
        row_m = (b + row_rest) + tl.maximum(tl.load(peak_p + o_vec + rows), entering)
        whole = rounded(row_m)
        row = b - whole
        w = tl.exp((row + rounded(border)) + row_rest)  # [L]
    else:
        row = tl.load(row_p + o_vec + rows)
        row_rest = tl.load(row_rest_p + o_vec + rows)
        if REVERSE:
            p_chunk = chunk_p + (bh * NC + c) * 4
            leaving = rounded(tl.load(m_p + bh * (NC + 1) + c + 1))
            w = tl.exp((row + (tl.load(p_chunk) - leaving)) + (row_rest + tl.load(p_chunk + 1)))
        else:
            w = tl.exp((row + rounded(border)) + row_rest)
    if SEG:
        w = tl.where(seg == (last if REVERSE else before), w, 0.0)
    if not EVEN:
        w = tl.where(rows < here, w, 0.0)
    # Over the border.
    slot = bh * (NC if REVERSE else NC + 1) + c
    s_p += slot * DX * DZ
    acc = tl.zeros((L, BZ), tl.float32)
    r = tl.zeros((L,), tl.float32)
    dtype = s_p.dtype.element_ty
    for start in tl.range(0, DX, BS, num_stages=ST):
        cs = start + tl.arange(0, BS)
        xs = load_tile(x_p, rows, cs, H * DX, here, DX, EVEN, DX % BS == 0)  # [L, BS]
        if TURNED:
            S = load_transposed_tile(s_p, cz, cs, DX, DZ, DX, FULL_Z, DX % BS == 0)  # [BS, BZ]
        else:
            S = load_tile(s_p, cs, cz, DZ, DX, DZ, DX % BS == 0, FULL_Z)
        acc = tl.dot(xs.to(dtype), S, acc, input_precision=PREC)
    if NX == 1:
        x = load_tile(x_p, rows, cx, H * DX, here, DX, EVEN, FULL_X)  # [L, BX]
    if ROLE == "h" or ROLE == "dq":
        # Not in the loop above: Triton (3.6, 3.9) keeps a buffer too few of what both a product
        # on Hopper and something else read, and overwrites xs while the product still reads it.
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
        if NX == 1:
            yt = load_transposed_tile(y_p, cols, cx, H * DX, here, DX, EVEN, FULL_X)  # [BX, LN]
            p = tl.dot(x, yt, input_precision=PREC)
        else:
            p = tl.zeros((L, LN), tl.float32)
            if NX == 2:
                p = _slice(p, x_p, y_p, rows, cols, cx, H * DX, here, DX, EVEN, FULL_X, PREC)
                c1 = BX + cx
                p = _slice(p, x_p, y_p, rows, cols, c1, H * DX, here, DX, EVEN, FULL_X, PREC)
            else:
                for kx in range(NX):
                    c2 = kx * BX + cx
                    p = _slice(p, x_p, y_p, rows, cols, c2, H * DX, here, DX, EVEN, FULL_X, PREC)
        if ROLE == "dq":
            p += rho_row[:, None]
        elif ROLE == "dk":
            p += tl.load(rho_p + o_vec + cols)[None, :]
        log_w = row[:, None] + tl.load(col_p + o_vec + cols)[None, :]
        log_w += row_rest[:, None] + tl.load(col_rest_p + o_vec + cols)[None, :]
        keep = rows[:, None] <= cols[None, :] if REVERSE else rows[:, None] >= cols[None, :]
        if SEG:
            seg_col = tl.load(seg_p + tl.minimum(c * LC + cols, T - 1))
            keep &= seg[:, None] == seg_col[None, :]
        if not EVEN:
            keep &= cols[None, :] < here
        p = tl.where(keep, p * tl.exp(log_w), 0.0)  # [L, LN]
        if ROLE == "h":
            r += tl.sum(p, 1)
        z = load_tile(z_p, cols, cz, H * DZ, here, DZ, EVEN, FULL_Z)  # [LN, BZ]
        acc = tl.dot(p.to(dtype), z.to(dtype), acc, input_precision=PREC)

    if ROLE == "h":
        r *= scale
        floor = tl.exp(tl.where(whole > -80.0, -whole, 80.0))
        d = tl.maximum(tl.abs(r), floor) + eps * tl.exp(row_m - whole)
        acc *= (scale / d)[:, None]
        if jz == 0:
            tl.store(row_p + o_vec + rows, row)
            tl.store(row_rest_p + o_vec + rows, row_rest - tl.log(d))
            sign = tl.where(r > 0, 1.0, -1.0)
            tl.store(sign_p + o_vec + rows, tl.where(tl.abs(r) > floor, sign, 0.0))
    else:
        acc *= scale
    if TURNED:
        own = load_tile(own_p + o_row * DZ, rows, cz, H * DZ, here, DZ, EVEN, FULL_Z)
        tl.store(dot_p + o_vec + rows, tl.sum(own.to(tl.float32) * acc, 1))
    inside = (rows[:, None] < here) & (cz[None, :] < DZ)
    out_p += o_row * DZ + rows[:, None] * (H * DZ) + cz[None, :]
    tl.store(out_p, acc.to(out_p.dtype.element_ty), mask=inside)
