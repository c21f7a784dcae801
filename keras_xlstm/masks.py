"""Masks and segments, made ready for the recurrences."""

import keras
from keras import ops

from keras_xlstm import backends
from keras_xlstm.validation import check_segments, expect_shape, tensor


def real_first(mask):
    """Of a mask (B, T): its steps in order, the real ones first, those behind them in any; how many
    real ones come up to each step. Both (B, T) int32."""
    step = ops.cumsum(ops.ones_like(mask, "int32"), axis=1) - 1
    count = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    if backends.unsorted(mask):
        # Before the real step that is the n-th come all steps at which no more than n are there.
        earlier = count[:, :, None] <= step[:, None, :]
        order = ops.sum(ops.cast(earlier, "int32"), axis=1)
        return ops.minimum(order, step[:, -1:]), count
    order = ops.argsort(ops.where(mask, step, step + ops.shape(mask)[1]), axis=1)
    return ops.cast(order, "int32"), count


def last_real_step(mask):
    """(B, T) bool to (B, T) int: the newest real step at or before each step, -1 where none is."""
    order, count = real_first(mask)
    last = backends.steps_of(order, ops.maximum(count - 1, 0))
    return ops.where(count > 0, last, -1)


def newest_of_all(stretches, x, state, mask=None, segment_ids=None):
    """Of a sequence whose time is shared out, x (B, T, ...) one stretch of it, `state` (B, n, ...)
    what comes before it all: the n newest steps before this stretch, and at the sequence's end.

    Masked steps are left out; those of another segment are zeros, with ids from `since_entering`.
    """
    n, real = state.shape[1], ops.ones(ops.shape(x)[:2], "bool") if mask is None else mask
    began = ops.zeros_like(real[:, 0])  # whether a segment did in this stretch
    if segment_ids is not None:
        real, began = real & (segment_ids == segment_ids[:, -1:]), segment_ids[:, -1] != 0
    newest, found = _newest(x, real, n)
    flags = ops.concatenate([found, began[:, None]], axis=1)
    newest, flags = stretches.gather(newest), stretches.gather(ops.cast(flags, "int32"))

    def before(place):
        counts, open_ = [], ops.ones_like(began)
        for stretch in reversed(range(stretches.count)):
            earlier = stretch < place
            counts.append((flags[stretch, :, :n] != 0) & (open_ & earlier)[:, None])
            open_ = open_ & ((flags[stretch, :, n] == 0) | (not earlier))
        counts.append(ops.repeat(open_[:, None], n, axis=1))
        steps = ops.concatenate([state, *newest], axis=1)
        return _newest(steps, ops.concatenate(counts[::-1], axis=1), n)[0]

    return before(stretches.place), before(stretches.count)


def _newest(x, real, n):
    """The n newest real steps of x (B, T, ...), zeros before the first; and whether they are."""
    order, count = real_first(real)
    index = count[:, -1:] - n + ops.arange(n, dtype="int32")
    steps = backends.steps_of(order, ops.maximum(index, 0))
    found = index >= 0
    x = backends.steps_of(x, steps)
    shape = (*ops.shape(found), *[1] * (len(x.shape) - 2))
    return ops.where(ops.reshape(found, shape), x, ops.zeros_like(x)), found


def steps_mask(mask):
    """A mask of steps, (batch, time), of one that has more axes, as that of sentences of words is:
    a step is real where any of its parts is, as `keras.layers.LSTM` has it."""
    shape = getattr(mask, "shape", ())
    return mask if len(shape) < 3 else ops.any(mask, axis=tuple(range(2, len(shape))))


def mask_and_segments(mask, segment_ids, sizes):
    """Both checked; segments as counts from 0 that rise by one at each change between real steps,
    so that an id that comes back later is a segment of its own."""
    if mask is not None:
        mask = tensor(mask)
        if keras.backend.standardize_dtype(mask.dtype) != "bool":
            raise ValueError(
                "`mask` must be boolean, True for real steps. Received: dtype "
                f"{keras.backend.standardize_dtype(mask.dtype)}. Use mask != 0."
            )
        expect_shape("mask", mask, ("B", "T"), sizes)
    if segment_ids is None:
        return mask, None
    segment_ids = tensor(segment_ids)
    check_segments(segment_ids)
    expect_shape("segment_ids", segment_ids, ("B", "T"), sizes)
    stretches = backends.own_stretch()
    first = segment_ids  # what comes before a first real step: no other segment
    if stretches is not None:
        marked = ops.stack([segment_ids, ops.ones_like(segment_ids)], axis=-1)
        newest, _ = newest_of_all(stretches, marked, ops.zeros_like(marked[:, :1]), mask)
        first = ops.where(newest[:, :, 1] != 0, newest[:, :, 0], first)
    before = backends.concatenate_steps([first[:, :1], segment_ids[:, :-1]])
    if mask is not None:
        last = last_real_step(mask)
        last = backends.concatenate_steps([last[:, :1] * 0 - 1, last[:, :-1]])
        before = backends.steps_of(segment_ids, ops.maximum(last, 0))
        before = ops.where(mask, ops.where(last >= 0, before, first), segment_ids)
    ids = ops.cumsum(ops.cast(segment_ids != before, "int32"), axis=1)
    if stretches is not None:
        changes = stretches.gather(ids[:, -1])
        ids = ids + sum(changes[: stretches.place], ops.zeros_like(ids[:, 0]))[:, None]
    return mask, ids


def from_the_end(name, sequences, mask, segment_ids=None):
    """All three in the opposite order of steps; segments as counts that rise from 0 again.

    Raises:
        ValueError: where processes of torch share time out; `name` is the layer's.
    """
    if backends.own_stretch() is not None:
        raise ValueError(
            "context_parallel shares time out in the order of the processes. Received: "
            f"{name} with go_backwards=True. On JAX, ContextParallel can."
        )
    if segment_ids is not None:
        segment_ids = segment_ids[:, -1:] - segment_ids
    return [None if x is None else ops.flip(x, axis=1) for x in (sequences, mask, segment_ids)]
