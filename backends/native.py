"""The definition of sLSTM and mLSTM: the paper's equations, in `keras.ops`, on any backend.

This file is the reference that every kernel answers to and the form that runs where no kernel
does. Shapes are written as comments: B batch, T time, H heads, D units of a head, K and V key and
value dimensions of a head, N chunks, L steps of a chunk. Everything is computed in float32
(float64 for float64 inputs).

The stabiliser m is any number close to the largest log weight: outputs do not depend on it, so it
is a constant in every gradient, and each exponent is formed as (log weight - m) before small terms
are added, which keeps it exact where gates are extreme.

Gradients are written by hand: one pass back in time per forward pass, storing the states alone.
Equation numbers are those of "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517).
"""

import keras
from keras import ops
from keras_xlstm.backends import chunkwise
from keras_xlstm.backends.parts import (
    LEAST_LOG,
    NEVER,
    bound,
    carried,
    empty_memory,
    framework,
    holds_something,
    reported,
    segment_starts,
    size,
)

log_sigmoid = getattr(framework, "log_sigmoid", ops.log_sigmoid)


def steps_of(x, steps):
    """Of x (B, T, ...) the steps (B, S): (B, S, ...)."""
    steps = ops.reshape(steps, (*ops.shape(steps), *[1] * (len(x.shape) - 2)))
    return ops.take_along_axis(x, steps, axis=1)


# --------------------------------------------------------------------------------------- sLSTM


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale,
    differentiable=framework.differentiable, **options,
):  # fmt: skip
    """sLSTM, eqs. 8-18.

    Args:
        x: (B, T, 4, H, D) gate inputs in the order i, f, z, o.
        recurrent_kernel: (H, D_in, 4, D_out).
        bias: (4, H, D) or None.
        state: (h, c, n, m), each (B, H, D).
        hold: (B, T) bool or None; True: the step does nothing, h and states stay.
        reset: (B, T) bool or None; True: the step starts from an empty state.
        recurrent_scale: (B, H, D) or None; multiplies h where it enters the recurrent kernel.
        differentiable: what makes one function of a forward and a backward pass.
        options: `forget_gate`, `recurrent_gradient_clip`.

    Returns:
        h (B, T, H, D) and the last (h, c, n, m).
    """
    tensors = (x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale)
    if size(x.shape[1]) == 1 and options["recurrent_gradient_clip"] is None:
        (h, *state), _ = slstm_forward(*tensors, **options)  # the framework differentiates it
    else:
        h, *state = differentiable(slstm_forward, slstm_backward, tensors, **options)
    return h, tuple(state)


def _gates(g, forget_gate):
    """Pre-activations (..., 4, D) to i, log f, f's slope, z, o."""
    i, f, z, o = ops.unstack(g, 4, axis=-2)
    if forget_gate == "sigmoid":
        return i, log_sigmoid(f), ops.sigmoid(-f), framework.tanh(z), ops.sigmoid(o)
    return i, f, None, framework.tanh(z), ops.sigmoid(o)


def _per_step(flags):
    """(B, T) to (T, 1, B, 1)."""
    return ops.transpose(flags)[:, None, :, None]


def slstm_forward(
    x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale,
    forget_gate, recurrent_gradient_clip, keep=True, plain=False,
):  # fmt: skip
    """`keep`: whether a backward pass may come; `plain`: the framework differentiates this."""
    _, _, _, H, D = x.shape
    B = ops.shape(x)[0]
    x = x if bias is None else x + bias
    x = ops.transpose(x, (1, 3, 0, 2, 4))  # (T, H, B, 4, D)
    R = ops.reshape(recurrent_kernel, (H, D, 4 * D))
    h, c, n, m = (ops.transpose(s, (1, 0, 2)) for s in (h, c, n, m))  # (H, B, D)
    m = carried(m, n != 0)
    initial = (h, c, n, m)
    flags = [_per_step(flag) for flag in (hold, reset) if flag is not None]
    alone = size(x.shape[0]) == 1
    plain = plain or alone
    scale = None if recurrent_scale is None else ops.transpose(recurrent_scale, (1, 0, 2))

    def step(carry, xs):
        h, c, n, m = carry
        x, flags = xs[0], list(xs[1:])
        held = None if hold is None else flags.pop(0)
        if reset is not None:
            h = ops.where(flags[0], 0.0, h)
            m = ops.where(flags[0], NEVER, m)
        recurrent = (h if scale is None else h * scale) @ R
        g = x + ops.reshape(recurrent, (H, B, 4, D))
        i, log_f, _, z, o = _gates(g, forget_gate)
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
            if plain:  # the state's true value is (c, n) exp(m): where held, m hears of it too
                m = framework.constant(carry[-1])
                change = ops.exp(carry[-1] - m)
                carry = (carry[0], change * c, change * n, m)
            new = tuple(ops.where(held, a, b) for a, b in zip(carry, new, strict=True))
        return new, new if keep else new[:1]

    if alone:
        last, _ = step(initial, tuple(a[0] for a in (x, *flags)))
        states = tuple(s[None] for s in last)
    else:
        last, states = framework.scan(step, initial, (x, *flags))
    output = ops.transpose(states[0], (2, 0, 1, 3))
    h, c, n, m = (ops.transpose(s, (1, 0, 2)) for s in last)
    residuals = (x, R, initial, states, hold, reset, scale, bias is not None)
    return (output, h, c, n, reported(m)), residuals


