"""mLSTM over chunks of L steps: quadratic inside a chunk, a carried state between chunks.

Linear in time and memory: a loop over chunks that keeps the state at each chunk's start, and a
loop back over them with the exact gradient, written by hand. Shapes as in `native.py`.
"""

from keras import ops

from keras_xlstm.backends.parts import (
    NEVER,
    bound,
    carried,
    framework,
    holds_something,
    reported,
)


def forward(q, k, v, i, log_f, C, n, m, segment_ids, eps, chunk_size):
    inputs = (q, k, v, i, log_f, segment_ids)
    initial = (C, n)

    def step(carry, xs):
        C, n, m, entering_id = carry  # C and n are relative to exp(round(m))
        q, k, v, i, log_f, *ids = xs
        weights = _LogWeights(i, log_f, m, ids, entering_id)
        S = q @ _transposed(k) * weights.within()  # (B, H, L, L)
        q_in = q * weights.entering()[..., None]
        r = ops.sum(S, axis=-1) + ops.sum(q_in * n[..., None, :], axis=-1)
        h = S @ v + q_in @ C
        h = h / weights.bound(r, eps)[..., None]

        k_end = k * weights.to_end()[..., None]
        f = weights.through()
        new_C = f[..., None, None] * C + _transposed(k_end) @ v
        new_n = f[..., None] * n + ops.sum(k_end, axis=-2)
        last_id = ids[0][..., -1] if ids else entering_id
        return (new_C, new_n, weights.new_m, last_id), (h, r, C, n, m)

    m = carried(m, holds_something(C, n))
    rest_in = ops.exp(m - ops.round(m))
    entering_id = ops.zeros_like(m[:, :1], "int32")
    carry = (C * rest_in[..., None, None], n * rest_in[..., None], m, entering_id)
    xs = tuple(_chunks(x, chunk_size) for x in inputs if x is not None)
    (C, n, m, _), (h, r, *states) = framework().scan(step, carry, xs)
    h = _steps(h)
    rest_out = ops.exp(ops.round(m) - m)
    last = (C, n)
    C, n = C * rest_out[..., None, None], n * rest_out[..., None]
    return (h, C, n, reported(m)), (inputs, h, r, states, last, initial, rest_in, rest_out)


def backward(residuals, gradients, eps, chunk_size):
    """The gradients of i and f follow from those of q and k: scaling i_j scales k_j, and scaling
    f_t scales every k before t against every q from t on."""
    inputs, h, r, states, (C_out, n_out), (C0, n0), rest_in, rest_out = residuals
    dh, dC, dn, _ = gradients
    segment_ids = inputs[-1]

    def step(carry, xs):
        dC, dn, leaving = carry
        q, k, v, i, log_f, h, dh, r, C, n, m, *ids = xs
        ids, entering_id = (ids[:1], ids[1]) if ids else (ids, None)
        weights = _LogWeights(i, log_f, m, ids, entering_id)
        within, to_end = weights.within(), weights.to_end()[..., None]
        # Through h = (numerator) / max(|r|, exp(-m)): U to the numerator, dr to r.
        U = dh / weights.bound(r, eps)[..., None]
        dr = -ops.sign(r) * ops.sum(U * h, axis=-1)
        dr = ops.where(weights.is_bounded(r), 0.0, dr)

        S = q @ _transposed(k) * within
        G = (U @ _transposed(v) + dr[..., None]) * within
        entering = weights.entering()[..., None]
        dv = _transposed(S) @ U + to_end * k @ dC
        dq = U @ _transposed(C) + dr[..., None] * n[..., None, :]
        dq = G @ k + entering * dq
        dk = v @ _transposed(dC) + dn[..., None, :]
        dk = _transposed(G) @ q + to_end * dk

        di = ops.sum(k * dk, axis=-1)
        dlog_f = weights.after(ops.sum(q * dq, axis=-1) - di, leaving)
        f = weights.through()
        q_in = q * entering
        dC = f[..., None, None] * dC + _transposed(q_in) @ U
        dn = f[..., None] * dn + ops.sum(q_in * dr[..., None], axis=-2)
        return (dC, dn, _inner(C, dC, n, dn)), (dq, dk, dv, di, dlog_f)

    dC, dn = dC * rest_out[..., None, None], dn * rest_out[..., None]
    carry = (dC, dn, _inner(C_out, dC, n_out, dn))
    xs = [_chunks(x, chunk_size) for x in (*inputs[:5], h, dh)]
    xs += [r, *states]
    if segment_ids is not None:
        ids = _chunks(segment_ids, chunk_size)
        ends = ids[..., -1]
        xs += [ids, ops.concatenate([ops.zeros_like(ends[:1]), ends[:-1]], axis=0)]
    (dC, dn, _), gradients = framework().scan(step, carry, tuple(xs), reverse=True)
    dC, dn = dC * rest_in[..., None, None], dn * rest_in[..., None]
    # The state's true value is (C, n) exp(m).
    return (*(_steps(a) for a in gradients), dC, dn, _inner(C0, dC, n0, dn), None)


