"""The mLSTM on GPUs under JAX: when the Pallas kernels run, and all that is not a kernel.

XLA computes what is about vectors: running sums of the gates, m at the chunk borders, the weights
that kernels read, and the gates' gradients. Pallas is imported on the first call.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import mlstm_call
from keras_xlstm.backends.kernels.mlstm import tiles
from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.kernels.plan import without_pipeline
from keras_xlstm.backends.log_space import NEVER, carried, holds_something, reported


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these arrays (None: here at all), or None."""
    if q is None:
        return device.missing()
    return device.unsupported(q) or tiles.unsupported(
        q.shape[-1], v.shape[-1], chunk_size, q.dtype.name, device.shared_memory()
    )


def not_preferred(q=None, v=None, chunk_size=None):
    return None  # where it can run it is the better choice


def mlstm(q, k, v, i, f, state, segment_ids, *, input_gate, eps, chunk_size, states=True):
    """As `reference.mlstm`, for arrays of any dtype in `unsupported`; `state` may be None.
    Without `states` the last state is None."""
    whole = all(size == power(size) for size in (q.shape[-1], v.shape[-1]))
    return mlstm_call(
        _forward, _backward, _step if whole else None, q, k, v, i, f, state, segment_ids,
        input_gate, eps, chunk_size, states, processors=device.processors(),
        interpret=device.interpreted(),
    )  # fmt: skip


def _inter_chunk():
    from keras_xlstm.backends.jax.pallas import mlstm_inter_chunk

    return mlstm_inter_chunk


def _intra_chunk():
    from keras_xlstm.backends.jax.pallas import mlstm_intra_chunk

    return mlstm_intra_chunk


@dataclasses.dataclass
class _Sizes:
    """What every kernel of one call shares. K and V are as they were given."""

    B: int
    T: int
    H: int
    K: int
    V: int
    LC: int
    dtype: str
    interpret: bool

    def __post_init__(self):
        self.BH, self.NC = self.B * self.H, -(-self.T // self.LC)
        self.scale = self.K**-0.5
        self.precision = device.precision(self.dtype)
        self.state_dtype = jnp.bfloat16 if self.dtype == "bfloat16" else jnp.float32
        # Sums of whole logs stay exact in float32 up to 2^24: a floor of log f, as LEAST_LOG.
        self.least = -float(min(1e5, 2**24 // self.LC))

    def padded(self, x):
        """Whole chunks, and a power of two of dimensions."""
        short = (self.NC * self.LC - self.T, power(x.shape[-1]) - x.shape[-1])
        return jnp.pad(x, ((0, 0), (0, short[0]), (0, 0), (0, short[1]))) if any(short) else x

    def given(self, x, width):
        """What `padded` was given."""
        return x[:, : self.T, :, :width]

    def state(self, C, n, factor):
        """A state (B, H, ...) times `factor` (B * H) as kernels take it."""
        K, V = power(self.K), power(self.V)
        C = jnp.reshape(C, (self.BH, self.K, self.V)) * factor[:, None, None]
        n = jnp.reshape(n, (self.BH, self.K)) * factor[:, None]
        C = jnp.pad(C, ((0, 0), (0, K - self.K), (0, V - self.V)))
        return {"S0": C, "n0": jnp.pad(n, ((0, 0), (0, K - self.K)))}

    def given_state(self, results, factor):
        C = results["S_last"][:, : self.K, : self.V] * factor[:, None, None]
        n = results["n_last"][:, : self.K] * factor[:, None]
        return jnp.reshape(C, (self.B, self.H, self.K, self.V)), jnp.reshape(
            n, (self.B, self.H, self.K)
        )

    def vectors(self, x, fill):
        """(B, T, H) to (B * H, NC, LC) in float32."""
        x = jnp.moveaxis(x.astype(jnp.float32), 2, 1)
        short = self.NC * self.LC - self.T
        x = jnp.pad(x, ((0, 0), (0, 0), (0, short)), constant_values=fill)
        return jnp.reshape(x, (self.BH, self.NC, self.LC))

    def given_vectors(self, x):
        x = jnp.reshape(x, (self.B, self.H, self.NC * self.LC))[..., : self.T]
        return jnp.moveaxis(x, 1, 2)


def _round(x):
    return jnp.floor(x + 0.5)


def _segments(s, ids):
    """None, or ids (B, NC, LC), and per (B * H, NC, ...) of the step before the chunk, of its last
    step, and of every step."""
    if ids is None:
        return None
    short = s.NC * s.LC - s.T
    ids = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, short)), mode="edge")
    ids = jnp.reshape(ids, (s.B, s.NC, s.LC))
    every = jnp.repeat(ids, s.H, axis=0)
    last = every[..., -1:]
    before = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    return {"ids": ids, "every": every, "last": last, "before": before}


