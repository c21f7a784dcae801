"""Checks of arguments: each says what it wants, what it was given, and what to do."""

import itertools
import math
import numbers

import keras
import numpy as np
from keras import ops

from keras_xlstm import backends


def check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}.")


def check_cap(name, cap):
    number = isinstance(cap, numbers.Real) and not isinstance(cap, bool)
    if cap is not None and not (number and 0 < cap < math.inf):
        raise ValueError(
            f"`{name}` must be a positive number, or None for no bound. Received: {name}={cap!r}."
        )
    return cap


def check_heads(units, num_heads):
    check_positive("units", units)
    check_positive("num_heads", num_heads)
    if units % num_heads:
        raise ValueError(
            f"`units` must be divisible by `num_heads`: every head has units / num_heads units. "
            f"Received: units={units}, num_heads={num_heads}."
        )


def check_use_kernel(use_kernel):
    if use_kernel != "auto" and not isinstance(use_kernel, bool):
        raise ValueError(
            '`use_kernel` must be "auto" (a kernel where one fits), True (a kernel or an error) '
            f"or False (never a kernel). Received: use_kernel={use_kernel!r}."
        )
    return use_kernel


def check_rate(name, rate):
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={rate!r}.")
    return rate


def _host_values(state):
    """Of {name: tensor}, the values that are at hand: a tensor on a GPU would have to be fetched,
    and one that is being traced has none."""
    values = {name: backends.host_values(tensor) for name, tensor in state.items()}
    return {name: value for name, value in values.items() if value is not None}


def check_state_values(what, state):
    """Refuses a state {name: tensor} with NaN or infinity in it, where the values are at hand."""
    for name, value in _host_values(state).items():
        if not np.isfinite(value).all():
            raise ValueError(f"{what} must hold finite numbers. Received: NaN or inf in {name}.")


def check_state_agrees(what, state):
    """Refuses a state that is none: a normaliser n below 0, or one that says that nothing is
    remembered where c, or C, is not 0."""
    values, memory = _host_values(state), "c" if "c" in state else "C"
    if not {"n", memory} <= set(values):
        return
    if memory == "c" and ((values["n"] < 0) & np.isfinite(values["n"])).any():
        raise ValueError(
            f"{what}: the normaliser n must not be negative. Received: n of "
            f"{values['n'].min():.4g}. {_FROM_LSTM}"
        )
    n, held = values["n"] != 0, values[memory] != 0
    if memory == "C":
        n, held = n.any(-1), held.any((-2, -1))
    if (held & ~n).any():
        remedy = _FROM_LSTM if memory == "c" else "Hand over n as it was returned beside C."
        raise ValueError(
            f"{what} contradicts itself: n = 0 says that nothing is remembered, and {memory} is "
            f"not 0 there. {remedy}"
        )


_FROM_LSTM = (
    "For a state of keras.layers.LSTM, or one of your own h and c, use "
    "keras_xlstm.layers.state_from_lstm(h, c): n = 1, m = 0."
)


def check_clip(clip):
    if clip is not None and (
        isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0
    ):
        raise ValueError(
            "`recurrent_gradient_clip` must be a positive number, or None for no clipping. "
            f"Received: recurrent_gradient_clip={clip!r}."
        )


def check_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")
    return value


def refuse_states(layer, format):
    """The error for states in variables where only a SavedModel has variables."""
    raise ValueError(
        f"{layer.name} keeps its states in variables (stateful=True), which a file of the format "
        f"{format!r} cannot: it would start every call from the same states. Build the model with "
        "stateful=False and load the same weights: keras_xlstm.export.export_model(model, folder, "
        f"{format!r}, parts=('streaming',)) writes one step of it, states in and states out, and "
        "keras_xlstm.export.step_model(model) is that step in Keras."
    )


def check_floating(layer):
    if "float" not in layer.compute_dtype:
        raise ValueError(
            f"`dtype` of {type(layer).__name__} must be floating-point, or a policy that computes "
            f"in such. Received: dtype={layer.dtype_policy.name!r}."
        )


def freeze(layer):
    """Hands `trainable=False` on to sub-layers: Keras does so when it is set, not when it is given
    to the constructor."""
    if not layer.trainable:
        layer.trainable = True  # On TensorFlow, assigning the value that is there does nothing.
        layer.trainable = False


