"""mLSTM over chunks of L steps: quadratic inside a chunk, a carried state between chunks.

Linear in time and memory: a loop over chunks that keeps the state at each chunk's start, and a
loop back over them with the exact gradient, written by hand. Shapes as in `reference.py`.

`a += b` is on fresh arrays alone: PyTorch then works in place, which spares it a buffer; the
other frameworks read it as `a = a + b`.
"""

from keras import ops
from keras_xlstm.backends.framework import framework
from keras_xlstm.backends.log_space import (
    NEVER,
    carried,
    empty_memory,
    holds_something,
    reported,
)


def forward(q, k, v, i, log_f, C, n, m, segment_ids, eps, chunk_size, keep=True, plain=False):
    """C, n, m: None for a fresh start. `keep`: whether a backward pass may come; `plain`: the
    framework differentiates this."""
    inputs = (q, k, v, i, log_f, segment_ids)
    scale = q.shape[-1] ** -0.5
    initial = None if C is None else (C, n)
    C, n, m = empty_memory(k, v, i) if C is None else (C, n, carried(m, holds_something(C, n)))
    rest_in = ops.exp(m - ops.round(m))
    weights = _LogWeights(inputs, chunk_size, framework.constant if plain else _as_it_is)
    m_in, m = weights.carry(m)
    weights.settle(m_in, m)

    def step(carry, xs):
        C, n = carry  # relative to exp(round(m))
        q, k, v, entering, to_end, through, floor, row_eps, *rows = xs
        q, k, v = (_swap(a) for a in (q * scale, k, v))  # (B, H, L, K)
        S = q @ _transposed(k)  # (B, H, L, L)
        S *= weights.within(*rows)
        q_in = q * entering[..., None]
        r = framework.total(S, axis=-1) + _by_column(q_in, n)
        h = S @ v
        h += q_in @ C
        h /= (framework.maximum(abs(r), floor) + eps * row_eps)[..., None]
        k_end = k * to_end[..., None]
        new_C = framework.turned(k_end) @ v
        new_C += through[..., None, None] * C
        new_n = through[..., None] * n + framework.total(k_end, axis=-2)
        return (new_C, new_n), (_swap(h),), (r, C, n) if keep else ()

    carry = (C * rest_in[..., None, None], n * rest_in[..., None])
    per_chunk = weights.per_chunk()
    last, (h,), states = framework.scan_chunks(step, carry, (q, k, v), per_chunk)
    rest_out = ops.exp(ops.round(m) - m)
    outputs = (h, last[0] * rest_out[..., None, None], last[1] * rest_out[..., None], reported(m))
    return outputs, (inputs, h, states, per_chunk, last, initial, rest_in, rest_out)


def backward(residuals, gradients, eps, chunk_size):
    """The gradients of i and f follow from those of q and k: scaling i_j scales k_j, and scaling
    f_t scales every k before t against every q from t on."""
    inputs, h, states, per_chunk, last, initial, rest_in, rest_out = residuals
    dh, dC, dn, _ = gradients
    q, k, v, *_ = inputs
    scale = q.shape[-1] ** -0.5
    weights = _Within(inputs, chunk_size)

    def step(carry, xs):
        dC, dn = carry
        q, k, v, h, dh, r, C, n, entering, to_end, through, floor, row_eps, *rows = xs
        q, k, v, h, dh = (_swap(a) for a in (q * scale, k, v, h, dh))
        within = weights.within(*rows)
        entering, to_end = entering[..., None], to_end[..., None]
        # Through h = (numerator) / max(|r|, exp(-m)): U to the numerator, dr to r.
        size = abs(r)
        U = dh / (framework.maximum(size, floor) + eps * row_eps)[..., None]
        dr = ops.where(size > floor, -ops.sign(r) * framework.total(U * h, axis=-1), 0.0)

        S = q @ _transposed(k)
        S *= within
        G = U @ _transposed(v)
        G += dr[..., None]
        G *= within
        dv = (to_end * k) @ dC
        dv += framework.turned(S) @ U
        dq = U @ _transposed(C)
        dq += dr[..., None] * n[..., None, :]
        dq *= entering
        dq += G @ k
        dk = v @ _transposed(dC)
        dk += dn[..., None, :]
        dk *= to_end
        dk += framework.turned(G) @ q
        di = framework.total(k * dk, axis=-1)
        across = framework.total(q * dq, axis=-1) - di
        q_in = q * entering
        dC_in = framework.turned(q_in) @ U
        dC_in += through[..., None, None] * dC
        dn_in = through[..., None] * dn + _by_row(dr, q_in)
        dq, dk, dv = (_swap(a) for a in (dq * scale, dk, dv))
        return (dC_in, dn_in), (dq, dk, dv), (di, across, _inner(C, dC_in, n, dn_in))

    carry = (dC * rest_out[..., None, None], dn * rest_out[..., None])
    leaving = _inner(last[0], carry[0], last[1], carry[1])[None]
    (dC, dn), gradients, (di, across, entering) = framework.scan_chunks(
        step, carry, (q, k, v, h, dh), (*states, *per_chunk), reverse=True
    )
    dlog_f = weights.after(across, ops.concatenate([entering[1:], leaving], axis=0))
    gradients = (*gradients, _steps(di), _steps(dlog_f))
    if initial is None:
        return *gradients, None, None, None, None
    dC, dn = dC * rest_in[..., None, None], dn * rest_in[..., None]
    # The state's true value is (C, n) exp(m).
    dm = _inner(initial[0], dC, initial[1], dn)
    return *gradients, dC, dn, dm, None


