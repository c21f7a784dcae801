"""sLSTM and mLSTM as functions of tensors: checks, masks and segments, then the backend."""

import math
from typing import Any

from keras import ops

from keras_xlstm import backends
from keras_xlstm.masks import mask_and_segments
from keras_xlstm.validation import (
    check_clip,
    check_flag,
    expect_shape,
    float_tensor,
    gate_dtype,
    one_of,
    same_dtype,
    states_of,
)

__all__ = ["mlstm", "slstm"]

_CHECKED = {}  # of calls that passed, by sizes and dtypes: the options of the last, if any

# A gate that is never open, and one that always is (log sigmoid is exactly 0).
_SHUT, _OPEN = -(2.0**100), 2.0**100


def _remember(signature, options):
    if signature is not None:
        if len(_CHECKED) >= 1000:  # as many lengths as there are may come
            _CHECKED.clear()
        _CHECKED[signature] = options


@backends.no_autograph
def mlstm(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    initial_state: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    return_state: bool = False,
    input_gate: str = "exp",
    eps: float = 1e-6,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """mLSTM: a matrix memory written by exponential gates and read by queries.

    Per head, with log forget gate l = log sigmoid(f) and a stabiliser m that cancels:

        m_t = max(l_t + m_{t-1}, i_t)
        C_t = exp(l_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
        n_t = exp(l_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
        h_t = C_t^T q_t / sqrt(K) / (max(|n_t . q_t / sqrt(K)|, exp(-m_t)) + eps)

    (eqs. 19-27 of [xLSTM](https://arxiv.org/abs/2405.04517).) It runs in chunks: time and memory
    are linear in T, for any T. Gradients are exact for every input and for the states.

    Args:
        q, k: queries and keys, (B, T, H, K).
        v: values, (B, T, H, V), of the dtype of q and k.
        i, f: pre-activations of the input and forget gates, (B, T, H).
        initial_state: `(C, n, m)` of shapes (B, H, K, V), (B, H, K) and (B, H), as `return_state`
            gives them, or None. All zeros mean the same as None.
        mask: (B, T) bool, True for real steps. Other steps leave the state as it is and their
            inputs reach nothing; their h is the memory read with an empty query, zero.
        segment_ids: (B, T) integers; where they change, the memory starts empty: documents packed
            into one row do not see each other. The first segment continues `initial_state`.
        return_state: return `(h, (C, n, m))`.
        input_gate: `"exp"`, or `"sigmoid"` (log sigmoid(i) in place of i).
        eps: added to the denominator, in units of exp(m). The gradient takes m for a constant: it
            is exact for eps=0, and to about eps otherwise.
        chunk_size: steps that are computed at once; None picks. It does not change the result. The
            Triton kernels know the powers of two from 16 to 512.
        implementation: None picks what fits; `"native"`, `"triton"`, `"pallas"` or `"xla"` runs
            that one, or says why it cannot.

    Returns:
        h, (B, T, H, V) in v's dtype; with `return_state` also `(C, n, m)`, in float32 (float64
        for float64 inputs).

    Raises:
        ValueError: for a shape, dtype or option that cannot be honoured.

    Example:

    >>> import numpy as np
    >>> q = k = v = np.random.normal(size=(2, 10, 4, 8)).astype("float32")
    >>> gate = np.zeros((2, 10, 4), "float32")
    >>> h, state = keras_xlstm.ops.mlstm(q, k, v, gate, gate + 3, return_state=True)
    >>> h.shape
    (2, 10, 4, 8)
    """
    state = signature = None
    options = return_state, input_gate, eps, chunk_size
    if initial_state is None and mask is None and segment_ids is None:
        signature = backends.signature(q, k, v, i, f)
        options = *map(type, options), *options  # True is 1, too; arrays have no one answer
    if signature is None or _CHECKED.get(signature) != options:
        q, k, v, i, f, state, segment_ids = _checked(
            q, k, v, i, f, initial_state, mask, segment_ids, return_state, input_gate, eps,
            chunk_size,
        )  # fmt: skip
        _remember(signature, options)
    h, state = backends.mlstm(
        q, k, v, i, f, state, segment_ids,
        input_gate=input_gate, eps=eps, chunk_size=chunk_size, implementation=implementation,
        states=return_state,
    )  # fmt: skip
    return (h, state) if return_state else h


def _checked(
    q, k, v, i, f, initial_state, mask, segment_ids, return_state, input_gate, eps, chunk_size
):
    sizes = {}
    q, k, v, i, f = (float_tensor(n, x) for n, x in zip("qkvif", (q, k, v, i, f), strict=True))
    expect_shape("q", q, ("B", "T", "H", "K"), sizes)
    expect_shape("k", k, ("B", "T", "H", "K"), sizes)
    expect_shape("v", v, ("B", "T", "H", "V"), sizes)
    expect_shape("i", i, ("B", "T", "H"), sizes)
    expect_shape("f", f, ("B", "T", "H"), sizes)
    same_dtype(q=q, k=k, v=v)
    check_flag("return_state", return_state)
    one_of("input_gate", input_gate, ("exp", "sigmoid"))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"`eps` must be a number >= 0. Received: eps={eps!r}.")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(
            "`chunk_size` must be a positive integer, or None to pick one. "
            f"Received: chunk_size={chunk_size!r}."
        )
    shapes = {"C": ("B", "H", "K", "V"), "n": ("B", "H", "K"), "m": ("B", "H")}
    state = states_of(initial_state, shapes, sizes)
    mask, segment_ids = mask_and_segments(mask, segment_ids, sizes)
    if mask is not None:
        i, f, (q, k, v) = _left_out(mask, i, f, (q, k, v))
    return q, k, v, i, f, state, segment_ids