def load_variables(layer, variables, store):
    """Fills a layer's own variables by name, from a file that must hold them and nothing else."""
    names = sorted(v.name for v in variables)
    if sorted(store.keys()) != names:
        raise ValueError(
            f"The file must hold {names} for the layer {layer.name} itself. Received: "
            f"{sorted(store.keys())}. It is damaged, or the file of another model."
        )
    for variable in variables:
        variable.assign(store[variable.name])


def one_of(name, value, allowed):
    if value not in allowed:
        expected = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


def tensor(x):
    if isinstance(x, keras.KerasTensor):
        raise ValueError(
            "keras_xlstm.ops takes tensors with values. Received: the symbolic "
            f"{x}. In a functional model use keras_xlstm.layers, or call the "
            "function in the call() of a layer of your own."
        )
    # On TensorFlow convert_to_tensor hands a Keras variable back as it is.
    return ops.convert_to_tensor(x.value if isinstance(x, keras.Variable) else x)


def float_tensor(name, x):
    if x is None:
        raise ValueError(f"`{name}` must be a floating-point tensor. Received: None.")
    x = tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{name}` must be a floating-point tensor. Received: dtype {dtype}. "
            "Convert it with keras.ops.cast first."
        )
    return x


def gate_dtype(gate):
    dtype = keras.backend.standardize_dtype(gate.dtype)
    return dtype if dtype == "float64" else "float32"


def expect_shape(name, x, dims, sizes):
    """Checks x's shape against `dims`, filling `sizes` with every size seen for the first time."""
    # Plain and without closures: a small call on a GPU waits for this.
    shape, before = tuple(x.shape), dict(sizes)
    fits = len(shape) == len(dims)
    for d, size in zip(dims, shape, strict=False):
        if isinstance(size, int):  # unknown and symbolic sizes are the framework's to check
            fits = fits and size == (sizes.setdefault(d, size) if isinstance(d, str) else d)
    if not fits:
        named = ", ".join(str(d) for d in dims)
        known = ", ".join(str(before.get(d, d)) for d in dims)
        raise ValueError(
            f"`{name}` must have shape ({named}), here ({known}). Received: shape {shape}."
        )
    for d, what in (("T", "time step"), ("K", "key dimension")):
        if sizes.get(d) == 0:
            raise ValueError(f"`{name}` must have at least one {what}. Received: shape {shape}.")


def same_dtype(**tensors):
    first, *others = (x.dtype for x in tensors.values())
    if all(dtype == first for dtype in others):
        return
    dtypes = {name: keras.backend.standardize_dtype(x.dtype) for name, x in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{', '.join(tensors)} must have one dtype. Received: {dtypes}. "
            "Cast them to the dtype that you want the result in."
        )


def states_of(state, shapes, sizes):
    if state is None:
        return None
    names = ", ".join(shapes)
    if not isinstance(state, (tuple, list)) or len(state) != len(shapes):
        got = f"{len(state)} tensors" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ValueError(
            f"`initial_state` must be the {len(shapes)} tensors ({names}), or None for a fresh "
            f"start. Received: {got}."
        )
    state = tuple(float_tensor(f"initial_state {n}", s) for n, s in zip(shapes, state, strict=True))
    for (name, dims), s in zip(shapes.items(), state, strict=True):
        expect_shape(f"initial_state {name}", s, dims, sizes)
    check_state_agrees("`initial_state`", dict(zip(shapes, state, strict=True)))
    return state


def check_segments(segment_ids):
    dtype = keras.backend.standardize_dtype(segment_ids.dtype)
    if "int" not in dtype:
        raise ValueError(f"`segment_ids` must be integers, one per step. Received: dtype {dtype}.")


def check_quantiles(quantiles):
    values = list(quantiles) if isinstance(quantiles, (list, tuple, np.ndarray)) else []
    if not (
        values
        and all(isinstance(q, numbers.Real) and 0 < q < 1 for q in values)
        and all(a < b for a, b in itertools.pairwise(values))
    ):
        raise ValueError(
            "`quantiles` must be a list of rising numbers between 0 and 1, as [0.1, 0.5, 0.9]. "
            f"Received: quantiles={quantiles!r}."
        )
    return [float(q) for q in values]
