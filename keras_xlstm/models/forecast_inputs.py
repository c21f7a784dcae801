"""What a forecaster is given: names, shapes and types, checked."""

import keras
import numpy as np

NAMES = ("history", "mask", "future", "static")


def named(inputs):
    """One tensor, the history, or a dict of inputs, as a dict of those that are there."""
    given = inputs if isinstance(inputs, dict) else {"history": inputs}
    if set(given) - set(NAMES) or given.get("history") is None:
        raise ValueError(
            "xLSTMForecaster takes the history, or a dict with 'history' and, if wanted, 'mask', "
            f"'future' and 'static'. Received: a dict with {sorted(map(str, given))}."
        )
    return {name: given[name] for name in NAMES if given.get(name) is not None}


def shapes_of(inputs):
    """{name: shape} of `named` inputs, or of a dict of shapes."""
    if not isinstance(inputs, dict):
        return {"history": tuple(inputs)}
    return {name: tuple(getattr(x, "shape", x)) for name, x in named(inputs).items()}


def _described(shapes):
    return ", ".join(f"{name} {('batch', *shape[1:])}" for name, shape in shapes.items())


def check_shapes(shapes, horizon, targets):
    """Refuses shapes that no model can be built for."""
    history = shapes["history"]
    if len(history) != 3 or None in history[1:] or 0 in history[1:]:
        raise ValueError(
            "'history' must have shape (batch, time, channels), with a time and channels that are "
            f"known and at least 1. Received: shape {history}."
        )
    time, channels = history[1:]
    if targets is not None and targets > channels:
        raise ValueError(
            "`targets` must not exceed the history's channels. Received: "
            f"targets={targets}, history of shape {history}."
        )
    mask = shapes.get("mask", history)
    if mask[1:] not in ((time,), (time, channels)):
        raise ValueError(
            f"'mask' must have shape (batch, {time}) or (batch, {time}, {channels}), as the "
            f"history. Received: shape {mask}."
        )
    future = shapes.get("future", (None, horizon, 1))
    if len(future) != 3 or future[1] not in (horizon, time + horizon) or not future[2]:
        raise ValueError(
            f"'future' must have shape (batch, {horizon}, features), of the horizon, or (batch, "
            f"{time + horizon}, features), of the history and the horizon. Received: shape "
            f"{future}."
        )
    static = shapes.get("static", (None, 1))
    if len(static) != 2 or not static[1]:
        raise ValueError(f"'static' must have shape (batch, features). Received: shape {static}.")


def check_call(inputs, built_for):
    """Refuses inputs of other shapes than those that the model was built for, or of other types."""
    shapes = shapes_of(inputs)
    if {n: s[1:] for n, s in shapes.items()} != {n: s[1:] for n, s in built_for.items()}:
        raise ValueError(
            f"This xLSTMForecaster was built for {_described(built_for)}. Received: "
            f"{_described(shapes)}. A shorter history is padded in front with NaN; for other "
            "inputs build another model."
        )
    for name, x in inputs.items():
        dtype = keras.backend.standardize_dtype(x.dtype)
        if name != "mask" and "float" not in dtype:
            raise ValueError(f"{name!r} must be floating-point. Received: dtype {dtype}. Cast it.")


def future_of_rolls(future, built_for, steps, horizon):
    """What is known ahead of every roll: `steps` of it, and NaN behind, for whole horizons."""
    time, length = built_for["history"][1], built_for["future"][1]
    wanted = steps + length - horizon
    if future.ndim != 3 or future.shape[1] != wanted:
        raise ValueError(
            f"'future' must have shape (batch, {wanted}, features) for {steps} steps: "
            + (f"the history's {time} and them. " if length > horizon else "")
            + f"Received: shape {future.shape}."
        )
    behind = -steps % horizon
    future = np.pad(future, ((0, 0), (0, behind), (0, 0)), constant_values=np.nan)
    return [future[:, at : at + length] for at in range(0, steps, horizon)]
