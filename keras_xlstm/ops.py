"""sLSTM and mLSTM as functions of tensors: checks, masks and segments, then the backend."""

import keras
from keras import ops

from keras_xlstm import backends

__all__ = ["mlstm", "slstm"]

# A gate that is never open, and one that always is (log sigmoid is exactly 0).
_SHUT, _OPEN = -(2.0**100), 2.0**100


def mlstm(
    q,
    k,
    v,
    i,
    f,
    initial_state=None,
    mask=None,
    segment_ids=None,
    return_state=False,
    input_gate="exp",
    eps=1e-6,
    chunk_size=None,
    implementation=None,
):
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
        chunk_size: steps that are computed at once; None picks. It does not change the result.
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
    q, k, v, i, f = (_float_tensor(n, x) for n, x in zip("qkvif", (q, k, v, i, f), strict=True))
    _expect("q", q, ("B", "T", "H", "K"), sizes := {})
    _expect("k", k, ("B", "T", "H", "K"), sizes)
    _expect("v", v, ("B", "T", "H", "V"), sizes)
    _expect("i", i, ("B", "T", "H"), sizes)
    _expect("f", f, ("B", "T", "H"), sizes)
    _same_dtype(q=q, k=k, v=v)
    _one_of("input_gate", input_gate, ("exp", "sigmoid"))
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"`eps` must be a number >= 0. Received: eps={eps!r}.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            "`chunk_size` must be a positive integer, or None to pick one. "
            f"Received: chunk_size={chunk_size!r}."
        )
    shapes = {"C": ("B", "H", "K", "V"), "n": ("B", "H", "K"), "m": ("B", "H")}
    state = _states(initial_state, shapes, sizes)
    mask, segment_ids = mask_and_segments(mask, segment_ids, sizes)
    if mask is not None:
        # A shut input gate and an open forget gate leave the state exactly as it is; the zeros
        # keep whatever stands in padding, NaN too, away from everything else.
        real = mask[:, :, None]
        i, f = (ops.cast(g, _gate_dtype(g)) for g in (i, f))
        i, f = ops.where(real, i, _SHUT), ops.where(real, f, _OPEN)
        q, k, v = (ops.where(real[..., None], x, ops.zeros_like(x)) for x in (q, k, v))
    h, state = backends.mlstm(
        q, k, v, i, f, state, segment_ids,
        input_gate=input_gate, eps=eps, chunk_size=chunk_size, implementation=implementation,
    )  # fmt: skip
    return (h, state) if return_state else h


