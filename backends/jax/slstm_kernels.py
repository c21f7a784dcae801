"""The sLSTM in Pallas: a program takes some rows and all units of a head through time.

As backends/torch/slstm_whole.py: h, c, n, m never leave its registers. Tiles are (D units, BB
rows): few rows are then the narrow side of the tensor cores. Arrays come padded (slstm.py), so no
kernel masks: x (B, T, 4, H, D), h (B, T, H, D), states (B, H, D), flags (B, T), the recurrent
kernel (H, 4 D, D) [gate and out, in] and turned. `saved` (7, B, T, H, D): i, f, z, o as they act,
c, n, and the slope of f.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from keras_xlstm.backends.jax.tools import dot, launch, loop, output
from keras_xlstm.backends.parts import NEVER


def _tanh(x):
    y = jnp.exp(-2.0 * jnp.abs(x))
    far = (1.0 - y) / (1.0 + y)
    t = x * x
    near = x * (1.0 + t * (-1 / 3 + t * (2 / 15 + t * (-17 / 315 + t * (62 / 2835)))))
    return jnp.where(t < 0.06, near, jnp.where(x < 0.0, -far, far))


def _cell(i, f, z, o, c, n, m, exp_forget):
    """Eqs. 8-17, and the slope of log f."""
    if exp_forget:
        log_f, slope = f, None
    else:
        y = jnp.exp(-jnp.abs(f))
        log_f = jnp.minimum(f, 0.0) - jnp.log(1.0 + y)
        slope = jnp.where(f < 0.0, 1.0, y) / (1.0 + y)
    new_m = jnp.maximum(log_f + m, i)
    i, f = jnp.exp(i - new_m), jnp.exp((m - new_m) + log_f)
    z, o = _tanh(z), 1.0 / (1.0 + jnp.exp(-o))
    c, n = f * c + i * z, f * n + i
    saved = (i, f, z, o, c, n) if exp_forget else (i, f, z, o, c, n, slope)
    return o * (c / n), c, n, new_m, saved


def _cell_gradient(dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope):
    """The gate gradients, and those of the c and n before."""
    r = jnp.where(n == 0.0, 0.0, 1.0 / n)  # a held fresh start
    y = o * r
    h = y * c
    dc += dh * y
    dn -= dh * h * r
    di = i * (z * dc + dn)
    df = f * (c_in * dc + n_in * dn)
    df = df if slope is None else df * slope
    dz = i * dc * ((1.0 - z) * (1.0 + z))
    do = dh * h * (1.0 - o)
    return (di, df, dz, do), f * dc, f * dn


def _rows(BB):
    return pl.ds(pl.program_id(0) * BB, BB), pl.program_id(1)


def _flag(flags, rows, t):
    return None if flags is None else (flags[rows, t] != 0)[None, :]


def forward(s, x, R, bias, hold, reset, scale, first, keep):
    """`bias` (4, H, D) in float32, or None; `first` {} or h0, c0, n0, m0.

    Returns a dict: h, the last h1, c1, n1, m1 and, if `keep`, saved.
    """

    def kernel(
        x, R, h, h1, c1, n1, m1, bias=None, hold=None, reset=None, scale=None, saved=None, **first
    ):
        rows, head = _rows(s.BB)
        weights = R[head, :, :]
        product = functools.partial(dot, precision=s.precision)
        factor = None if scale is None else scale[rows, head, :].T

        biases = None if bias is None else [bias[gate, head, :][:, None] for gate in range(4)]

        def gates(t):
            return tuple(x[rows, t, gate, head, :].T for gate in range(4))

        def step(t, carry):
            (h_old, c_old, n_old, m_old), given = carry
            h_in, m_in, starts = h_old, m_old, _flag(reset, rows, t)
            if starts is not None:
                h_in, m_in = jnp.where(starts, 0.0, h_in), jnp.where(starts, NEVER, m_in)
            h_in = h_in if factor is None else h_in * factor
            g = lax.split(product(weights, h_in.astype(weights.dtype), (1, 0)), (s.D,) * 4, 0)
            g = [a + b.astype(jnp.float32) for a, b in zip(g, given, strict=True)]
            g = g if biases is None else [a + b for a, b in zip(g, biases, strict=True)]
            # The next step's inputs arrive while this one is computed.
            given = gates(jnp.minimum(t + 1, s.T - 1))
            *new, kept = _cell(*g, c_old, n_old, m_in, s.exp_forget)
            held = _flag(hold, rows, t)
            if held is not None:
                old = h_old, c_old, n_old, m_old
                new = [jnp.where(held, a, b) for a, b in zip(old, new, strict=True)]
                kept = *kept[:4], new[1], new[2], *kept[6:]
            h[rows, t, head, :] = new[0].T.astype(h.dtype)
            if saved is not None:
                for plane, value in enumerate(kept):
                    saved[plane, rows, t, head, :] = value.T
            return tuple(new), given

        if first:
            state = tuple(first[name][rows, head, :].T for name in ("h0", "c0", "n0", "m0"))
        else:
            zero = jnp.zeros((s.D, s.BB), jnp.float32)
            state = zero, zero, zero, zero + NEVER
        state, _ = loop(0, s.T, step, (state, gates(0)))
        for reference, value in zip((h1, c1, n1, m1), state, strict=True):
            reference[rows, head, :] = value.T

    inputs = {"x": x, "R": R, "bias": bias, "hold": hold, "reset": reset, "scale": scale, **first}
    outputs = {"h": output((s.B, s.T, s.H, s.D), x.dtype)}
    outputs |= {name: output((s.B, s.H, s.D)) for name in ("h1", "c1", "n1", "m1")}
    if keep:
        outputs["saved"] = output((6 if s.exp_forget else 7, s.B, s.T, s.H, s.D))
    return launch(
        kernel, inputs, outputs, (s.B // s.BB, s.H), "slstm_forward", s.interpret, num_warps=8,
        num_stages=1,
    )  # fmt: skip


def backward(s, dh, saved, R, hold, reset, scale, first, last, clip, dtype):
    """`R` turned; `first`: {} or c0, n0; `last`: dh1, dc1, dn1.

    Returns a dict: dx, dh0, dc0, dn0.
    """

    def kernel(
        dh, saved, R, dh1, dc1, dn1, dx, dh0, dc0, dn0, hold=None, reset=None, scale=None, **first
    ):
        rows, head = _rows(s.BB)
        product = functools.partial(dot, precision=s.precision)
        # Two gates each: of all four at once, registers would not do.
        R_if, R_zo = R[head, :, pl.ds(0, 2 * s.D)], R[head, :, pl.ds(2 * s.D, 2 * s.D)]
        factor = None if scale is None else scale[rows, head, :].T

        def plane(number, t):
            return saved[number, rows, t, head, :].T

        def before(number, name, t):
            value = plane(number, jnp.maximum(t - 1, 0))
            other = first[name][rows, head, :].T if first else 0.0
            return jnp.where(t > 0, value, other)

        def from_next(d_if, d_zo, t):
            """What h of step t hears from the gates of the step after: a held step's are zero."""
            back = [product(R_if, d_if, (1, 0)), product(R_zo, d_zo, (1, 0))]
            # Not a plain sum, which would keep all else in the tensor core's layout.
            back = jnp.sum(jnp.stack(back, -1), -1)
            back = back if factor is None else back * factor
            if clip:
                back = jnp.minimum(jnp.maximum(back, -clip), clip)
            starts = _flag(reset, rows, jnp.minimum(t + 1, s.T - 1))
            return back if starts is None else jnp.where(starts, 0.0, back)

        def load(t):
            # As they act: i, f, z, o and the slope; c and n before the step.
            return (
                dh[rows, t, head, :].T.astype(jnp.float32),
                *(plane(number, t) for number in (0, 1, 2, 3)),
                *(() if s.exp_forget else (plane(6, t),)),
                before(4, "c0", t), before(5, "n0", t),
            )  # fmt: skip

        def step(j, carry):
            kept, dc, dn, d_if, d_zo, c, n, given = carry
            t = jnp.int32(s.T - 1) - j
            upstream, i, f, z, o, *slope, c_in, n_in = given
            total = from_next(d_if, d_zo, t) + kept + upstream
            d, new_dc, new_dn = _cell_gradient(
                total, dc, dn, c, n, c_in, n_in, i, f, z, o, slope[0] if slope else None
            )
            kept = jnp.zeros_like(kept)
            held = _flag(hold, rows, t)
            if held is not None:
                d = [jnp.where(held, 0.0, a) for a in d]
                new_dc, new_dn = jnp.where(held, dc, new_dc), jnp.where(held, dn, new_dn)
                kept = jnp.where(held, total, 0.0)
            d = [a.astype(dtype) for a in d]
            for gate in range(4):
                dx[rows, t, gate, head, :] = d[gate].T
            d_if, d_zo = (
                jnp.reshape(jnp.transpose(jnp.stack(pair, -1), (2, 0, 1)), (2 * s.D, s.BB))
                for pair in (d[:2], d[2:])
            )
            return kept, new_dc, new_dn, d_if, d_zo, c_in, n_in, load(jnp.maximum(t - 1, 0))

        start = [reference[rows, head, :].T for reference in (dh1, dc1, dn1)]
        nothing = jnp.zeros((2 * s.D, s.BB), dtype)
        end = jnp.int32(s.T - 1)
        carry = (*start, nothing, nothing, plane(4, end), plane(5, end), load(end))
        kept, dc, dn, d_if, d_zo, *_ = loop(0, s.T, step, carry)
        dh0[rows, head, :] = (from_next(d_if, d_zo, jnp.int32(-1)) + kept).T
        dc0[rows, head, :] = dc.T
        dn0[rows, head, :] = dn.T

    inputs = {"dh": dh, "saved": saved, "R": R, **last, "hold": hold, "reset": reset}
    inputs |= {"scale": scale, **first}
    outputs = {"dx": output((s.B, s.T, 4, s.H, s.D), dtype)}
    outputs |= {name: output((s.B, s.H, s.D)) for name in ("dh0", "dc0", "dn0")}
    return launch(
        kernel, inputs, outputs, (s.B // s.BB, s.H), "slstm_backward", s.interpret, num_warps=8,
        num_stages=1,
    )  # fmt: skip