def _as_it_is(x):
    return x


class _Within:
    """What both passes make of a chunk's weights: those of its pairs of steps, and sums."""

    def __init__(self, inputs, L):
        *_, log_f, ids = inputs
        causal = ops.tril(ops.ones((L, L), "bool"))
        self.future = ops.cast(ops.where(causal, 0.0, NEVER), log_f.dtype)
        self.ids = None
        if ids is not None:
            self.ids = ids = _chunks(ids, L)  # (N, B, 1, L)
            last = ids[..., -1:]
            before = ops.concatenate([ops.zeros_like(last[:1]), last[:-1]], axis=0)
            self.continues = ids == before  # the segment of the state that enters
            self.survives = ids == last  # to the chunk's end

    def within(self, row_b, b_rest, minus_u, u_rest, ids=None):
        """(B, H, L, L) of one chunk: the weight of step j at step i."""
        # A difference: TensorFlow's graphs sum in an order of their own, and large numbers that
        # cancel must meet each other first.
        log = row_b[..., :, None] - minus_u[..., None, :]
        log += u_rest[..., None, :]
        log += b_rest[..., :, None]
        log += self.future
        if ids is not None:
            log = ops.where(ids[..., :, None] == ids[..., None, :], log, NEVER)
        return framework.exp(log)

    def after(self, x, leaving):
        """(N, B, H, L): sums of x from each step on, with what leaves, within the segment."""
        x = _running(ops.add, x, 0.0, self.ids, reverse=True)
        if self.ids is None:
            return x + leaving[..., None]
        x = x + ops.where(self.survives, leaving[..., None], 0.0)
        inside = self.ids[..., 1:] == self.ids[..., :-1]
        inside = ops.concatenate([self.continues[..., :1], inside], axis=-1)
        return ops.where(inside, x, 0.0)  # a segment's first f reaches nothing


