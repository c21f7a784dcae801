"""Windows of long tables, to train forecasters on."""

import itertools

import keras
import numpy as np

from keras_xlstm.validation import check_flag, check_positive

__all__ = ["ForecastWindows"]


class _Table:
    """Columns by name, of an array, a dict of columns, or a frame of pandas or polars."""

    def __init__(self, table):
        if hasattr(table, "columns"):
            self.names = list(table.columns)
            self._column = lambda name: table[name]
        elif isinstance(table, dict):
            self.names = list(table)
            self._column = table.__getitem__
        else:
            table = np.asarray(table)
            if table.ndim != 2:
                raise ValueError(
                    "`table` must be an array (rows, columns), a dict of columns, or a frame of "
                    f"pandas or polars. Received: an array of shape {table.shape}."
                )
            self.names = list(range(table.shape[1]))
            self._column = lambda index: table[:, index]
        self.rows = len(self.raw(self.names[0])) if self.names else 0
        lengths = {name: len(self.raw(name)) for name in self.names}
        if len(set(lengths.values())) != 1 or not self.rows:
            raise ValueError(
                "`table` must have columns of one length, and at least one row. Received: "
                f"{lengths}."
            )

    def raw(self, name):
        return np.asarray(self._column(name))

    def numbers(self, names):
        """(rows, columns) float32 of numeric columns; what is missing is NaN."""
        found = np.empty((self.rows, len(names)), "float32")
        for index, name in enumerate(names):
            column = self._column(name)
            try:
                if hasattr(column, "isna"):  # pandas: its own way to turn NA into NaN
                    column = column.astype("float64")
                found[:, index] = np.asarray(column, "float64")
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The column {name!r} must hold numbers. Received: {error}. Number categories, "
                    "or leave the column out of the roles."
                ) from None
            if np.isinf(found[:, index]).any():
                raise ValueError(
                    f"The column {name!r} must hold finite numbers, or NaN where one is missing. "
                    "Received: inf, or a number too large for float32."
                )
        return found


def _roles(names, **roles):
    """The columns of each role, as lists. Each is there, and is given to the model once."""
    taken = {}
    for role, columns in roles.items():
        single = columns is None or isinstance(columns, (str, int))
        roles[role] = columns = [] if columns is None else [columns] if single else list(columns)
        for column in columns:
            if column not in names:
                raise ValueError(
                    f"`{role}` must name columns of the table: {names}. Received: {column!r}."
                )
            if role in ("series", "time"):
                continue
            if column in taken:
                raise ValueError(
                    f"A column has one role, beside `series` or `time`. Received: {column!r} in "
                    f"`{taken[column]}` and `{role}`."
                )
            taken[column] = role
    return roles


