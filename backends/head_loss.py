"""The cross-entropy of a head's logits that are never there all at once.

The logits of 16,384 tokens over 50,304 ids take 3.3 GB in float32, and their gradient as much. Here
they come some steps at a time. Each part's gradients by the features and by the head's weight are
made while its logits are there, so nothing is computed twice.
"""

from keras import ops
from keras_xlstm.backends.framework import framework as active

_LOGITS = 2**28  # as many at once
_FEW = 4  # so many parts are not worth their time: 2 % of a step was seen for 7 or 8 parts


def parts(batch, time, vocabulary):
    """In how many parts time is cut, equal ones where that fits; 1 where all logits at once cost
    little."""
    logits = batch * time * vocabulary
    if logits <= _FEW * _LOGITS:
        return 1
    count = min(time, -(-logits // _LOGITS))
    return next((n for n in range(count, 2 * count) if time % n == 0), count)


def loss_sum(features, weight, y, token_weights, cap, turned, count, by_tokens, dtype):
    """The sum of the tokens' cross-entropies, each times its weight, and its gradients.

    Args:
        features: (B, T, D), in the dtype of the products.
        weight: the head's, (D, V) or, `turned`, (V, D).
        y: ids (B, T). One beyond the vocabulary counts as zero.
        token_weights: (B, T), which get no gradient.
        cap: logits x are cap * tanh(x / cap), or None.
        count: of parts.
        by_tokens: `cross_entropy`, or the same function compiled.
        dtype: of the losses.
    """
    options = {
        "cap": cap, "turned": turned, "count": count, "by_tokens": by_tokens, "dtype": dtype,
    }  # fmt: skip
    weight = ops.convert_to_tensor(weight)
    tensors = features, weight, ops.cast(y, "int32"), ops.cast(token_weights, dtype)
    (total,) = active.differentiable(_forward, _backward, tensors, **options)
    return total


def cross_entropy(z, y, token_weights, cap, dtype):
    """Of products z (N, V): the sum of the weighted losses and its gradient by z, in z's dtype."""
    x = ops.cast(z, dtype)
    slope = 1.0
    if cap is not None:
        bounded = ops.tanh(x / cap)
        x, slope = cap * bounded, 1 - bounded * bounded
    known = (y >= 0) & (y < z.shape[-1])
    w = ops.where(known, token_weights, 0.0)
    total = ops.logsumexp(x, axis=-1)
    # Not a sum over one-hot vectors, which XLA works out again for the gradient.
    own = ops.take_along_axis(x, ops.where(known, y, 0)[:, None], axis=-1)[:, 0]
    p = ops.exp(x - total[:, None])
    ids = ops.arange(z.shape[-1], dtype="int32")[None]
    d = ops.where(ids == y[:, None], p - 1, p) * slope * w[:, None]
    return ops.sum((total - own) * w), ops.cast(d, z.dtype)


def _forward(
    features, weight, y, token_weights, *,
    cap, turned, count, by_tokens, dtype, keep=True, plain=False,
):  # fmt: skip
    T, D = features.shape[1:]
    w = ops.cast(weight, features.dtype)
    out = ops.swapaxes(w, 0, 1) if turned else w

    def of(features, y, token_weights):
        """Of some steps: their loss, and the gradients by them and by the weight."""
        h = ops.reshape(features, (-1, D))
        flat = ops.reshape(y, (-1,)), ops.reshape(token_weights, (-1,))
        loss, d = by_tokens(ops.matmul(h, out), *flat, cap, dtype)
        if not keep:
            return loss, None, None
        pair = (d, h) if turned else (h, d)
        dweight = ops.matmul(ops.swapaxes(pair[0], 0, 1), pair[1])
        dh = ops.matmul(d, ops.swapaxes(out, 0, 1))
        return loss, ops.reshape(dh, ops.shape(features)), dweight

    if not keep or plain:
        return (of(features, y, token_weights)[0],), None
    L = T // count
    whole = L * count

    def step(carry, xs):
        loss, dh, dweight = of(*xs)
        return (carry[0] + loss, ops.add(carry[1], dweight)), (dh,), ()  # one pass, in `dtype`

    def by_parts(x):
        return ops.transpose(ops.reshape(x[:, :whole], (-1, count, L)), (1, 0, 2))

    carry = ops.zeros((), dtype), ops.zeros(weight.shape, dtype)
    short = by_parts(y), by_parts(token_weights)
    carry, (dh,), _ = active.scan_chunks(step, carry, (features[:, :whole],), short)
    if whole < T:
        rest = features[:, whole:], y[:, whole:], token_weights[:, whole:]
        carry, (last,), _ = step(carry, rest)
        dh = ops.concatenate([dh, last], axis=1)
    return (carry[0],), (dh, ops.cast(carry[1], weight.dtype))


def _backward(residuals, gradients, **options):
    (g,) = gradients
    # Not rounded to half precision before the product.
    dh, dweight = (ops.cast(g * ops.cast(d, g.dtype), d.dtype) for d in residuals)
    return dh, dweight, None, None
