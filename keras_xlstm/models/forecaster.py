"""xLSTMForecaster: the next steps of series, from those before and from what is known ahead."""

import keras
import numpy as np
from keras import ops

from keras_xlstm.layers.base import plain
from keras_xlstm.models.forecast_inputs import (
    check_call,
    check_shapes,
    future_of_rolls,
    named,
    shapes_of,
)
from keras_xlstm.models.patches import Patches, zero_gaps
from keras_xlstm.models.stack import xLSTMStack
from keras_xlstm.validation import check_flag, check_positive, check_quantiles, check_rate


def instance_scale(x):
    """Mean and deviation of what is not NaN of (batch, time, channels): (batch, 1, channels) each.

    A channel that does not change, or that was never observed, has the deviation 1.
    """
    observed = ops.cast(ops.logical_not(ops.isnan(x)), x.dtype)
    count = ops.maximum(ops.sum(observed, 1, keepdims=True), 1.0)
    mean = ops.sum(zero_gaps(x), 1, keepdims=True) / count
    apart = zero_gaps(x - mean)
    variance = ops.sum(apart * apart, 1, keepdims=True) / count
    changes = variance > ops.square(1e-6 * mean)  # rounding is no change
    # Not the root of 0, whose gradient is none.
    return mean, ops.sqrt(ops.where(changes, variance, ops.ones_like(variance)))


def spread(y, centre):
    """Quantiles that never cross, of as many numbers: the one at `centre`, and the gaps."""
    gaps = ops.softplus(y[..., 1:])
    above = ops.concatenate([ops.zeros_like(y[..., :1]), ops.cumsum(gaps, axis=-1)], axis=-1)
    return y[..., :1] + above - above[..., centre : centre + 1]


