"""The sLSTM in Pallas: a program takes some rows and units of a head through time.

A head of up to 128 units is one program's: h, c, n, m never leave its registers. Larger heads are
several programs', BU units each, which exchange h, and backwards the gate gradients, through the
output itself at every step: it begins as MISSING, a NaN that no arithmetic makes, and a reader
repeats its loads until none is left. All programs of a launch must be on the device at once.

Tiles are (units, BB rows): few rows are then the narrow side of the tensor cores. Arrays come
padded (slstm.py), so no kernel masks: x (B, T, 4, H, D), h (B, T, H, D), states (B, H, D), flags
(B, T). The recurrent kernel is (H, programs, 4 BU, D) [gate and out, in], backwards [gate and in,
out]. Of whole heads it is (H, 1, D, 4 D). `saved` (7, B, T, H, D): i, f, z, o as they act, c, n,
and the slope of f. What is exchanged has a step more: before the first, or after the last.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from keras_xlstm.backends.jax.pallas.launch import div, dot, launch, loop, output
from keras_xlstm.backends.log_space import NEVER

MISSING = -1  # as a whole number


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


def _place(s):
    """Rows, head, the program's number in the head, its units."""
    tile = pl.program_id(0)
    rows = pl.ds(pl.program_id(1) * s.BB, s.BB)
    return rows, pl.program_id(2), tile, pl.ds(tile * s.BU, s.BU)


def _received(places):
    """Tiles that other programs write, as soon as all of all of them is there."""

    def load():
        tiles = [plt.load(place, volatile=True) for place in places]
        return [lax.bitcast_convert_type(tile, f"int{8 * tile.dtype.itemsize}") for tile in tiles]

    def missing(tiles):
        in_bounds = [jnp.min((tile != MISSING).astype(jnp.int32)) for tile in tiles]
        return functools.reduce(jnp.minimum, in_bounds) == 0

    tiles = lax.while_loop(missing, lambda _: load(), load())
    return [lax.bitcast_convert_type(a, b.dtype) for a, b in zip(tiles, places, strict=True)]


def _published(x, dtype):
    """In the dtype of the exchange, never MISSING."""
    return jnp.where(x == x, x, jnp.nan).astype(dtype)


def _pieces(s):
    return [pl.ds(start, s.KR) for start in range(0, s.D, s.KR)]


def _flag(flags, rows, t):
    return None if flags is None else (flags[rows, t] != 0)[None, :]