def slstm_backward(residuals, gradients, forget_gate, recurrent_gradient_clip):
    """Backpropagation through time: spec'd by eqs. 41-51, with every factor that does not depend
    on later steps computed for all steps at once, so that the loop itself stays thin."""
    x, R, initial, states, hold, reset, scale, has_bias = residuals
    dh, dh_last, dc_last, dn_last, _ = gradients
    _, H, _, _, D = x.shape
    h, _, n, m = states
    h_in, c_in, n_in, m_in = (
        ops.concatenate([first[None], s[:-1]], axis=0)
        for first, s in zip(initial, states, strict=True)
    )
    if reset is not None:
        starts = _per_step(reset)
        h_in, c_in, n_in = (ops.where(starts, 0.0, s) for s in (h_in, c_in, n_in))
        m_in = ops.where(starts, NEVER, m_in)
    h_in = h_in if scale is None else h_in * scale

    # Not h_in @ R: a product that broadcasts corrupts memory in TensorFlow (2.21, CPU, oneDNN).
    recurrent = ops.einsum("thbd,hdg->thbg", h_in, R)
    g = x + ops.reshape(recurrent, ops.shape(x))  # (T, H, B, 4, D)
    i, log_f, slope, z, o = _gates(g, forget_gate)
    i = ops.exp(i - m)
    f = ops.exp((m_in - m) + log_f)
    f_slope = f if slope is None else f * slope
    # What c and n hear from h; what i, f, z hear from c and n; what o hears from h.
    h_c, h_n = o / n, -h / n
    c_i, c_f, n_f, c_z, h_o = i * z, f_slope * c_in, f_slope * n_in, i * (1 - z * z), h * (1 - o)
    factors = [h_c, h_n, i, c_i, c_f, n_f, c_z, h_o]
    if hold is not None:
        held = _per_step(hold)
        factors = [ops.where(held, 0.0, a) for a in factors]
        f = ops.where(held, 1.0, f)
    flags = [_per_step(flag) for flag in (hold, reset) if flag is not None]
    R_transposed = ops.transpose(R, (0, 2, 1))

    def step(carry, xs):
        dh_next, dc, dn = carry
        dh, f, h_c, h_n, n_i, c_i, c_f, n_f, c_z, h_o, *flags = xs
        dh = dh + dh_next
        dc = dc + dh * h_c
        dn = dn + dh * h_n
        dg = ops.concatenate(
            [c_i * dc + n_i * dn, c_f * dc + n_f * dn, c_z * dc, h_o * dh], axis=-1
        )  # (H, B, 4D)
        dh_in = dg @ R_transposed
        dh_in = dh_in if scale is None else dh_in * scale
        if recurrent_gradient_clip is not None:
            dh_in = ops.clip(dh_in, -recurrent_gradient_clip, recurrent_gradient_clip)
        if reset is not None:
            dh_in = ops.where(flags[-1], 0.0, dh_in)
        if hold is not None:
            dh_in = ops.where(flags[0], dh, dh_in)
        return (dh_in, f * dc, f * dn), (dg,)

    to_steps = (1, 2, 0, 3)
    last = tuple(ops.transpose(s, (1, 0, 2)) for s in (dh_last, dc_last, dn_last))
    xs = (ops.transpose(dh, to_steps), f, *factors, *flags)
    (dh, dc, dn), (dg,) = framework.scan(step, last, xs, reverse=True)
    dR = ops.reshape(ops.einsum("thbd,thbg->hdg", h_in, dg), (H, D, 4, D))
    dx = ops.transpose(ops.reshape(dg, ops.shape(x)), (2, 0, 3, 1, 4))
    dbias = ops.sum(dx, axis=(0, 1)) if has_bias else None
    # The state's true value is (c, n) exp(m), so an initial m scales both.
    dm = initial[1] * dc + initial[2] * dn
    dh, dc, dn, dm = (ops.transpose(s, (1, 0, 2)) for s in (dh, dc, dn, dm))
    return dx, dR, dbias, dh, dc, dn, dm, None, None, None


# --------------------------------------------------------------------------------------- mLSTM


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
    i = log_sigmoid(i) if input_gate == "sigmoid" else i
    log_f = log_sigmoid(f)
    log_f = ops.where(log_f > LEAST_LOG, log_f, LEAST_LOG)
    if T == 1 or (dynamic and keras.backend.backend() == "jax"):
        return _mlstm_recurrent(q, k, v, i, log_f, state, segment_ids, eps)
    chunk_size = chunk_size or 64
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