class ForecastWindows(keras.utils.PyDataset):
    """Windows of one or several long series, as `xLSTMForecaster` takes them, batch by batch.

    A window is `context` rows of history and the `horizon` rows behind them. Nothing is copied
    beforehand. Rows are steps: they stand in order, and a step that is missing is a row of NaN.

    Args:
        table: an array (rows, columns), whose columns are named 0, 1, ...; a dict of columns; or a
            pandas or polars DataFrame.
        context: steps of the history.
        horizon: steps to forecast.
        targets: columns to forecast; None takes all that have no other role.
        observed: columns that are known of the history alone.
        known: columns that are known ahead, as the hour of the day.
        static: columns with one value for a whole series.
        series: the column that tells series apart: their rows may be mixed, and no window crosses
            from one into another. None: one series.
        time: a column that must rise within each series, in which `start` and `stop` are given.
        start, stop: windows whose targets lie from `start` up to, not including, `stop`; their
            history may lie before. Values of `time`; without it, rows of each series, from 0.
        stride: steps from a window to the next.
        batch_size: windows in a batch; the last has the rest.
        shuffle: whether each epoch draws the windows in an order of its own.
        seed: of that order.
        **kwargs: of `keras.utils.PyDataset`: `workers`, `use_multiprocessing`, `max_queue_size`.

    A batch is `(inputs, y)`, float32: `{"history": (batch, context, targets + observed), "future":
    (batch, context + horizon, known), "static": (batch, static)}`, the latter two if there are
    such columns, and y (batch, horizon, targets). What is missing stays NaN: the model takes that,
    and the losses of `keras_xlstm.losses` leave it out of the targets, where Keras's own are NaN.

    `origins` are the rows of the table where the windows' targets begin, in the order of the
    batches without `shuffle`.

    Raises:
        ValueError: for columns that are not there, or have two roles, or do not hold what they
            must; if no window fits.

    Example:

    >>> table = {"load": np.arange(10.0), "hour": np.arange(10.0) % 24}
    >>> windows = keras_xlstm.windows.ForecastWindows(table, 4, 2, known="hour", batch_size=3)
    >>> inputs, y = windows[0]
    >>> inputs["history"].shape
    (3, 4, 1)
    >>> inputs["future"].shape
    (3, 6, 1)
    >>> y[0, :, 0]
    array([4., 5.], dtype=float32)
    """

    def __init__(
        self,
        table,
        context,
        horizon,
        targets=None,
        observed=(),
        known=(),
        static=(),
        series=None,
        time=None,
        start=None,
        stop=None,
        stride=1,
        batch_size=32,
        shuffle=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        sizes = {"context": context, "horizon": horizon, "stride": stride, "batch_size": batch_size}
        for name, value in sizes.items():
            check_positive(name, value)
        self.context, self.horizon, self.batch_size = context, horizon, batch_size
        table = _Table(table)
        roles = {"observed": observed, "known": known, "static": static}
        roles = _roles(table.names, targets=targets, **roles, series=series, time=time)
        if targets is None:
            others = {column for columns in roles.values() for column in columns}
            roles["targets"] = [name for name in table.names if name not in others]
        if not roles["targets"]:
            raise ValueError("`targets` must name at least one column. Received: none.")
        rows, borders = self._sorted_rows(table, roles)
        parts = {role: table.numbers(roles[role])[rows] for role in ("targets", *self._covariates)}
        self._y, self._known, self._static = parts["targets"], parts["known"], parts["static"]
        self._history = np.concatenate([parts["targets"], parts["observed"]], axis=1)
        places = self._places(table, roles, rows, borders)
        starts = self._starts(places, borders, start, stop, stride)
        self._check_static(roles["static"], borders)
        self._starts_at, self.origins = starts, rows[starts]
        self._generator = np.random.default_rng(seed) if check_flag("shuffle", shuffle) else None
        self._order = np.arange(len(starts))
        self.on_epoch_end()

    _covariates = "observed", "known", "static"

    @staticmethod
    def _sorted_rows(table, roles):
        """Rows of the table, series by series, and where in them each series begins and ends."""
        if not roles["series"]:
            return np.arange(table.rows), [(0, table.rows)]
        _, ids = np.unique(table.raw(roles["series"][0]), return_inverse=True)
        rows = np.argsort(ids, kind="stable")
        edges = [0, *(np.flatnonzero(np.diff(ids[rows])) + 1), table.rows]
        return rows, list(itertools.pairwise(edges))

    @staticmethod
    def _places(table, roles, rows, borders):
        """Of each row its time, or its number within its series."""
        if not roles["time"]:
            return np.concatenate([np.arange(end - begin) for begin, end in borders])
        times = table.raw(roles["time"][0])[rows]
        for begin, end in borders:
            falls = np.flatnonzero(~(times[begin + 1 : end] > times[begin : end - 1]))
            if len(falls):
                at = begin + falls[0]
                raise ValueError(
                    f"The column {roles['time'][0]!r} must rise within each series. Received: "
                    f"{times[at]!r} before {times[at + 1]!r}. Sort the table; if it holds several "
                    "series, name the column that tells them apart, `series`."
                )
        return times

    def _starts(self, places, borders, start, stop, stride):
        """Where windows' targets begin: all of a window lies in one series, and all of its targets
        from `start` to before `stop`."""
        inside = np.ones(len(places), bool)
        try:
            if start is not None:
                inside &= places >= np.asarray(start, places.dtype)
            if stop is not None:
                inside &= places < np.asarray(stop, places.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`start` and `stop` must be values as those of `time`, dtype {places.dtype}. "
                f"Received: start={start!r}, stop={stop!r} ({error})."
            ) from None
        found = []
        for begin, end in borders:
            at = np.arange(begin + self.context, end - self.horizon + 1)
            at = at[inside[at] & inside[at + self.horizon - 1]]
            found.append(at[::stride])
        found = np.concatenate(found)
        if not len(found):
            longest = max(end - begin for begin, end in borders)
            raise ValueError(
                f"No window of {self.context} + {self.horizon} steps fits. Received: "
                f"{len(borders)} series of up to {longest} rows, start={start!r}, stop={stop!r}. "
                "Take a shorter `context` or `horizon`, or put rows of NaN in front."
            )
        return found

    def _check_static(self, names, borders):
        for begin, end in borders:
            part = self._static[begin:end]
            for name, column, first in zip(names, part.T, part[0], strict=True):
                if not ((column == first) | (np.isnan(column) & np.isnan(first))).all():
                    raise ValueError(
                        f"The static column {name!r} must have one value for a whole series. "
                        f"Received: {len(np.unique(column))} values in one. Give it to `observed` "
                        "or `known`."
                    )

    def __len__(self):
        return -(-len(self._order) // self.batch_size)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: index {index}.")
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        at = self._starts_at[chosen, None]
        before, ahead = at + np.arange(-self.context, 0), at + np.arange(self.horizon)
        inputs = {"history": self._history[before]}
        if self._known.shape[1]:
            inputs["future"] = self._known[np.concatenate([before, ahead], axis=1)]
        if self._static.shape[1]:
            inputs["static"] = self._static[at[:, 0]]
        return inputs, self._y[ahead]

    def on_epoch_end(self):
        """Draws the order of the next epoch, with `shuffle`."""
        if self._generator is not None:
            self._order = self._generator.permutation(len(self._order))
