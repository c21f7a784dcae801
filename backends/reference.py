"""The definition of sLSTM and mLSTM: the paper's equations, in `keras.ops`, on any backend.

This file is the reference that every kernel answers to and the form that runs where no kernel
does. Shapes are written as comments: B batch, T time, H heads, D units of a head, K and V key and
value dimensions of a head, N chunks, L steps of a chunk. Everything is computed in float32
(float64 for float64 inputs).

The stabiliser m is any number close to the largest log weight. Outputs do not depend on it, so it
is a constant in every gradient. Each exponent is formed as (log weight - m) before small terms are
added, which keeps it exact where gates are extreme.

Gradients are written by hand: one pass back in time per forward pass, storing the states alone.
Equation numbers are those of "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517).
"""

import keras
from keras import ops
from keras_xlstm.backends import chunkwise
from keras_xlstm.backends.framework import framework
from keras_xlstm.backends.log_space import (
    LEAST_LOG,
    NEVER,
    carried,
    empty_memory,
    holds_something,
    reported,
    segment_starts,
    weights,
)
from keras_xlstm.backends.mixing import Mixing

size = framework.size


def bound(r, m, eps):
    """max(|q n|, exp(-m)) + eps, the denominator of eq. 21; finite where exp(-m) is not."""
    return framework.maximum(ops.abs(r), ops.exp(ops.where(m > -80.0, -m, 80.0))) + eps


# --------------------------------------------------------------------------------------- sLSTM


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, kernel=None,
    differentiable=framework.differentiable, **options,
):  # fmt: skip
    """sLSTM, eqs. 8-18.

    Args:
        x: (B, T, 4, H, D) gate inputs in the order i, f, z, o; with `kernel`, (B, T, F).
        recurrent_kernel: (H, D_in, 4, D_out).
        bias: (4, H, D) or None.
        state: (h, c, n, m), each (B, H, D).
        hold: (B, T) bool or None; True: the step does nothing, h and states stay.
        reset: (B, T) bool or None; True: the step starts from an empty state.
        recurrent_scale: (B, H, D) or None; multiplies h where it enters the recurrent kernel.
        kernel: (F, 4 * H * D) or None: each step multiplies x by it. Where the kernels are small
            beside a step's rows, that spares passes over all steps' gate inputs.
        differentiable: what makes one function of a forward and a backward pass.
        options: `forget_gate`, `recurrent_gradient_clip`.

    Returns:
        h (B, T, H, D) and the last (h, c, n, m).
    """
    tensors = (x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale, kernel)
    if size(x.shape[1]) == 1 and options["recurrent_gradient_clip"] is None:
        (h, *state), _ = slstm_forward(*tensors, **options)  # the framework differentiates it
    else:
        h, *state = differentiable(slstm_forward, slstm_backward, tensors, **options)
    return h, tuple(state)


def _gates(g, forget_gate, plain):
    """Pre-activations (..., 4 U) to i, log f, f's slope, z, o."""
    i, f, z, o = ops.split(g, 4, axis=-1)
    # Its derivative would be NaN far below 0; on CPUs it is the fastest.
    o = ops.sigmoid(o) if plain else 1.0 / (1.0 + ops.exp(-o))
    if forget_gate == "exp":
        return i, f, 1.0, framework.tanh(z), o
    if plain:  # the slope at exactly 0 is the framework's to know
        return i, framework.log_sigmoid(f), ops.sigmoid(-f), framework.tanh(z), o
    small = ops.exp(-ops.abs(f))
    log_f = framework.minimum(f, 0.0) - _log1p(small)  # log sigmoid(f)
    slope = ops.where(f > 0, small, 1.0) / (1.0 + small)  # sigmoid(-f)
    return i, log_f, slope, framework.tanh(z), o


def _log1p(x):
    """log(1 + x) = 2 artanh(x / (2 + x)) for x from 0 to 1: in float32 a polynomial as exact as the
    libraries' functions, which take up to a third of a step's time on CPUs."""
    if keras.backend.standardize_dtype(x.dtype) != "float32":
        return framework.log1p(x)
    t = x / (2.0 + x)
    u = t * t
    for_u = 2.0 + u * (0.66666316 + u * (0.40024854 + u * (0.27961419 + u * 0.28174657)))
    return t * for_u


def _per_step(flags):
    """(B, T) to (T, B, 1)."""
    return ops.transpose(flags)[..., None]


def _flat(x):
    """(B, H, D) to (B, U)."""
    return ops.reshape(x, (-1, size(x.shape[1]) * size(x.shape[2])))


