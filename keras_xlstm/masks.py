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
    before = ops.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    if mask is not None:
        last = last_real_step(mask)
        last = ops.concatenate([last[:, :1] * 0 - 1, last[:, :-1]], axis=1)
        before = backends.steps_of(segment_ids, ops.maximum(last, 0))
        before = ops.where(mask & (last >= 0), before, segment_ids)
    return mask, ops.cumsum(ops.cast(segment_ids != before, "int32"), axis=1)


def from_the_end(sequences, mask, segment_ids):
    """All three in the opposite order of steps; segments as counts that rise from 0 again."""
    if segment_ids is not None:
        segment_ids = segment_ids[:, -1:] - segment_ids
    return [None if x is None else ops.flip(x, axis=1) for x in (sequences, mask, segment_ids)]