class _LogWeights(_Within):
    """The log weights of all chunks, as sums of whole numbers and small rests.

    Gates of 1e4 leave a float32 sum no digits for its small terms. So i and log f are split into a
    whole part, whose sums and differences are exact, and a rest of at most one half. Every
    reference m is rounded too. b is the running sum of log f in a chunk, u = i - b: step j weighs
    exp(b_i + u_j) at step i.
    """

    def __init__(self, inputs, L, reference=_as_it_is):
        """`reference` takes every m, which cancels out of what it stands in."""
        super().__init__(inputs, L)
        *_, i, log_f, _ = inputs
        self.reference = reference
        i, log_f = _chunks(i, L), _chunks(log_f, L)  # (N, B, H, L)
        f_whole, i_whole = ops.round(log_f), ops.round(i)
        self.b = _running(ops.add, f_whole, 0.0)
        self.b_rest = _running(ops.add, log_f - f_whole, 0.0)
        self.u, self.minus_u = i_whole - self.b, self.b - i_whole
        self.u_rest = (i - i_whole) - self.b_rest
        self.total, self.total_rest = self.b[..., -1], self.b_rest[..., -1]
        self.end, self.end_rest = self.b[..., -1:] + self.u, self.b_rest[..., -1:] + self.u_rest
        if self.ids is not None:
            self.end = ops.where(self.survives, self.end, NEVER)
            self.total = ops.where(self.continues[..., -1], self.total, NEVER)

    def carry(self, m):
        """m of the states that enter the chunks, (N, B, H), and of the one that leaves the last."""
        peak = framework.largest(self.end + self.end_rest, -1)

        def step(carry, xs):
            (m,), (total, peak) = carry, xs
            return (framework.maximum(m + total, peak),), (m,)

        (m,), (m_in,) = framework.scan(step, (m,), (self.total + self.total_rest, peak))
        return self.reference(m_in), self.reference(m)

    def settle(self, m_in, m):
        """Fixes every reference: a row's m is the largest log weight that it sees, rounded."""
        before = m_in[..., None]
        if self.ids is not None:
            before = ops.where(self.continues, before, NEVER)
        m_in, m_out = ops.round(m_in), ops.round(ops.concatenate([m_in[1:], m[None]], axis=0))
        own = _running(framework.maximum, self.u + self.u_rest, NEVER, self.ids)
        row_m = self.reference((self.b + self.b_rest) + framework.maximum(own, before))
        whole = ops.round(row_m)
        self.row_b = self.b - whole
        self.row_eps = ops.exp(row_m - whole)  # eps stands beside weights relative to m itself
        self.floor = ops.exp(ops.where(whole > -80.0, -whole, 80.0))  # exp(-m), kept finite
        self.entering = ops.exp((self.row_b + ops.round(before)) + self.b_rest)
        self.to_end = ops.exp((self.end - m_out[..., None]) + self.end_rest)
        self.through = ops.exp(((m_in - m_out) + self.total) + self.total_rest)

    def per_chunk(self):
        """What a step of the scan over chunks takes: weights, then the arguments of `within`."""
        weights = (self.entering, self.to_end, self.through, self.floor, self.row_eps)
        rows = (self.row_b, self.b_rest, self.minus_u, self.u_rest)
        return (*weights, *rows) if self.ids is None else (*weights, *rows, self.ids)


def _running(op, x, fill, ids=None, reverse=False):
    """Inclusive running `op` over the last axis, within equal `ids`, by doubling."""

    def shifted(x, fill):
        edge = ops.zeros_like(x[..., :distance]) + fill  # full_like fails on meta tensors
        parts = [x[..., distance:], edge] if reverse else [edge, x[..., :-distance]]
        return ops.concatenate(parts, axis=-1)

    distance = 1
    length = framework.size(x.shape[-1])
    while distance < length:
        other = shifted(x, fill)
        if ids is not None:
            other = ops.where(ids == shifted(ids, -1), other, fill)
        x = op(x, other)
        distance *= 2
    return x


def _chunks(x, L):
    """(B, T, H) to (N, B, H, L)."""
    B, T, H = ops.shape(x)
    return ops.transpose(ops.reshape(x, (B, framework.size(T) // L, L, H)), (1, 0, 3, 2))


def _steps(x):
    """(N, B, H, L) back to (B, T, H)."""
    x = ops.transpose(x, (1, 0, 3, 2))
    B, _, _, H = ops.shape(x)
    return ops.reshape(x, (B, -1, H))


def _swap(x):
    """(B, L, H, K) to (B, H, L, K), or back."""
    return framework.swapaxes(x, 1, 2)


def _transposed(x):
    return framework.swapaxes(x, -1, -2)


def _by_column(x, y):
    """The rows of x (..., L, K) times y (..., K)."""
    if framework.fuses_row_sums:
        return framework.total(x * y[..., None, :], axis=-1)
    return (x @ y[..., None])[..., 0]


def _by_row(y, x):
    """y (..., L) times the columns of x (..., L, K)."""
    if framework.fuses_row_sums:
        return framework.total(x * y[..., None], axis=-2)
    return (y[..., None, :] @ x)[..., 0, :]


def _inner(C, dC, n, dn):
    return framework.total(C * dC, axis=(-2, -1)) + framework.total(n * dn, axis=-1)