def slstm_forward(
    x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale, kernel,
    forget_gate, recurrent_gradient_clip, keep=True, plain=False,
):  # fmt: skip
    """`keep`: whether a backward pass may come; `plain`: the framework differentiates this."""
    H, D, _, _ = map(size, recurrent_kernel.shape)
    if kernel is None:
        x = ops.reshape(x, (*ops.shape(x)[:2], 4 * H * D))
    x = ops.transpose(x, (1, 0, 2))  # (T, B, 4 U) or (T, B, F)
    bias = None if bias is None else ops.reshape(bias, (4 * H * D,))
    mixing = Mixing(recurrent_kernel)
    h, c, n, m = map(_flat, (h, c, n, m))
    m = carried(m, n != 0)
    initial = (h, c, n, m)
    flags = [_per_step(flag) for flag in (hold, reset) if flag is not None]
    single_step = size(x.shape[0]) == 1
    plain = plain or single_step
    scale = None if recurrent_scale is None else _flat(recurrent_scale)

    def step(carry, xs):
        h, c, n, m = carry
        g, flags = xs[0], list(xs[1:])
        held = None if hold is None else flags.pop(0)
        if reset is not None:
            h = ops.where(flags[0], 0.0, h)
            m = ops.where(flags[0], NEVER, m)
        g = g if kernel is None else g @ kernel
        g = g + mixing.gates(h if scale is None else h * scale)
        i, log_f, slope, z, o = _gates(g if bias is None else g + bias, forget_gate, plain)
        new_m = framework.maximum(log_f + m, i)  # eq. 15
        if plain:
            new_m = framework.constant(new_m)
        i = ops.exp(i - new_m)  # eq. 16
        f = ops.exp((m - new_m) + log_f)  # eq. 17
        new_c = f * c + i * z  # eq. 8
        new_n = f * n + i  # eq. 9
        new_h = o * (new_c / new_n)  # eq. 10
        new = (new_h, new_c, new_n, new_m)
        if hold is not None:
            old = carry
            if plain:  # the state's true value is (c, n) exp(m): where held, m hears of it too
                m = framework.constant(old[-1])
                change = ops.exp(old[-1] - m)
                old = (old[0], change * c, change * n, m)
            new = tuple(ops.where(held, a, b) for a, b in zip(old, new, strict=True))
        return new, (new[0], *((c, n, i, f, f * slope, z, o) if keep else ()))

    if single_step:
        last, (outputs, *kept) = step(initial, tuple(a[0] for a in (x, *flags)))
        outputs, kept = outputs[None], [a[None] for a in kept]
    else:
        last, (outputs, *kept) = framework.scan(step, initial, (x, *flags))
    residuals = (
        x, recurrent_kernel, initial[:3], outputs, tuple(kept), hold, reset, scale,
        bias is not None, kernel,
    )  # fmt: skip
    outputs = ops.transpose(outputs, (1, 0, 2))
    outputs = ops.reshape(outputs, (*ops.shape(outputs)[:2], H, D))
    h, c, n, m = (ops.reshape(s, (-1, H, D)) for s in last)
    return (outputs, h, c, n, reported(m)), residuals


