"""mLSTM where time is shared out: each device has a stretch of steps (context parallelism).

What a stretch leaves of itself in the state at its end is one product, without a loop. Every device
gathers what all of them leave, makes the state that enters its own stretch, and runs from there:
with any implementation, and with an exact gradient, because the rest is differentiated by the
framework and gathering has a gradient.
"""

import keras
from keras import ops
from keras_xlstm.backends.framework import framework
from keras_xlstm.backends.log_space import NEVER, carried, holds_something, reported, weights
from keras_xlstm.backends.reference import at_the_end, log_gates


def mlstm(run, input_gate, stretches, q, k, v, i, f, state, segment_ids):
    """`run(q, k, v, i, f, state, segment_ids)` of the whole sequence, for one device's stretch.

    Args:
        run: returns h and (C, n, m), or h and None.
        stretches: `common.Stretches`; None for a single step, which every device has.
        state: that of the whole sequence's start, or None. The same on all devices.
        segment_ids: (B, T) or None, counted from the whole sequence's start.

    Returns:
        h of this stretch, and the state after the last one.
    """
    if stretches is None:
        return run(q, k, v, i, f, state, segment_ids)
    if segment_ids is not None:
        segment_ids = since_entering(stretches, segment_ids)
    left = _gathered(stretches, *_left(k, v, i, f, input_gate, segment_ids))
    if state is not None:
        state = tuple(ops.cast(s, left[0].dtype) for s in state)
    h, last = run(q, k, v, i, f, _before(stretches.place, state, left), segment_ids)
    return h, None if last is None else _before(stretches.count, state, left)


def check_sequential():
    """Refuses sLSTM where time is shared out."""
    if framework.shares_time():
        raise ValueError(
            "sLSTM reads steps one after another, because h of a step enters the gates of the "
            "next. Received: sLSTM where time is shared out among devices. Take mLSTM alone (leave "
            "out `pattern` and `slstm_at`), or share out the batch or the model (docs/devices.md)."
        )


def since_entering(stretches, segment_ids):
    """Ids (B, T) of a stretch, such that 0 is the segment of the state that enters it."""
    ends = stretches.gather(segment_ids[:, -1])
    before = ops.concatenate([ops.zeros_like(ends[:1]), ends], axis=0)
    return segment_ids - ops.take(before, stretches.place, axis=0)[:, None]


def _left(k, v, i, f, input_gate, segment_ids):
    """The (C, n, m) that a stretch leaves from an empty start, and the log weight there of a state
    that enters it: (B, H), a whole number and a rest."""
    double = keras.backend.standardize_dtype(v.dtype) == "float64"
    dtype = "float64" if double else "float32"
    i, log_f = log_gates(ops.cast(i, dtype), ops.cast(f, dtype), input_gate)
    (log, rest), (total, total_rest) = at_the_end(i, log_f)
    if segment_ids is not None:
        last = segment_ids[:, -1:]
        log = ops.where((segment_ids == last)[..., None], log, NEVER)
        total = ops.where(last == 0, total, NEVER)
    m = framework.constant(framework.largest(log + rest, 1))
    k = ops.cast(k, dtype) * weights(log, rest, m[:, None])[..., None]
    # bfloat16's range is float32's; its products take a tenth of the time on a GPU.
    fast = "bfloat16" if keras.backend.standardize_dtype(v.dtype) == "bfloat16" else dtype
    C = ops.einsum("bthk,bthv->bhkv", ops.cast(k, fast), ops.cast(v, fast))
    return ops.cast(C, dtype), ops.sum(k, axis=1), m, total, total_rest


def _gathered(stretches, C, n, *logs):
    """The same of all stretches, each (N, B, H, ...), in one message."""
    B, H, K = ops.shape(n)
    V = C.shape[-1]
    message = [ops.reshape(C, (B, H, K * V)), n, ops.stack(logs, axis=-1)]
    message = stretches.gather(ops.concatenate(message, axis=-1))
    C = ops.reshape(message[..., : K * V], (stretches.count, B, H, K, V))
    n, logs = message[..., K * V : K * V + K], message[..., K * V + K :]
    return C, n, *(logs[..., j] for j in range(3))


def _before(place, initial, left):
    """The state that enters stretch `place`, of what the stretches before it leave and of the
    initial one."""
    C, n, m, total, total_rest = left
    m, total = framework.constant(m), framework.constant(total)
    log = rest = ops.zeros_like(m[0])  # the weight of what enters the stretch looked at
    logs, rests = [], []
    for stretch in reversed(range(C.shape[0])):
        earlier = stretch < place
        whole = ops.round(m[stretch])
        logs.append(ops.where(earlier, whole + log, NEVER))
        rests.append((m[stretch] - whole) + rest)
        log = log + ops.where(earlier, total[stretch], 0.0)
        rest = rest + ops.where(earlier, total_rest[stretch], 0.0)
    logs, rests = logs[::-1], rests[::-1]
    if initial is not None:
        m_in = carried(initial[2], holds_something(*initial[:2]))
        whole = framework.constant(ops.round(m_in))
        logs.append(whole + log)
        rests.append((m_in - whole) + rest)
        C = ops.concatenate([C, initial[0][None]], axis=0)
        n = ops.concatenate([n, initial[1][None]], axis=0)
    logs, rests = ops.stack(logs), ops.stack(rests)
    m = framework.constant(framework.largest(logs + rests, 0))
    w = weights(logs, rests, m)
    C = ops.einsum("nbh,nbhkv->bhkv", w, C)
    return C, ops.einsum("nbh,nbhk->bhk", w, n), reported(m)