def slstm(
    x,
    recurrent_kernel,
    bias=None,
    initial_state=None,
    mask=None,
    segment_ids=None,
    return_state=False,
    forget_gate="sigmoid",
    recurrent_gradient_clip=None,
    implementation=None,
    recurrent_scale=None,
):
    """sLSTM: an LSTM with exponential gates, a normaliser and memory mixing within each head.

    Per unit, with pre-activations g = x_t + h_{t-1} R + b for g in i, f, z, o, and
    l = log sigmoid(f) (or f itself) and a stabiliser m that cancels:

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
    x = _float_tensor("x", x)
    recurrent_kernel = _float_tensor("recurrent_kernel", recurrent_kernel)
    _expect("x", x, ("B", "T", 4, "H", "D"), sizes := {})
    _expect("recurrent_kernel", recurrent_kernel, ("H", "D", 4, "D"), sizes)
    if bias is not None:
        bias = _float_tensor("bias", bias)
        _expect("bias", bias, (4, "H", "D"), sizes)
    if recurrent_scale is not None:
        recurrent_scale = _float_tensor("recurrent_scale", recurrent_scale)
        _expect("recurrent_scale", recurrent_scale, ("B", "H", "D"), sizes)
        recurrent_scale = ops.stop_gradient(recurrent_scale)
    _one_of("forget_gate", forget_gate, ("sigmoid", "exp"))
    check_clip(recurrent_gradient_clip)
    shapes = dict.fromkeys("hcnm", ("B", "H", "D"))
    state = _states(initial_state, shapes, sizes)
    mask, segment_ids = mask_and_segments(mask, segment_ids, sizes)
    if mask is not None:
        # Keeps whatever stands in padding, NaN too, away from everything else.
        x = ops.where(mask[:, :, None, None, None], x, ops.zeros_like(x))
    h, state = backends.slstm(
        x, recurrent_kernel, bias, state, mask, segment_ids,
        forget_gate=forget_gate, recurrent_gradient_clip=recurrent_gradient_clip,
        recurrent_scale=recurrent_scale, implementation=implementation,
    )  # fmt: skip
    return (h, state) if return_state else h


def last_real_step(mask):
    """(B, T) bool to (B, T) int: the newest real step at or before each step, -1 where none is."""
    step = ops.cumsum(ops.ones_like(mask, "int32"), axis=1) - 1
    real_first = ops.argsort(ops.where(mask, step, step + ops.shape(mask)[1]), axis=1)
    count = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    last = ops.take_along_axis(ops.cast(real_first, "int32"), ops.maximum(count - 1, 0), axis=1)
    return ops.where(count > 0, last, -1)


# ------------------------------------------------------------------------------------- checks


def check_clip(clip):
    if clip is not None and (
        isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0
    ):
        raise ValueError(
            "`recurrent_gradient_clip` must be a positive number, or None for no clipping. "
            f"Received: recurrent_gradient_clip={clip!r}."
        )


def _one_of(name, value, allowed):
    if value not in allowed:
        expected = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


def _tensor(x):
    # On TensorFlow convert_to_tensor hands a Keras variable back as it is.
    return ops.convert_to_tensor(x.value if isinstance(x, keras.Variable) else x)


def _float_tensor(name, x):
    x = _tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{name}` must be a floating-point tensor. Received: dtype {dtype}. "
            "Convert it with keras.ops.cast first."
        )
    return x


def _gate_dtype(gate):
    dtype = keras.backend.standardize_dtype(gate.dtype)
    return dtype if dtype == "float64" else "float32"


def _expect(name, x, dims, sizes):
    """Checks x's shape against `dims`, filling `sizes` with every size seen for the first time."""
    shape = tuple(x.shape)
    wanted = [sizes.get(d, d) for d in dims]
    fits = len(shape) == len(dims)
    if fits:
        for d, size in zip(dims, shape, strict=True):
            if isinstance(size, int):  # unknown and symbolic sizes are the framework's to check
                fits &= size == sizes.setdefault(d, size) if isinstance(d, str) else size == d
    if not fits:
        named = ", ".join(str(d) for d in dims)
        known = ", ".join(str(w) for w in wanted)
        raise ValueError(
            f"`{name}` must have shape ({named}), here ({known}). Received: shape {shape}."
        )


def _same_dtype(**tensors):
    dtypes = {name: keras.backend.standardize_dtype(x.dtype) for name, x in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{', '.join(tensors)} must have one dtype. Received: {dtypes}. "
            "Cast them to the dtype that you want the result in."
        )


def _states(state, shapes, sizes):
    if state is None:
        return None
    names = ", ".join(shapes)
    if not isinstance(state, (tuple, list)) or len(state) != len(shapes):
        got = f"{len(state)} tensors" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ValueError(
            f"`initial_state` must be the {len(shapes)} tensors ({names}), or None for a fresh "
            f"start. Received: {got}."
        )
    state = tuple(
        _float_tensor(f"initial_state {n}", s) for n, s in zip(shapes, state, strict=True)
    )
    for (name, dims), s in zip(shapes.items(), state, strict=True):
        _expect(f"initial_state {name}", s, dims, sizes)
    return state


def mask_and_segments(mask, segment_ids, sizes):
    """Both checked; segments as counts from 0 that rise by one at each change between real steps,
    so that an id that comes back later is a segment of its own."""
    if mask is not None:
        mask = _tensor(mask)
        if keras.backend.standardize_dtype(mask.dtype) != "bool":
            raise ValueError(
                "`mask` must be boolean, True for real steps. Received: dtype "
                f"{keras.backend.standardize_dtype(mask.dtype)}. Use mask != 0."
            )
        _expect("mask", mask, ("B", "T"), sizes)
    if segment_ids is None:
        return mask, None
    segment_ids = _tensor(segment_ids)
    if "int" not in keras.backend.standardize_dtype(segment_ids.dtype):
        raise ValueError(
            "`segment_ids` must be integers, one per step. Received: dtype "
            f"{keras.backend.standardize_dtype(segment_ids.dtype)}."
        )
    _expect("segment_ids", segment_ids, ("B", "T"), sizes)
    before = ops.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    if mask is not None:
        last = last_real_step(mask)
        last = ops.concatenate([last[:, :1] * 0 - 1, last[:, :-1]], axis=1)
        before = ops.take_along_axis(segment_ids, ops.maximum(last, 0), axis=1)
        before = ops.where(mask & (last >= 0), before, segment_ids)
    return mask, ops.cumsum(ops.cast(segment_ids != before, "int32"), axis=1)