def slstm_backward(residuals, gradients, forget_gate, recurrent_gradient_clip):
    """Backpropagation through time: eqs. 41-51, from each step's gates as they were."""
    x, recurrent_kernel, initial, h, kept, hold, reset, scale, has_bias, kernel = residuals
    dh, *d_last = gradients[:4]
    H, D, _, _ = map(size, recurrent_kernel.shape)
    mixing = Mixing(recurrent_kernel)
    flags = [_per_step(flag) for flag in (hold, reset) if flag is not None]
    kernel_transposed = None if kernel is None else ops.transpose(kernel)
    h = ops.concatenate([initial[0][None], h[:-1]], axis=0)  # what entered each step
    if reset is not None:
        h = ops.where(_per_step(reset), 0.0, h)
    h = h if scale is None else h * scale

    def step(carry, xs):
        dh, dc, dn, *sums = carry
        x, d, h, c, n, i, f, f_slope, z, o, *flags = xs
        dh = dh + d
        over_n = 1.0 / (f * n + i)
        ratio = (f * c + i * z) * over_n  # h = o * ratio
        d_ratio = dh * o * over_n
        dc_new, dn_new = dc + d_ratio, dn - d_ratio * ratio
        df = dc_new * c + dn_new * n
        dg = ops.concatenate(
            [
                i * (z * dc_new + dn_new), f_slope * df, i * dc_new * (1.0 - z * z),
                dh * ratio * (o * (1.0 - o)),
            ],
            axis=-1,
        )  # fmt: skip
        if hold is not None:
            dg = ops.where(flags[0], 0.0, dg)
        dh_in = mixing.back(dg)
        dh_in = dh_in if scale is None else dh_in * scale
        if recurrent_gradient_clip is not None:
            dh_in = ops.clip(dh_in, -recurrent_gradient_clip, recurrent_gradient_clip)
        if reset is not None:
            dh_in = ops.where(flags[-1], 0.0, dh_in)
        new = (dh_in, f * dc_new, f * dn_new)
        if hold is not None:
            new = tuple(ops.where(flags[0], a, b) for a, b in zip((dh, dc, dn), new, strict=True))
        if kernel is None:
            return new, (dg,)
        more = (framework.turned(x) @ dg, mixing.kernel_gradient(h, dg), ops.sum(dg, axis=0))
        return (*new, *(a + b for a, b in zip(sums, more, strict=True))), (dg @ kernel_transposed,)

    dh = ops.transpose(ops.reshape(dh, (*ops.shape(dh)[:2], H * D)), (1, 0, 2))
    start = [_flat(s) for s in d_last]
    if kernel is not None:
        dR = ops.zeros_like(mixing.R)
        start += [ops.zeros_like(kernel), dR, ops.zeros_like(kernel[0])]
    (dh, dc, dn, *sums), (dx,) = framework.scan(
        step, tuple(start), (x, dh, h, *kept, *flags), reverse=True
    )
    if kernel is None:
        dg = ops.reshape(dx, (-1, 4 * H * D))
        dR = mixing.kernel_gradient(ops.reshape(h, (-1, H * D)), dg)
        dkernel, dbias = None, ops.sum(dg, axis=0) if has_bias else None
    else:
        dkernel, dR, dbias = sums
    dx = ops.transpose(dx, (1, 0, 2))
    if kernel is None:
        dx = ops.reshape(dx, (*ops.shape(dx)[:2], 4, H, D))
    dbias = ops.reshape(dbias, (4, H, D)) if has_bias else None
    # The state's true value is (c, n) exp(m), so an initial m scales both.
    dm = initial[1] * dc + initial[2] * dn
    states = (ops.reshape(s, (-1, H, D)) for s in (dh, dc, dn, dm))
    return dx, mixing.as_kernel(dR), dbias, *states, None, None, None, dkernel


# --------------------------------------------------------------------------------------- mLSTM


def log_gates(i, f, input_gate):
    """i and log f, as they stand in the exponents."""
    i = framework.log_sigmoid(i) if input_gate == "sigmoid" else i
    log_f = framework.log_sigmoid(f)
    return i, ops.where(log_f > LEAST_LOG, log_f, LEAST_LOG)


