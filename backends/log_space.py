"""What the native forms share: constants of log space, states, segments."""

from keras import ops

# The log of "nothing": finite, so that differences of it are never NaN.
NEVER = -(2.0**100)  # exact in every dtype that it meets
# Forget gates below exp(LEAST_LOG) are taken as this: their exact sums still fit a float32.
LEAST_LOG = -1e5


def carried(state_m, carries):
    """m of an initial state; a state that holds nothing (the official zeros) is a fresh start."""
    return ops.where(carries, state_m, NEVER)


def reported(m):
    """m as it is returned: a state that still holds nothing is the official zero state."""
    return ops.where(m <= NEVER / 2, ops.zeros_like(m), m)


def weights(log, rest, m):
    """exp(log + rest - m), exact where whole numbers `log` and m are large; 0 where log is NEVER.
    `rest` is small."""
    whole = ops.round(m)
    w = ops.exp((log - whole) + (rest - (m - whole)))
    return ops.where(log > NEVER / 2, w, 0.0)


def empty_memory(k, v, i):
    """(C, n, m) before the first step, for k, v, i of (B, T, ...): m says that nothing is there.

    A start that is known to be fresh is not asked whether it holds something: XLA would answer by
    adding up the zeros while compiling, for seconds where the batch is large.
    """
    n = ops.zeros_like(k[:, 0])
    C = n[..., None] * ops.zeros_like(v[:, 0])[..., None, :]
    return C, n, ops.zeros_like(i[:, 0]) + NEVER


def holds_something(C, n):
    return ops.any(n != 0, axis=-1) | ops.any(C != 0, axis=(-2, -1))


def segment_starts(segment_ids):
    """(B, T) ids to (B, T) bool: the steps that start from an empty state."""
    before = ops.concatenate([ops.zeros_like(segment_ids[:, :1]), segment_ids[:, :-1]], axis=1)
    return segment_ids != before
