"""Tokens from logits, and when to stop."""

import itertools

import numpy as np
from keras import ops


def bucket(length):
    """The length that a prompt of `length` is padded to: few of them, to compile few times."""
    return (
        max(16, 1 << (int(length) - 1).bit_length())
        if length <= 1024
        else -(-length // 1024) * 1024
    )


def choose(logits, draw, temperature, top_k, top_p):
    """Token ids (B,) from logits (B, V) and uniform draws (B, 1); without draws the likeliest."""
    if draw is None:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    logits, ids = logits / temperature, None
    if top_k is not None or top_p is not None:
        logits, ids = ops.top_k(logits, top_k or logits.shape[-1])  # sorted
    p = ops.softmax(logits, axis=-1)
    if top_p is not None:
        p = ops.where(ops.cumsum(p, axis=-1) - p < top_p, p, 0.0)
    reached = ops.cumsum(p, axis=-1)
    rank = ops.sum(ops.cast(reached <= draw * reached[:, -1:], "int32"), axis=-1)
    rank = ops.minimum(rank, logits.shape[-1] - 1)
    return (
        rank if ids is None else ops.cast(ops.take_along_axis(ids, rank[:, None], 1)[:, 0], "int32")
    )


def fetched(steps):
    """Steps (batch,) as NumPy arrays (batch, some of them).

    Some at a time: no step waits for the one before to arrive here, and a long text does not fill
    the device with arrays of a few bytes.
    """
    while some := list(itertools.islice(steps, 256)):
        yield np.stack([ops.convert_to_numpy(tokens) for tokens in some], axis=1)


def until(steps, stop_token):
    """Steps as NumPy arrays, until all rows have had `stop_token`; it is repeated after that."""
    done = None
    for tokens in steps:
        tokens = np.array(ops.convert_to_numpy(tokens))
        if stop_token is not None:
            done = np.zeros(len(tokens), bool) if done is None else done
            tokens[done] = stop_token
            done |= tokens == stop_token
        yield tokens
        if stop_token is not None and done.all():
            return
