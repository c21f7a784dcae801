"""Windows of tables, by hand."""

import importlib

import keras
import numpy as np
import pytest
from tools import BACKEND

from keras_xlstm.losses import ObservedLoss
from keras_xlstm.models import xLSTMForecaster
from keras_xlstm.windows import ForecastWindows

once = pytest.mark.skipif(BACKEND != "torch", reason="NumPy alone: run on torch")


def table(rows=12):
    t = np.arange(rows, dtype="float64")
    return {"load": t, "wind": 100 + t, "hour": t % 4, "site": np.full(rows, 7)}


ROLES = {"targets": "load", "observed": ["wind"], "known": ["hour"], "static": "site"}


def batches(windows):
    """Inputs and targets of an epoch, each as one array."""
    found = [windows[index] for index in range(len(windows))]
    inputs = {n: np.concatenate([x[n] for x, _ in found]) for n in found[0][0]}
    return inputs, np.concatenate([y for _, y in found])


@once
def test_by_hand():
    windows = ForecastWindows(table(), 4, 3, **ROLES, batch_size=4)
    assert len(windows) == 2
    inputs, y = batches(windows)
    origins = np.arange(4, 10)
    np.testing.assert_array_equal(windows.origins, origins)
    before, ahead = origins[:, None] + np.arange(-4, 0), origins[:, None] + np.arange(3)
    np.testing.assert_array_equal(y, ahead[:, :, None])
    np.testing.assert_array_equal(inputs["history"], np.stack([before, 100 + before], -1))
    whole = np.concatenate([before, ahead], 1)
    np.testing.assert_array_equal(inputs["future"], (whole % 4)[:, :, None])
    np.testing.assert_array_equal(inputs["static"], np.full((6, 1), 7))
    assert {x.dtype for x in [*inputs.values(), y]} == {np.dtype("float32")}
    assert set(windows[0][0]) == {"history", "future", "static"}
    assert set(ForecastWindows(table(), 4, 3)[0][0]) == {"history"}
    with pytest.raises(IndexError):
        windows[2]


class Frame:
    """What a data frame has."""

    def __init__(self, columns):
        self.columns, self._columns = list(columns), columns

    def __getitem__(self, name):
        return self._columns[name]


@once
@pytest.mark.parametrize("kind", ["array", "frame", "pandas", "polars"])
def test_tables_of_every_kind(kind):
    columns = table()
    columns["wind"][5] = np.nan
    roles = ROLES
    if kind == "array":
        made = np.stack(list(columns.values()), 1)
        roles = {"targets": 0, "observed": [1], "known": 2, "static": [3]}
    elif kind == "frame":
        made = Frame(columns)
    else:
        library = pytest.importorskip(kind)
        columns["wind"] = [None if np.isnan(x) else int(x) for x in columns["wind"]]
        made = library.DataFrame(columns)
        if kind == "pandas":
            made["wind"] = made["wind"].astype("Int64")  # with NA
    got, want = (
        batches(ForecastWindows(t, 4, 3, **r)) for t, r in ((made, roles), (table(), ROLES))
    )
    want[0]["history"][want[0]["history"] == 105] = np.nan
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        np.testing.assert_array_equal(a, b)


@once
def test_parts_in_time():
    """Targets lie in their part alone, histories may lie before; together the parts have each once."""
    whole = ForecastWindows(table(), 4, 3)
    parts = [ForecastWindows(table(), 4, 3, start=a, stop=b) for a, b in ((None, 8), (8, None))]
    assert parts[0].origins.tolist() == [4, 5]
    assert parts[1].origins.tolist() == [8, 9]
    assert whole.origins.tolist() == [4, 5, 6, 7, 8, 9]
    days = np.datetime64("2024-01-01") + np.arange(12)
    windows = ForecastWindows(
        {"x": np.arange(12.0), "day": days}, 4, 3, time="day", start="2024-01-09"
    )
    assert windows.origins.tolist() == [8, 9]
    assert windows[0][0]["history"].shape[-1] == 1  # time is no target
    every = ForecastWindows(table(), 4, 3, stride=2)
    assert every.origins.tolist() == [4, 6, 8]


