"""Tokens from logits: what is drawn, and from which of them."""

from keras import ops


def bucket(length):
    """The length that a prompt of `length` is padded to: few of them, to compile few times."""
    return (
        max(16, 1 << (int(length) - 1).bit_length())
        if length <= 1024
        else -(-length // 1024) * 1024
    )


def mark(seen, tokens):
    """`seen` (B, V), true where row b has had token v, with the tokens (B,) too."""
    ids = ops.arange(seen.shape[-1], dtype="int32")
    return ops.logical_or(seen, ops.equal(ids[None], tokens[:, None]))


def penalized(logits, seen, penalty):
    """Logits (B, V), less likely where `seen`: of CTRL, https://arxiv.org/abs/1909.05858, eq. 1.

    It divides what is above 0 there; what is below it multiplies, as libraries do.
    """
    return ops.where(seen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits, draw=None, temperature=None, top_k=None, top_p=None, min_p=None):
    """Token ids (B,) from logits (B, V) and uniform draws (B, 1); without draws the likeliest."""
    if draw is None:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    logits, ids = logits / temperature, None
    if top_k is not None or top_p is not None:
        logits, ids = ops.top_k(logits, top_k or logits.shape[-1])  # sorted
    p = ops.softmax(logits, axis=-1)
    if top_p is not None:
        p = ops.where(ops.cumsum(p, axis=-1) - p < top_p, p, 0.0)
    if min_p is not None:
        p = ops.where(p >= min_p * ops.max(p, axis=-1, keepdims=True), p, 0.0)
    reached = ops.cumsum(p, axis=-1)
    # Where p is 0 the sum may still grow, by a rounding: no such token is drawn.
    drawn = ops.logical_and(reached > draw * reached[:, -1:], p > 0)
    count = logits.shape[-1]
    rank = ops.min(ops.where(drawn, ops.arange(count, dtype="int32")[None], count), axis=-1)
    rank = ops.where(rank < count, rank, ops.cast(ops.argmax(p, axis=-1), "int32"))
    return (
        rank if ids is None else ops.cast(ops.take_along_axis(ids, rank[:, None], 1)[:, 0], "int32")
    )


def log_probs(logits, tokens):
    """The logarithm of each token's probability (B,), by logits (B, V)."""
    chosen = ops.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - ops.logsumexp(logits, axis=-1)