def _left_out(mask, i, f, tensors):
    """Gates and tensors (B, T, H, ...) by which masked steps do nothing: a shut input gate and an
    open forget gate leave the state exactly as it is, and zeros keep whatever stands in padding,
    NaN too, away from everything else."""
    real = mask[:, :, None]
    i, f = (ops.cast(g, gate_dtype(g)) for g in (i, f))
    i, f = ops.where(real, i, _SHUT), ops.where(real, f, _OPEN)
    return i, f, [ops.where(real[..., None], x, ops.zeros_like(x)) for x in tensors]


def mlstm_last(
    q, k, v, i, f, initial_state=None, mask=None, input_gate="exp", eps=1e-6, return_state=True
):
    """`(h, state)` of `mlstm` after the last real step alone, for q (B, H, K) of that step; from
    layers, which have checked the rest, where `backends.reads_once` says so. The state is None
    without `return_state`."""
    state = None
    if initial_state is not None:
        shapes = {"C": ("B", "H", "K", "V"), "n": ("B", "H", "K"), "m": ("B", "H")}
        state = states_of(initial_state, shapes, {})
    if mask is not None:
        i, f, (k, v) = _left_out(mask, i, f, (k, v))
    return backends.mlstm_last(q, k, v, i, f, state, input_gate, eps, return_state)