def forward(s, x, R, bias, hold, reset, scale, first, keep, h):
    """`bias` (4, H, D) in float32, or None; `first` {} or h0, c0, n0, m0; `h` (B, T + 1, H, D):
    what is exchanged, the h before the first step and then MISSING, or None: h stays here.

    Returns a dict: h (as given, or (B, T, H, D)), the last h1, c1, n1, m1 and, if `keep`, saved.
    """
    shift = 0 if h is None else 1

    def kernel(
        x, R, h, h1, c1, n1, m1, bias=None, hold=None, reset=None, scale=None, saved=None,
        h_given=None, **first,
    ):  # fmt: skip
        rows, head, tile, units = _place(s)
        product = functools.partial(dot, precision=s.precision)
        pieces = _pieces(s)
        weights = [R[head, tile, :, piece] for piece in pieces]
        factors = [None] * len(pieces)
        if scale is not None:
            factors = [scale[rows, head, piece].T for piece in pieces]
        biases = None if bias is None else [bias[gate, head, units][:, None] for gate in range(4)]

        def gates(t):
            return tuple(x[rows, t, gate, head, units].T for gate in range(4))

        def recurrent(t, h_old, starts):
            g = jnp.zeros((4 * s.BU, s.BB), jnp.float32)
            tiles = [h_old]
            if shift:
                tiles = _received([h.at[rows, t, head, piece] for piece in pieces])
                tiles = [tile.T for tile in tiles]
            for w, h_in, factor in zip(weights, tiles, factors, strict=True):
                h_in = h_in if starts is None else jnp.where(starts, 0.0, h_in)
                h_in = h_in if factor is None else h_in * factor
                g += product(w, h_in.astype(w.dtype), (1, 0))
            return lax.split(g, (s.BU,) * 4, 0)

        def step(t, carry):
            (h_old, c_old, n_old, m_old), given = carry
            m_in, starts = m_old, _flag(reset, rows, t)
            if starts is not None:
                m_in = jnp.where(starts, NEVER, m_in)
            g = recurrent(t, h_old, starts)
            g = [a + b.astype(jnp.float32) for a, b in zip(g, given, strict=True)]
            g = g if biases is None else [a + b for a, b in zip(g, biases, strict=True)]
            if not shift:  # The next step's inputs arrive while this one is computed,
                given = gates(jnp.minimum(t + 1, s.T - 1))
            *new, kept = _cell(*g, c_old, n_old, m_in, s.exp_forget)
            held = _flag(hold, rows, t)
            if held is not None:
                old = h_old, c_old, n_old, m_old
                new = [jnp.where(held, a, b) for a, b in zip(old, new, strict=True)]
                kept = *kept[:4], new[1], new[2], *kept[6:]
            value = _published(new[0], h.dtype) if shift else new[0].astype(h.dtype)
            h[rows, t + shift, head, units] = value.T
            if shift:  # or while programs wait for each other.
                given = gates(jnp.minimum(t + 1, s.T - 1))
            if saved is not None:
                for plane, value in enumerate(kept):
                    saved[plane, rows, t, head, units] = value.T
            return tuple(new), given

        if first:
            state = tuple(first[name][rows, head, units].T for name in ("h0", "c0", "n0", "m0"))
        else:
            zero = jnp.zeros((s.BU, s.BB), jnp.float32)
            state = zero, zero, zero, zero + NEVER
        state, _ = loop(0, s.T, step, (state, gates(0)))
        for reference, value in zip((h1, c1, n1, m1), state, strict=True):
            reference[rows, head, units] = value.T

    inputs = {"h_given": h, "x": x, "R": R, "bias": bias, "hold": hold, "reset": reset}
    inputs |= {"scale": scale, **first}
    outputs = {"h": output((s.B, s.T + shift, s.H, s.D), x.dtype)}
    outputs |= {name: output((s.B, s.H, s.D)) for name in ("h1", "c1", "n1", "m1")}
    if keep:
        outputs["saved"] = output((6 if s.exp_forget else 7, s.B, s.T, s.H, s.D))
    return _launched(s, kernel, inputs, outputs, "slstm_forward", "h_given" if shift else None)