@once
def test_several_series_mixed():
    rng = np.random.default_rng(0)
    names = rng.permutation(np.repeat(["a", "b", "short"], [9, 8, 3]))
    values, times = np.zeros(20), np.zeros(20)
    for name, start in (("a", 0), ("b", 100), ("short", 500)):
        here = names == name
        values[here] = start + np.arange(here.sum())
        times[here] = np.arange(here.sum())
    made = {"x": values, "name": names, "t": times, "level": (names == "a") * 1.0}
    roles = {"series": "name", "time": "t", "static": "level", "known": "t"}
    windows = ForecastWindows(made, 4, 3, **roles, start=5)
    inputs, y = batches(windows)
    got = np.concatenate([inputs["history"], y], 1)[:, :, 0]
    firsts = [1, 2, 101]  # nothing across a border, and none of the short one
    np.testing.assert_array_equal(got, np.array(firsts)[:, None] + np.arange(7))
    np.testing.assert_array_equal(inputs["static"][:, 0], [1, 1, 0])
    np.testing.assert_array_equal(inputs["future"][:, 0, 0], [1, 2, 1])  # a number, too
    np.testing.assert_array_equal(values[windows.origins], np.add(firsts, 4))


@once
def test_shuffle():
    kwargs = {"batch_size": 7, "shuffle": True}
    windows, again = (ForecastWindows(table(40), 4, 3, seed=1, **kwargs) for _ in range(2))
    first = batches(windows)[1][:, 0, 0]
    np.testing.assert_array_equal(first, batches(again)[1][:, 0, 0])
    windows.on_epoch_end()
    second = batches(windows)[1][:, 0, 0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.sort(first))
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    np.testing.assert_array_equal(np.sort(first), windows.origins)


def test_fit():
    """The model's inputs as they come, with gaps in both; what follows is learnt."""
    hours = np.arange(400)
    x = np.sin(hours / 12 * np.pi)
    x[50:60] = x[200] = np.nan
    made = {"x": x, "hour": (hours % 24) / 24, "noise": np.random.default_rng(0).normal(size=400)}
    roles = {"targets": "x", "known": "hour", "observed": "noise"}
    parts = (
        ForecastWindows(made, 24, 6, **roles, stop=300, shuffle=True, seed=0),
        ForecastWindows(made, 24, 6, **roles, start=300, batch_size=64),
    )
    model = xLSTMForecaster(6, targets=1, patch_size=6, units=8, num_heads=2, seed=0)
    model.compile(keras.optimizers.Adam(0.01), ObservedLoss("mse"))
    model.jit_compile = BACKEND == "jax"
    losses = model.fit(parts[0], epochs=6, validation_data=parts[1], verbose=0).history["val_loss"]
    assert losses[-1] < 0.05
    assert model.predict(parts[1], verbose=0).shape == (95, 6, 1)


def twice(**columns):
    return {**table(), **columns}


@once
@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (table(), {"targets": "laod"}, "`targets` must name columns of the table.*load.*Received: 'laod'"),
        (table(), {"known": [0]}, "`known` must name columns.*Received: 0"),
        (table(), {"targets": "load", "known": "load"}, "one role.*'load' in `targets` and `known`"),
        (table(), {"known": ["hour", "hour"]}, "one role.*'hour' in `known` and `known`"),
        (table(), {"observed": list(table())}, "`targets` must name at least one column"),
        (table(), {"context": 0}, "`context` must be a positive integer"),
        (table(), {"horizon": 2.0}, "`horizon` must be a positive integer"),
        (table(), {"batch_size": "4"}, "`batch_size` must be a positive integer"),
        (table(), {"shuffle": 1}, "`shuffle` must be True or False"),
        (table(), {"context": 10}, "No window of 10 \\+ 3 steps fits.*up to 12 rows"),
        (table(), {"start": 11}, "No window .*start=11"),
        (table(), {"start": "2024-01-01"}, "`start` and `stop` must be values as those of `time`"),
        (table(), {"static": "hour"}, "static column 'hour' must have one value.*4 values"),
        (twice(day=np.arange(12)[::-1]), {"time": "day"}, "'day' must rise within each series.*11.* before .*10"),
        (twice(kind=np.array(["a"] * 12)), {"static": "kind"}, "'kind' must hold numbers.*categories"),
        (twice(load=np.full(12, np.inf)), {}, "'load' must hold finite numbers, or NaN"),
        (twice(load=np.ones(5)), {}, "columns of one length.*'load': 5"),
        (np.ones(12), {}, "`table` must be an array .rows, columns.*shape .12,"),
        (np.ones((0, 2)), {}, "at least one row"),
        ("table.csv", {}, "`table` must be an array"),
    ],
)  # fmt: skip
def test_bad_arguments(made, options, message):
    with pytest.raises(ValueError, match=message):
        ForecastWindows(made, **{"context": 4, "horizon": 3, **options})


@once
def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="batchsize"):
        ForecastWindows(table(), 4, 3, batchsize=3)


@once
def test_no_frame_library_is_imported():
    """Frames are taken as they come: the module needs NumPy and Keras."""
    module = importlib.import_module("keras_xlstm.windows")
    assert not {"pandas", "polars"} & set(vars(module))