def _gates(s, i, f, m, segments, eps):
    """The weights that kernels read, all (B * H, NC, LC), and m at every border."""
    log_f = jnp.maximum(jax.nn.log_sigmoid(f), s.least)
    in_bounds = jnp.arange(s.NC * s.LC).reshape(s.NC, s.LC) < s.T
    log_f = jnp.where(in_bounds, log_f, 0.0)
    f_whole, i_whole = _round(log_f), _round(i)
    b, b_rest = (_running(lax.add, x) for x in (f_whole, log_f - f_whole))
    u, u_rest = i_whole - b, (i - i_whole) - b_rest
    total, rest = b[..., -1:], b_rest[..., -1:]
    reaching, hold = (total + u) + (u_rest + rest), jnp.zeros_like(total)
    if segments is None:
        own = _running(lax.max, u + u_rest)
    else:
        own = _running(lax.max, u + u_rest, segments["every"])
        reaching = jnp.where(segments["every"] == segments["last"], reaching, NEVER)
        hold = jnp.where(segments["before"] == segments["last"], hold, NEVER)

    def decay_then_peak(first, second):
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    peak = jnp.max(reaching, -1, keepdims=True)
    decay, peak = lax.associative_scan(decay_then_peak, (total + rest + hold, peak), axis=1)
    after = jnp.maximum(m[:, None, None] + decay, peak)
    before = jnp.concatenate([jnp.broadcast_to(m[:, None, None], after[:, :1].shape), after], 1)
    before = before[:, :-1]
    through = jnp.exp(((_round(before) - _round(after)) + total) + hold + rest)
    to_end = jnp.exp((u + (total - _round(after))) + (u_rest + rest))
    entering = before
    if segments is not None:
        to_end = jnp.where(segments["every"] == segments["last"], to_end, 0.0)
        entering = jnp.where(segments["every"] == segments["before"], before, NEVER)
    row_m = (b + b_rest) + jnp.maximum(own, entering)
    whole = _round(row_m)
    return {
        "u": u, "u_rest": u_rest, "row": b - whole, "row_rest": b_rest, "to_end": to_end,
        "through": through[..., 0], "before": _round(before), "m_last": after[:, -1, 0],
        "floor": jnp.exp(jnp.where(whole > -80.0, -whole, 80.0)),
        "least": eps * jnp.exp(row_m - whole),
    }  # fmt: skip


def _running(operation, x, segment_ids=None, reverse=False):
    """The running sum or maximum along the last axis, from zero in every segment."""
    if segment_ids is None:
        return lax.associative_scan(operation, x, axis=2, reverse=reverse)

    def combine(first, second):
        (s1, a1), (s2, a2) = first, second
        return s2, jnp.where(s1 == s2, operation(a1, a2), a2)

    return lax.associative_scan(combine, (segment_ids, x), axis=2, reverse=reverse)[1]


def _from_border(row, row_rest, before, segments):
    w = jnp.exp((row + before) + row_rest)
    return w if segments is None else jnp.where(segments["every"] == segments["before"], w, 0.0)


def _states(s, x, z, w, through, rho, first, forward, processors):
    memory = device.shared_memory()
    own = _pipelined(tiles.chunk_states(x.shape[-1], z.shape[-1], s.dtype, s.LC, memory))
    parts = x.shape[-1] // own["BX"] * (z.shape[-1] // own["BZ"])
    # Serial programs read and write least, but there must be enough of them.
    serial = not isinstance(s.BH, int) or 10 * s.BH * parts >= 9 * processors
    return _inter_chunk().chunk_states(s, x, z, w, through, rho, first, forward, own, serial)


def _pipelined(own):
    return own if device.pipelined() else without_pipeline(own)


def _intra_chunk_in_role(s, role, segments, **arrays):
    DX, DZ = arrays["x"].shape[-1], arrays["z"].shape[-1]
    own = _pipelined(tiles.intra_chunk(role, DX, DZ, s.dtype, s.LC, device.shared_memory()))
    ids = None if segments is None else segments["ids"]
    return _intra_chunk().intra_chunk(role, s, arrays, ids, own)


def _step(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, processors, interpret):
    """A single step that is not trained through."""
    if ids is not None:  # one segment: that of the state
        C, n, m = (jnp.where(jnp.reshape(ids == 0, (-1,) + (1,) * (x.ndim - 1)), x, 0.0)
                   for x in (C, n, m))  # fmt: skip
    q, k, v, i, f = (x[:, 0] for x in (q, k, v, i, f))
    i, log_f = i.astype(jnp.float32), jax.nn.log_sigmoid(f.astype(jnp.float32))
    i = jax.nn.log_sigmoid(i) if sigmoid else i
    B, H, K, V = C.shape
    own = tiles.pallas_step(B * H, K, V)
    got = _inter_chunk().step(q, k, v, i, log_f, C, n, m, eps, K**-0.5, own, interpret)
    return got["h"][:, None], got["C_out"], got["n_out"], got["m_out"]