def mlstm(
    q, k, v, i, f, state, segment_ids, input_gate, eps, chunk_size,
    differentiable=framework.differentiable,
):  # fmt: skip
    """mLSTM, eqs. 19-27: chunkwise, or step by step where the length is one or symbolic.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V). i, f: (B, T, H), pre-activations.
        state: (C (B, H, K, V), n (B, H, K), m (B, H)) or None.
        segment_ids: (B, T) int or None; never falls, and 0 is the segment of `state`.
        differentiable: what makes one function of a forward and a backward pass.

    Returns:
        h (B, T, H, V) and the last (C, n, m).
    """
    T = size(q.shape[1])
    dynamic = T is None or not isinstance(T, int)
    i, log_f = log_gates(i, f, input_gate)
    if T == 1 or (dynamic and keras.backend.backend() == "jax"):
        return _mlstm_recurrent(q, k, v, i, log_f, state, segment_ids, eps)
    chunk_size = chunk_size or framework.chunk_size(
        q.shape[-1], v.shape[-1], None if dynamic else T
    )
    if dynamic:
        T = ops.shape(q)[1]
    else:  # the shortest chunks that need no more of them: less padding
        chunk_size = -(-T // -(-T // chunk_size))
    short = (chunk_size - T % chunk_size) % chunk_size  # ONNX divides negative numbers otherwise
    if dynamic or short:  # padding that leaves the state as it is: i = 0, f = 1
        fills = (0, 0, 0, NEVER, 0)
        q, k, v, i, log_f = (
            _pad(a, short, fill) for a, fill in zip((q, k, v, i, log_f), fills, strict=True)
        )
        if segment_ids is not None:
            last = ops.repeat(segment_ids[:, -1:], chunk_size, axis=1)
            segment_ids = ops.concatenate([segment_ids, last[:, :short]], axis=1)
    ids = None if segment_ids is None else segment_ids[..., None]
    tensors = (q, k, v, i, log_f, *(state or (None, None, None)), ids)
    h, *state = differentiable(
        chunkwise.forward, chunkwise.backward, tensors, eps=eps, chunk_size=chunk_size
    )
    return h[:, :T], tuple(state)


def mlstm_last(q, k, v, i, f, state, input_gate, eps, return_state=True):
    """mLSTM read once, after the last step: a sum over all steps, without a loop.

    h is a sum of v by weights, so that the memory C is worked out only where it is asked for.

    Args:
        q: (B, H, K), of the read. The others as in `mlstm`; there are no segments.

    Returns:
        h (B, H, V) and the last (C, n, m), or None without `return_state`.
    """
    (log_w, log_w_rest), (total, total_rest) = at_the_end(*log_gates(i, f, input_gate))
    m = framework.largest(log_w + log_w_rest, 1)
    if state is not None:
        C, n, m_in = state
        m_in = carried(m_in, holds_something(C, n))
        m_in_whole = framework.constant(ops.round(m_in))
        m_in, m_in_rest = m_in_whole + total, (m_in - m_in_whole) + total_rest
        m = framework.maximum(m, m_in + m_in_rest)
    m = framework.constant(m)
    w = weights(log_w, log_w_rest, m[:, None])
    q = q * q.shape[-1] ** -0.5
    s = w * ops.einsum("bhk,bthk->bth", q, k)
    r = ops.sum(s, axis=1)
    h = ops.einsum("bth,bthv->bhv", s, v)
    if state is not None:
        through = weights(m_in, m_in_rest, m)
        r = r + through * ops.sum(q * n, axis=-1)
        h = h + through[..., None] * ops.squeeze(q[..., None, :] @ C, -2)
    h = h / bound(r, m, eps)[..., None]
    if not return_state:
        return h, None
    k = k * w[..., None]
    new_C, new_n = ops.einsum("bthk,bthv->bhkv", k, v), ops.sum(k, axis=1)
    if state is not None:
        new_C, new_n = new_C + through[..., None, None] * C, new_n + through[..., None] * n
    return h, (new_C, new_n, reported(m))


def at_the_end(i, log_f):
    """The log weight of each step after the last one, (B, T, H), and the sum of log f, (B, H): each
    as whole numbers, whose sums are exact, and rests, as in chunkwise.py."""
    i_whole, f_whole = (framework.constant(ops.round(x)) for x in (i, log_f))
    i_rest, f_rest = i - i_whole, log_f - f_whole
    from_here, from_here_rest = _sums_to_the_end(f_whole), _sums_to_the_end(f_rest)
    own = (from_here - f_whole) + i_whole, (from_here_rest - f_rest) + i_rest
    return own, (from_here[:, 0], from_here_rest[:, 0])


def _sums_to_the_end(x):
    """(B, T, H): sums of x from each step on."""
    return ops.flip(framework.cumsum(ops.flip(x, axis=1), 1), axis=1)


def _pad(x, length, fill):
    shape = ops.shape(x)
    # zeros + fill: keras.ops.full reads the fill from the device, which meta tensors have not.
    end = ops.zeros((shape[0], length, *shape[2:]), x.dtype) + fill
    return ops.concatenate([x, end], axis=1)


def _mlstm_recurrent(q, k, v, i, log_f, state, segment_ids, eps):
    """One step at a time: constant memory, and the gradient is the framework's own."""
    if state is None:
        state = empty_memory(k, v, i)
    else:
        C, n, m = state
        state = C, n, carried(m, holds_something(C, n))

    def step(carry, xs):
        C, n, m = carry  # (B, H, K, V), (B, H, K), (B, H)
        q, k, v, i, log_f, *reset = xs
        q = q * q.shape[-1] ** -0.5
        for starts in reset:
            m = ops.where(starts[:, None], NEVER, m)
        new_m = framework.constant(framework.maximum(log_f + m, i))
        i = ops.exp(i - new_m)
        f = ops.exp((m - new_m) + log_f)
        C = f[..., None, None] * C + (i[..., None] * k)[..., None] * v[..., None, :]
        n = f[..., None] * n + i[..., None] * k
        r = ops.sum(q * n, axis=-1)
        h = ops.squeeze(q[..., None, :] @ C, -2) / bound(r, new_m, eps)[..., None]
        return (C, n, new_m), (h,)

    xs = (q, k, v, i, log_f)
    if segment_ids is not None:
        xs += (segment_starts(segment_ids),)
    if size(q.shape[1]) == 1:
        carry, (h,) = step(state, tuple(x[:, 0] for x in xs))
        h = h[:, None]
    else:
        carry, (h,) = framework.scan(step, state, tuple(ops.moveaxis(x, 1, 0) for x in xs))
        h = ops.moveaxis(h, 0, 1)
    C, n, m = carry
    return h, (C, n, reported(m))
