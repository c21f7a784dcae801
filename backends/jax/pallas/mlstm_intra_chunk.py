"""The mLSTM within a chunk, in Pallas. Conventions as in mlstm_inter_chunk.py."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from keras_xlstm.backends.jax.pallas.launch import div, dot, launch, loop, output, place


def intra_chunk(role, s, arrays, segment_ids, tiles):
    """What happens within a chunk and what comes over its border, in four roles of one form,

        out_row = sum over cols of exp(row + col) (x_row . y_col + rho) z_col
                  + w_row (x_row . S + rho n)

      role   rows  x   y   z   S      rho of        causal
      "h"    i     q   k   v   C      -             cols <= rows
      "dq"   i     dh  v   k   C^T    rows          cols <= rows
      "dk"   j     v   dh  q   dC^T   cols          cols >= rows
      "dv"   j     k   q   dh  dC     -             cols >= rows

    `arrays`: x, y, z, S, n, row, row_rest, col, col_rest, w; "h" also floor and least, what bounds
    the denominator d and what is added to it; "dq" h and sign; "dk" rho; both also own, q or k.
    Returns a dict: out; of "h" log_d and sign (where |q n| bounds d, its sign); of "dq" rho; of
    "dq" and "dk" dot = own . out, for the gates.
    """
    x, z = arrays["x"], arrays["z"]
    DX, DZ = x.shape[-1], z.shape[-1]
    L, LN, BX, BZ, BS = (tiles[k] for k in ("L", "LN", "BX", "BZ", "BS"))
    NX, NZ, NR = DX // BX, DZ // BZ, s.LC // L
    reverse, turned = role in ("dk", "dv"), role in ("dq", "dk")
    dtype = arrays["S"].dtype  # of what enters products
    product = functools.partial(dot, precision=s.precision)

    def kernel(x, y, z, S, n, row, row_rest, col, col_rest, w, out, **given):
        jz, block, c, b, head, bh = place(s, NZ, NR)
        # Long rows first: they take longest.
        first = (block if reverse else NR - 1 - block) * L
        rows, steps = pl.ds(first, L), pl.ds(c * s.LC + first, L)
        cz = pl.ds(jz * BZ, BZ)
        row_log, row_rest, w = row[bh, c, rows], row_rest[bh, c, rows], w[bh, c, rows]
        index = first + lax.iota(jnp.int32, L)
        if segment_ids is not None:
            segment = given["segment_ids"][b, c, rows]

        def over_border(j, acc):
            cs = pl.ds(j * BS, BS)
            xs = x[b, steps, head, cs].astype(dtype)  # [L, BS]
            if turned:
                return acc + product(xs, S[bh, c, cz, cs], (1, 1))
            return acc + product(xs, S[bh, c, cs, cz], (1, 0))

        acc = loop(0, DX // BS, over_border, jnp.zeros((L, BZ), jnp.float32)) * w[:, None]
        held = x[b, steps, head, pl.ds(0, BX)] if NX == 1 else None
        step = BS if held is None else BX

        def bound(j, r):
            """Of "h" x . n, of "dq" x . h."""
            cs = pl.ds(j * step, step)
            xs = x[b, steps, head, cs] if held is None else held
            if role == "h":
                other = n[bh, c, cs][None, :]
            else:
                other = given["h"][b, steps, head, cs].astype(jnp.float32)
            return r + jnp.sum(xs.astype(jnp.float32) * other, 1)

        # Not in the loop above: Triton, pipelining, keeps a buffer too few of what both a product
        # on Hopper and something else read, and overwrites xs while the product still reads it.
        r = jnp.zeros((L,), jnp.float32)
        if role in ("h", "dq"):
            r = loop(0, DX // step, bound, r) if held is None else bound(jnp.int32(0), r)
        if role == "h":
            r *= w
        elif role == "dq":
            rho = -given["sign"][bh, c, rows] * r
            given["rho"][bh, c, rows] = rho
        if turned:
            acc += (w * rho if role == "dq" else w)[:, None] * n[bh, c, cz][None, :]

        def within(j, carry):
            acc, r = carry
            cols, at = pl.ds(j * LN, LN), pl.ds(c * s.LC + j * LN, LN)

            def slice_of(k, p):
                ck = pl.ds(k * BX, BX)
                xs = x[b, steps, head, ck] if held is None else held
                return p + product(xs, y[b, at, head, ck], (1, 1))

            p = jnp.zeros((L, LN), jnp.float32)
            if NX <= 2:
                for k in range(NX):
                    p = slice_of(k, p)
            else:  # unrolled, the tiles of all slices would need shared memory at once
                p = loop(0, NX, slice_of, p)
            if role == "dq":
                p += rho[:, None]
            elif role == "dk":
                p += given["rho"][bh, c, cols][None, :]
            log_w = row_log[:, None] + col[bh, c, cols][None, :]
            log_w += row_rest[:, None] + col_rest[bh, c, cols][None, :]
            other = j * LN + lax.iota(jnp.int32, LN)
            later, earlier = (other, index) if reverse else (index, other)
            keep = (
                (later[None, :] >= earlier[:, None])
                if reverse
                else (later[:, None] >= earlier[None, :])
            )
            if segment_ids is not None:
                keep &= segment[:, None] == given["segment_ids"][b, c, cols][None, :]
            p = jnp.where(keep, p * jnp.exp(log_w), 0.0)  # [L, LN]
            if role == "h":
                r += jnp.sum(p, 1)
            zs = z[b, at, head, cz]  # [LN, BZ]
            return acc + product(p.astype(dtype), zs.astype(dtype), (1, 0)), r

        start = div(first, LN) if reverse else 0
        end = s.LC // LN if reverse else div(first + L, LN)
        acc, r = loop(start, end, within, (acc, r))
        if role == "h":
            r *= s.scale
            floor = given["floor"][bh, c, rows]
            d = jnp.maximum(jnp.abs(r), floor) + given["least"][bh, c, rows]
            acc *= (s.scale / d)[:, None]
            given["log_d"][bh, c, rows] = jnp.log(d)
            sign = jnp.where(r > 0, 1.0, -1.0)
            given["sign"][bh, c, rows] = jnp.where(jnp.abs(r) > floor, sign, 0.0)
        else:
            acc *= s.scale
        if turned:
            own = given["own"][b, steps, head, cz].astype(jnp.float32)
            given["dot"][bh, c, rows] = jnp.sum(own * acc, 1)
        out[b, steps, head, cz] = acc.astype(out.dtype)

    vectors = {"h": ("log_d", "sign"), "dq": ("rho", "dot"), "dk": ("dot",), "dv": ()}[role]
    outputs = {"out": output(z.shape, z.dtype)}
    outputs |= {name: output((s.BH, s.NC, s.LC)) for name in vectors}
    options = {k: tiles[k] for k in ("num_warps", "num_stages")}
    return launch(
        kernel, {**arrays, "segment_ids": segment_ids}, outputs, (NZ * NR * s.NC, s.H, s.B),
        f"mlstm_{role}", s.interpret, **options,
    )  # fmt: skip