class _LogWeights:
    """The log weights of one chunk, as sums of whole numbers and small rests.

    Gates of 1e4 leave a float32 sum no digits for its small terms, so i and log f are split into
    a whole part, whose sums and differences are exact, and a rest of at most one half; every
    reference m is rounded too. b is the running sum of log f, u = i - b: step j weighs
    exp(b_i + u_j) at step i.

    Args:
        i, log_f: (B, H, L). m: (B, H), of the state that enters.
        ids: [] or [(B, 1, L) segment ids]; entering_id: (B, 1), the segment of that state.
    """

    def __init__(self, i, log_f, m, ids, entering_id):
        f_whole, i_whole = ops.round(log_f), ops.round(i)
        self.b = _running(ops.add, f_whole, 0.0)  # (B, H, L)
        self.b_rest = _running(ops.add, log_f - f_whole, 0.0)
        self.u = i_whole - self.b
        self.u_rest = (i - i_whole) - self.b_rest
        L = i.shape[-1]
        self.m = ops.round(m)
        self.seen = ops.tril(ops.ones((L, L), "bool"))
        self.ids = ids[0] if ids else None
        before = m[..., None]
        if ids:
            (ids,) = ids
            self.seen = self.seen & (ids[..., :, None] == ids[..., None, :])
            self.continues = ids == entering_id[..., None]  # from the state that enters
            self.survives = ids == ids[..., -1:]  # to the chunk's end
            before = ops.where(self.continues, before, NEVER)
        # m of every row, and of the state that leaves: their largest log weights.
        largest = framework().maximum(_running(framework().maximum, self.u + self.u_rest, NEVER, self.ids), before)
        row_m = (self.b + self.b_rest) + largest
        self.row_m = ops.round(row_m)
        self.row_rest = ops.exp(row_m - self.row_m)
        end = ops.max(self._at_end()[0] + self._at_end()[1], axis=-1)
        self.new_m = framework().maximum(m + (self._total() + self.b_rest[..., -1]), end)

    def _at_end(self):
        whole = self.b[..., -1:] + self.u
        whole = whole if self.ids is None else ops.where(self.survives, whole, NEVER)
        return whole, self.b_rest[..., -1:] + self.u_rest

    def _total(self):
        total = self.b[..., -1]
        return total if self.ids is None else ops.where(self.continues[..., -1], total, NEVER)

    def within(self):
        """(B, H, L, L): the weight of step j at step i."""
        log = (self.b - self.row_m)[..., :, None] + self.u[..., None, :]
        log = (log + self.u_rest[..., None, :]) + self.b_rest[..., :, None]
        return ops.exp(ops.where(self.seen, log, NEVER))

    def entering(self):
        """(B, H, L): the weight at step i of the state that enters."""
        log = ((self.b - self.row_m) + self.m[..., None]) + self.b_rest
        return ops.exp(log if self.ids is None else ops.where(self.continues, log, NEVER))

    def to_end(self):
        """(B, H, L): the weight of step j in the state that leaves."""
        whole, rest = self._at_end()
        return ops.exp((whole - ops.round(self.new_m)[..., None]) + rest)

    def through(self):
        """(B, H): the weight, in the state that leaves, of the state that enters."""
        whole = (self.m - ops.round(self.new_m)) + self._total()
        return ops.exp(whole + self.b_rest[..., -1])

    def bound(self, r, eps):
        return bound(r, self.row_m, eps * self.row_rest)

    def is_bounded(self, r):
        """Where the denominator is exp(-m), and not |r|."""
        return ops.abs(r) <= bound(ops.zeros_like(r), self.row_m, 0.0)

    def after(self, x, leaving):
        """(B, H, L): sums of x from each step on, with what leaves, within the segment."""
        if self.ids is None:
            return _running(ops.add, x, 0.0, reverse=True) + leaving[..., None]
        x = _running(ops.add, x, 0.0, self.ids, reverse=True)
        x = x + ops.where(self.survives, leaving[..., None], 0.0)
        before = ops.concatenate([self.continues[..., :1], self.ids[..., 1:] == self.ids[..., :-1]], -1)
        return ops.where(before, x, 0.0)  # a segment's first f reaches nothing


def _running(op, x, fill, ids=None, reverse=False):
    """Inclusive running `op` over the last axis, within equal `ids`, by doubling."""

    def shifted(x, fill):
        edge = ops.full_like(x[..., :distance], fill)
        parts = [x[..., distance:], edge] if reverse else [edge, x[..., :-distance]]
        return ops.concatenate(parts, axis=-1)

    distance = 1
    while distance < x.shape[-1]:
        other = shifted(x, fill)
        if ids is not None:
            other = ops.where(ids == shifted(ids, -1), other, fill)
        x = op(x, other)
        distance *= 2
    return x


def _chunks(x, L):
    """(B, T, H, ...) to (N, B, H, L, ...)."""
    B, _, *rest = ops.shape(x)
    x = ops.reshape(x, (B, -1, L, *rest))
    return ops.transpose(x, (1, 0, 3, 2, *range(4, len(x.shape))))


def _steps(x):
    """(N, B, H, L, ...) back to (B, T, H, ...)."""
    x = ops.transpose(x, (1, 0, 3, 2, *range(4, len(x.shape))))
    B, _, _, *rest = ops.shape(x)
    return ops.reshape(x, (B, -1, *rest))


def _transposed(x):
    return ops.swapaxes(x, -1, -2)


def _inner(C, dC, n, dn):
    return ops.sum(C * dC, axis=(-2, -1)) + ops.sum(n * dn, axis=-1)