@keras.saving.register_keras_serializable(package="keras_xlstm")
class xLSTMForecaster(keras.Model):
    """Forecasts of many series by one model, from their history and from what is known ahead.

    Every channel is normalised by its own mean and deviation over the window, and its forecast
    is scaled back ([RevIN](https://openreview.net/forum?id=cGDAkQo1C0p), without weights). A
    linear map goes from all steps of a channel to its horizon
    ([NLinear](https://arxiv.org/abs/2205.13504)). Beside it an `xLSTMStack` reads patches of
    `patch_size` steps ([PatchTST](https://arxiv.org/abs/2211.14730)): those of the history, then
    those of the horizon, where only what is known ahead is there. Its output at the latter is
    added. All channels share the weights, apart from a vector each.

    The model is built by the first shapes that it sees, as `keras.Sequential` is: their time,
    channels and features are then fixed.

    Args:
        horizon: steps to forecast.
        quantiles: None for one number a step, or rising numbers between 0 and 1, as
            `[0.1, 0.5, 0.9]`. They never cross.
        targets: how many of the history's first channels are forecast; the others are only read.
            None: all are forecast.
        patch_size: steps that the stack reads at once; 1: each by itself.
        units: width of the stack.
        num_blocks: blocks of the stack.
        num_heads: heads of every block.
        dropout: fraction of the blocks' contributions, and of the stack's output, to drop.
        linear: whether the linear map is there.
        stack_options: further arguments of the `xLSTMStack`, as `{"pattern": "1:1"}`. None: sLSTM
            blocks alone.
        seed: of the dropouts.
        **kwargs: `name`, `dtype`, `trainable`.

    Inputs: the history alone, or a dict with

    - `"history"`: (batch, time, channels), floating-point. NaN: not observed.
    - `"mask"`: if wanted, (batch, time) or (batch, time, channels), True or 1: observed.
    - `"future"`: if wanted, what is known ahead: (batch, horizon, features), or (batch, time +
      horizon, features) where it is known of the history's steps too. Not normalised.
    - `"static"`: if wanted, (batch, features) of the whole series. Not normalised.

    NaN in `"future"` and `"static"`: not known.

    Output: (batch, horizon, targets), or (batch, horizon, targets, quantiles), float32 (float64
    under a policy of float64).

    Raises:
        ValueError: where an argument cannot be honoured, or inputs do not fit those that the model
            was built for.

    Example:

    >>> model = keras_xlstm.models.xLSTMForecaster(horizon=12, quantiles=[0.1, 0.5, 0.9])
    >>> model.compile("adam", keras_xlstm.losses.PinballLoss(model.quantiles))
    >>> history = np.sin(np.arange(96.0)).reshape(2, 48, 1)
    >>> model(history).shape
    (2, 12, 1, 3)
    >>> model.forecast(history, steps=30).shape
    (2, 30, 1, 3)
    """

    def __init__(
        self,
        horizon,
        quantiles=None,
        targets=None,
        patch_size=16,
        units=64,
        num_blocks=1,
        num_heads=4,
        dropout=0.2,
        linear=True,
        stack_options=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the statistics of large numbers, in float32
        check_positive("horizon", horizon)
        check_positive("patch_size", patch_size)
        if targets is not None:
            check_positive("targets", targets)
        if not isinstance(stack_options, (dict, type(None))):
            raise ValueError(
                "`stack_options` must be a dict of arguments of xLSTMStack, or None. Received: "
                f"stack_options={stack_options!r}."
            )
        self.settings = {
            "horizon": horizon,
            "quantiles": None if quantiles is None else check_quantiles(quantiles),
            "targets": targets,
            "patch_size": patch_size,
            "units": units,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "dropout": check_rate("dropout", dropout),
            "linear": check_flag("linear", linear),
            "stack_options": None if stack_options is None else dict(stack_options),
            "seed": seed,
        }
        self.horizon, self.quantiles = horizon, self.settings["quantiles"]
        options = {"dropout": dropout, "seed": seed, "dtype": self.dtype_policy, "name": "stack"}
        options |= {"pattern": "0:1"} if stack_options is None else stack_options
        self.stack = xLSTMStack(units, num_blocks, num_heads, **options)

    @property
    def _work_dtype(self):
        return "float64" if self.compute_dtype == "float64" else "float32"

    # ------------------------------------------------------------------ building

    def build(self, input_shape):
        self._shapes = shapes_of(input_shape)
        check_shapes(self._shapes, self.horizon, self.settings["targets"])
        time, channels = self._shapes["history"][1:]
        self._targets = self.settings["targets"] or channels
        units, size = self.settings["units"], self.settings["patch_size"]
        zeros = {"kernel_initializer": "zeros", "dtype": self.dtype_policy}
        with plain():
            self.patches = Patches(
                self._shapes, self.horizon, self._targets, size, units, dtype=self.dtype_policy
            )
            self.drop = keras.layers.Dropout(
                self.settings["dropout"], seed=self.settings["seed"], dtype=self.dtype_policy
            )
            self.head = keras.layers.Dense(size * len(self.quantiles or [0]), name="head", **zeros)
            self.head.build((None, None, units))
            self.linear_map = None
            if self.settings["linear"]:
                self.linear_map = keras.layers.Dense(self.horizon, name="linear", **zeros)
                self.linear_map.build((None, None, time))
        self.built = True

    @property
    def input(self):
        """The symbolic inputs that the model was built for."""
        return {
            name: keras.Input(
                shape[1:], dtype="bool" if name == "mask" else self._work_dtype, name=name
            )
            for name, shape in self._shapes.items()
        }

    @property
    def inputs(self):
        """`input` as a list."""
        return keras.tree.flatten(self.input)

    # ------------------------------------------------------------------ calling

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(named(inputs), *args, **kwargs)

    def call(self, inputs, training=None):
        inputs = named(inputs)
        check_call(inputs, self._shapes)
        mask = inputs.pop("mask", None)
        inputs = {name: ops.cast(x, self._work_dtype) for name, x in inputs.items()}
        history = inputs["history"]
        if mask is not None:
            # Cast: a SavedModel of TensorFlow traces every input of a model as float.
            mask = ops.cast(mask if len(mask.shape) == 3 else mask[:, :, None], "bool")
            history = ops.where(mask, history, np.nan)
        mean, deviation = instance_scale(history)
        values = (history - mean) / deviation
        y = self._by_stack({**inputs, "history": values}, training)
        targets = slice(0, self._targets)
        if self.linear_map is not None:
            values = zero_gaps(ops.transpose(values[:, :, targets], (0, 2, 1)))
            centre = ops.cast(self.linear_map(values), y.dtype)[..., None]
            y = ops.concatenate([y[..., :1] + centre, y[..., 1:]], axis=-1)
        if self.quantiles is not None:
            y = spread(y, self._centre)
        y = ops.transpose(y, (0, 2, 1, 3))
        y = y * deviation[:, :, targets, None] + mean[:, :, targets, None]
        return y if self.quantiles is not None else y[..., 0]

    @property
    def _centre(self):
        """Of the quantiles, the one next to the median."""
        return int(np.argmin(np.abs(np.array(self.quantiles) - 0.5)))

    def _by_stack(self, inputs, training):
        """(batch, targets, horizon, numbers): what the stack says at the horizon's patches."""
        x = self.patches(inputs)
        count, units = x.shape[2:]
        x = self.stack(ops.reshape(x, (-1, count, units)), training=training)
        x = self.head(self.drop(x[:, self.patches.before :], training=training))
        shape = (-1, self._targets, self.patches.ahead * self.patches.size)
        x = ops.reshape(x, (*shape, len(self.quantiles or [0])))
        return ops.cast(x[:, :, : self.horizon], self._work_dtype)

    def compute_output_spec(self, inputs, training=None):
        inputs = named(inputs)
        check_call(inputs, self._shapes)
        numbers = () if self.quantiles is None else (len(self.quantiles),)
        shape = (inputs["history"].shape[0], self.horizon, self._targets, *numbers)
        return keras.KerasTensor(shape, dtype=self._work_dtype)

    # ------------------------------------------------------------------ beyond the horizon

    def forecast(self, inputs, steps, batch_size=None):
        """Forecasts of any number of steps: each horizon's forecast is history for the next.

        Of quantiles, the one next to the median goes on as history: those of later horizons are
        for what follows if it comes true, and so too narrow. Channels that are not forecast are
        missing from there on.

        Args:
            inputs: as those of the model, NumPy arrays; `"future"` with `steps` steps in place of
                its horizon's.
            steps: how many.
            batch_size: as in `predict`.

        Returns:
            A NumPy array (batch, steps, targets) or (batch, steps, targets, quantiles).

        Raises:
            ValueError: for a model that is not built, or inputs that do not fit it.
        """
        check_positive("steps", steps)
        if not self.built:
            raise ValueError("The model is not built. Call it, or `fit` it, before `forecast`.")
        inputs = {name: np.asarray(x) for name, x in named(inputs).items()}
        rolls = [{}] * -(-steps // self.horizon)
        if "future" in inputs and "future" in self._shapes:
            known = future_of_rolls(inputs.pop("future"), self._shapes, steps, self.horizon)
            rolls = [{"future": x} for x in known]
        found = []
        for known in rolls:
            y = self.predict({**inputs, **known}, batch_size=batch_size, verbose=0)
            found.append(y)
            y = y if self.quantiles is None else y[..., self._centre]
            inputs = self._one_horizon_on(inputs, y)
        return np.concatenate(found, axis=1)[:, :steps]

    def _one_horizon_on(self, inputs, y):
        history = inputs["history"]
        others = np.full((*y.shape[:2], history.shape[2] - y.shape[2]), np.nan)
        new = {"history": np.concatenate([y, others], axis=2).astype(history.dtype)}
        if "mask" in inputs:
            new["mask"] = np.ones((*y.shape[:2], *inputs["mask"].shape[2:]), "bool")
        time = history.shape[1]
        moved = {n: np.concatenate([inputs[n], x], axis=1)[:, -time:] for n, x in new.items()}
        return {**inputs, **moved}

    def get_config(self):
        return {**super().get_config(), **self.settings}