@backends.no_autograph
def slstm(
    x: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    initial_state: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    return_state: bool = False,
    forget_gate: str = "sigmoid",
    recurrent_gradient_clip: float | None = None,
    implementation: str | None = None,
    recurrent_scale: Any = None,
    kernel: Any = None,
) -> Any:
    """sLSTM: an LSTM with exponential gates, a normaliser and memory mixing within each head.

    Each unit has pre-activations g = x_t + h_{t-1} R + b for g in i, f, z, o. l = log sigmoid(f),
    or f itself. The stabiliser m cancels:

        m_t = max(l_t + m_{t-1}, i_t)
        c_t = exp(l_t + m_{t-1} - m_t) c_{t-1} + exp(i_t - m_t) tanh(z_t)
        n_t = exp(l_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t)
        h_t = sigmoid(o_t) c_t / n_t

    (eqs. 8-17 of [xLSTM](https://arxiv.org/abs/2405.04517).) Gradients are exact for every input
    and for the states; m is a constant in them, because h does not depend on it.

    Args:
        x: gate inputs in the order i, f, z, o: (B, T, 4, H, D).
        recurrent_kernel: (H, D_in, 4, D_out): every head mixes its own units.
        bias: (4, H, D) or None.
        initial_state: `(h, c, n, m)`, each (B, H, D), as `return_state` gives them, or None.
            Zeros mean the same as None (n = 0 marks a unit that starts fresh).
        mask: (B, T) bool, True for real steps. Other steps hold h and the states, and their
            inputs reach nothing.
        segment_ids: (B, T) integers; where they change, h and the states start empty. The first
            segment continues `initial_state`.
        return_state: return `(h, (h, c, n, m))`.
        forget_gate: `"sigmoid"` or `"exp"`.
        recurrent_gradient_clip: bounds, elementwise, the gradient that flows back from one step's
            gates to the h before it; None for exact gradients. The paper used 10.
        implementation: None picks what fits; `"native"`, `"triton"`, `"pallas"` or `"xla"` runs
            that one, or says why it cannot.
        recurrent_scale: (B, H, D) or None: multiplies h_{t-1} where it enters the recurrent
            kernel, the same at every step: the place of recurrent dropout. A constant: it gets no
            gradient.
        kernel: (F, 4 * H * D) or None: x is (B, T, F) then, and the gate inputs are its product
            with the kernel, units of all heads side by side, gate after gate.

    Returns:
        h, (B, T, H, D) in x's dtype; with `return_state` also `(h, c, n, m)`, in float32 (float64
        for float64 inputs).

    Raises:
        ValueError: for a shape, dtype or option that cannot be honoured.

    Example:

    >>> import numpy as np
    >>> x = np.random.normal(size=(2, 10, 4, 2, 8)).astype("float32")
    >>> recurrent_kernel = np.zeros((2, 8, 4, 8), "float32")
    >>> keras_xlstm.ops.slstm(x, recurrent_kernel).shape
    (2, 10, 2, 8)
    """
    signature = None
    if kernel is not None:
        x, kernel = _inputs_and_kernel(x, kernel, recurrent_kernel, implementation)
    plain = initial_state is None and mask is None and segment_ids is None
    if plain and recurrent_scale is None and kernel is None:
        given = (x, recurrent_kernel) if bias is None else (x, recurrent_kernel, bias)
        signature = backends.signature(*given)
    sizes = {}
    if signature is None or signature not in _CHECKED:
        x = float_tensor("x", x)
        recurrent_kernel = float_tensor("recurrent_kernel", recurrent_kernel)
        dims = ("B", "T", 4, "H", "D") if kernel is None else ("B", "T", "F")
        expect_shape("x", x, dims, sizes)
        expect_shape("recurrent_kernel", recurrent_kernel, ("H", "D", 4, "D"), sizes)
        if bias is not None:
            bias = float_tensor("bias", bias)
            expect_shape("bias", bias, (4, "H", "D"), sizes)
        _remember(signature, None)
    if recurrent_scale is not None:
        recurrent_scale = float_tensor("recurrent_scale", recurrent_scale)
        expect_shape("recurrent_scale", recurrent_scale, ("B", "H", "D"), sizes)
        recurrent_scale = ops.stop_gradient(recurrent_scale)
    check_flag("return_state", return_state)
    one_of("forget_gate", forget_gate, ("sigmoid", "exp"))
    check_clip(recurrent_gradient_clip)
    shapes = dict.fromkeys("hcnm", ("B", "H", "D"))
    state = states_of(initial_state, shapes, sizes)
    mask, segment_ids = mask_and_segments(mask, segment_ids, sizes)
    if mask is not None:
        # Keeps whatever stands in padding, NaN too, away from everything else.
        real = mask[:, :, None] if kernel is not None else mask[:, :, None, None, None]
        x = ops.where(real, x, ops.zeros_like(x))
    h, state = backends.slstm(
        x, recurrent_kernel, bias, state, mask, segment_ids,
        forget_gate=forget_gate, recurrent_gradient_clip=recurrent_gradient_clip,
        recurrent_scale=recurrent_scale, kernel=kernel, implementation=implementation,
    )  # fmt: skip
    return (h, state) if return_state else h


def _inputs_and_kernel(x, kernel, recurrent_kernel, implementation):
    """Both, for a loop that multiplies step by step; or gate inputs (B, T, 4, H, D) and None."""
    sizes = {}
    x, kernel = float_tensor("x", x), float_tensor("kernel", kernel)
    recurrent_kernel = float_tensor("recurrent_kernel", recurrent_kernel)
    expect_shape("x", x, ("B", "T", "F"), sizes)
    H, D = recurrent_kernel.shape[:2]
    expect_shape("kernel", kernel, ("F", 4 * H * D), sizes)
    same_dtype(x=x, kernel=kernel)
    if backends.multiplies_inside(x, H * D, implementation):
        return x, kernel
    return ops.reshape(ops.matmul(x, kernel), (*ops.shape(x)[:2], 4, H, D)), None