def _forward(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, processors, interpret):
    s = _Sizes(*q.shape, v.shape[-1], chunk, q.dtype.name, interpret)
    segments = _segments(s, ids)
    i_log = jax.nn.log_sigmoid(i.astype(jnp.float32)) if sigmoid else i
    first, start = {}, jnp.full((s.BH,), NEVER, jnp.float32)
    if C is not None:
        start = jnp.reshape(carried(m, holds_something(C, n)), (s.BH,))
        first = s.state(C, n, jnp.exp(start - _round(start)))
    padded = [s.padded(x) for x in (q, k, v)]
    g = _gates(s, s.vectors(i_log, NEVER), s.vectors(f, 0.0), start, segments, eps)
    states = _states(
        s, *padded[1:], g["to_end"], g["through"], None, first, None, processors
    )  # fmt: skip
    wq = _from_border(g["row"], g["row_rest"], g["before"], segments)
    got = _intra_chunk_in_role(
        s, "h", segments, x=padded[0], y=padded[1], z=padded[2], S=states["S"], n=states["n"],
        row=g["row"], row_rest=g["row_rest"], col=g["u"], col_rest=g["u_rest"], w=wq,
        floor=g["floor"], least=g["least"],
    )  # fmt: skip
    h = s.given(got["out"], s.V)
    m_last = g["m_last"]
    rest_out = jnp.exp(_round(m_last) - m_last)
    last = *s.given_state(states, rest_out), reported(jnp.reshape(m_last, (s.B, s.H)))
    kept = {name: g[name] for name in ("u", "u_rest", "row", "to_end", "through", "before")}
    kept |= {"row_rest": g["row_rest"] - got["log_d"], "sign": got["sign"]}
    kept |= {"start": start, "m_last": m_last, "S": states["S"], "n": states["n"]}
    return (h, *last), (padded, i, f, C, n, ids, got["out"], kept)


def _backward(residuals, gradients, sigmoid, eps, chunk, processors, interpret):
    padded, i, f, C, n, ids, h, g = residuals
    dh, dC, dn, _ = gradients
    B, T, H, V = dh.shape
    K = dn.shape[-1]
    s = _Sizes(B, T, H, K, V, chunk, dh.dtype.name, interpret)
    segments = _segments(s, ids)
    q, k, v = padded
    dh = s.padded(dh)
    wq = _from_border(g["row"], g["row_rest"], g["before"], segments)
    rows = {"row": g["row"], "row_rest": g["row_rest"], "w": wq}
    cols = {"col": g["u"], "col_rest": g["u_rest"]}
    dq = _intra_chunk_in_role(
        s, "dq", segments, x=dh, y=v, z=k, S=g["S"], n=g["n"], own=q, h=h, sign=g["sign"], **rows,
        **cols,
    )  # fmt: skip
    m_last, start = g["m_last"], g["start"]
    first = s.state(dC, dn, jnp.exp(_round(m_last) - m_last) / s.scale)
    forward = {"F": g["S"], "F_n": g["n"]}
    dS = _states(s, q, dh, wq, g["through"], dq["rho"], first, forward, processors)
    rows = {"row": g["u"], "row_rest": g["u_rest"], "w": g["to_end"]}
    cols = {"col": g["row"], "col_rest": g["row_rest"]}
    common = {"S": dS["S"], "n": dS["n"], "rho": dq["rho"], **rows, **cols}
    dk = _intra_chunk_in_role(s, "dk", segments, x=v, y=dh, z=q, own=k, **common)
    del common["rho"]
    dv = _intra_chunk_in_role(s, "dv", segments, x=k, y=q, z=dh, **common)
    leaving = jnp.sum(dS["inner"], -1, keepdims=True) * s.scale
    di, df = _gate_gradients(s, i, f, dq["dot"], dk["dot"], leaving, segments, sigmoid)
    results = s.given(dq["out"], K), s.given(dk["out"], K), s.given(dv["out"], V), di, df
    if C is None:
        return *results, None, None, None, None
    factor = jnp.exp(start - _round(start)) * s.scale
    dC, dn = s.given_state(dS, factor)
    # The state's true value is (C, n) exp(m).
    dm = jnp.sum(C * dC, (-2, -1)) + jnp.sum(n * dn, -1)
    return *results, dC, dn, dm, None


def _gate_gradients(s, i, f, q_dot, k_dot, leaving, segments, sigmoid):
    """Scaling exp(i_j) scales k_j; scaling f_t scales every k before t against every q from t on,
    which is what crosses t: pairs within the chunk, and the product at its end."""
    if segments is None:
        x = _running(lax.add, q_dot - k_dot, reverse=True) + leaving
    else:
        every = segments["every"]
        x = _running(lax.add, q_dot - k_dot, every, reverse=True)
        x += jnp.where(every == segments["last"], leaving, 0.0)
        earlier = jnp.concatenate([segments["before"], every[..., :-1]], -1)
        x = jnp.where(every == earlier, x, 0.0)  # a segment's first f reaches nothing
    x, k_dot = s.given_vectors(x), s.given_vectors(k_dot)
    f = f.astype(jnp.float32)
    df = jnp.where(jax.nn.log_sigmoid(f) > s.least, x * jax.nn.sigmoid(-f), 0.0)
    di = k_dot * jax.nn.sigmoid(-i.astype(jnp.float32)) if sigmoid else k_dot
    return di.astype(i.dtype), df.astype(i.dtype)