def _launched(s, kernel, inputs, outputs, name, exchanged):
    """`exchanged` is the input, or None, that becomes the first output: what programs share."""

    def run(inputs):
        in_bounds = [name for name, x in inputs.items() if x is not None]
        return launch(
            kernel, inputs, outputs, (s.D // s.BU, s.B // s.BB, s.H), name, s.interpret,
            aliases={in_bounds.index(exchanged): 0} if exchanged else None, num_warps=s.warps,
            num_stages=1,
        )  # fmt: skip

    # vmap makes the grid larger, and then programs would wait for some that are not there yet.
    return jax.custom_batching.sequential_vmap(run)(inputs) if exchanged else run(inputs)


def backward(s, dh, saved, R, hold, reset, scale, first, last, clip, dtype, dx):
    """`R` turned; `first`: {} or c0, n0; `last`: dh1, dc1, dn1; `dx` (B, T + 1, 4, H, D): what is
    exchanged, MISSING and then zero, or None.

    Returns a dict: dx (as given, or (B, T, 4, H, D)), dh0, dc0, dn0.
    """
    exchanges = dx is not None

    def kernel(
        dh, saved, R, dh1, dc1, dn1, dx, dh0, dc0, dn0, hold=None, reset=None, scale=None,
        dx_given=None, **first,
    ):  # fmt: skip
        rows, head, tile, units = _place(s)
        product = functools.partial(dot, precision=s.precision)
        # Two gates each: of all four at once, registers would not do.
        weights = [R[head, tile, :, pl.ds(start, s.back)] for start in range(0, s.turned, s.back)]
        factor = None if scale is None else scale[rows, head, units].T

        def plane(number, t):
            return saved[number, rows, t, head, units].T

        def before(number, name, t):
            value = plane(number, jnp.maximum(t - 1, 0))
            other = first[name][rows, head, units].T if first else 0.0
            return jnp.where(t > 0, value, other)

        def received(t):
            """The products of every gate's weights and every gate's gradients: (4 BU, 4 BB), of
            which those of one and the same gate are wanted. For BU alone, the tensor cores would
            be as busy."""
            back = jnp.zeros((4 * s.BU, 4 * s.BB), jnp.float32)
            tiles = _received([dx.at[rows, t, :, head, piece] for piece in _pieces(s)])
            for w, d in zip(weights, tiles, strict=True):
                d = jnp.reshape(jnp.transpose(d, (2, 1, 0)), (s.KR, 4 * s.BB))
                back += product(w, d, (1, 0))
            gates = [lax.broadcasted_iota(jnp.int32, back.shape, axis) for axis in (0, 1)]
            same = div(gates[0], s.BU) == div(gates[1], s.BB)
            back = jnp.reshape(jnp.where(same, back, 0.0), (4, s.BU, 4, s.BB))
            return jnp.sum(jnp.sum(back, 2), 0)

        def from_next(d, t):
            """What h of step t hears from the gates of the step after: a held step's are zero."""
            if exchanges:
                back = received(t + 1)
            else:
                pairs = zip(weights, d, strict=True)
                back = [product(w, part, (1, 0)) for w, part in pairs]
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
                dh[rows, t, head, units].T.astype(jnp.float32),
                *(plane(number, t) for number in (0, 1, 2, 3)),
                *(() if s.exp_forget else (plane(6, t),)),
                before(4, "c0", t), before(5, "n0", t),
            )  # fmt: skip

        def step(j, carry):
            kept, dc, dn, d, c, n, given = carry
            t = jnp.int32(s.T - 1) - j
            upstream, i, f, z, o, *slope, c_in, n_in = given
            total = from_next(d, t) + kept + upstream
            d, new_dc, new_dn = _cell_gradient(
                total, dc, dn, c, n, c_in, n_in, i, f, z, o, slope[0] if slope else None
            )
            kept = jnp.zeros_like(kept)
            held = _flag(hold, rows, t)
            if held is not None:
                d = [jnp.where(held, 0.0, a) for a in d]
                new_dc, new_dn = jnp.where(held, dc, new_dc), jnp.where(held, dn, new_dn)
                kept = jnp.where(held, total, 0.0)
            d = [_published(a, dtype) if exchanges else a.astype(dtype) for a in d]
            for gate in range(4):
                dx[rows, t, gate, head, units] = d[gate].T
            if exchanges:
                d = ()
            else:
                d = tuple(
                    jnp.reshape(jnp.transpose(jnp.stack(pair, -1), (2, 0, 1)), (s.back, s.BB))
                    for pair in (d[:2], d[2:])
                )
            return kept, new_dc, new_dn, d, c_in, n_in, load(jnp.maximum(t - 1, 0))

        start = [reference[rows, head, units].T for reference in (dh1, dc1, dn1)]
        nothing = () if exchanges else (jnp.zeros((s.back, s.BB), dtype),) * 2
        end = jnp.int32(s.T - 1)
        carry = (*start, nothing, plane(4, end), plane(5, end), load(end))
        kept, dc, dn, d, *_ = loop(0, s.T, step, carry)
        dh0[rows, head, units] = (from_next(d, jnp.int32(-1)) + kept).T
        dc0[rows, head, units] = dc.T
        dn0[rows, head, units] = dn.T

    inputs = {"dx_given": dx, "dh": dh, "saved": saved, "R": R, **last, "hold": hold}
    inputs |= {"reset": reset, "scale": scale, **first}
    outputs = {"dx": output((s.B, s.T + exchanges, 4, s.H, s.D), dtype)}
    outputs |= {name: output((s.B, s.H, s.D)) for name in ("dh0", "dc0", "dn0")}
    shared = "dx_given" if exchanges else None
    return _launched(s, kernel, inputs, outputs, "slstm_backward", shared)
