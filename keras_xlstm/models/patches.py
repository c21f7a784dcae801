"""Patches of a window's steps, as the features that a stack reads."""

import keras
import numpy as np
from keras import ops


def zero_gaps(x):
    """0 for NaN."""
    # tf2onnx multiplies by every condition but isnan itself, and NaN times 0 is NaN.
    return ops.where(ops.isnan(x), ops.zeros_like(x), x)


def filled(x):
    """0 for NaN, and beside it, on the last axis, 1 for what is there."""
    flags = ops.cast(ops.logical_not(ops.isnan(x)), x.dtype)
    return ops.concatenate([zero_gaps(x), flags], axis=-1)


class Patches(keras.layers.Layer):
    """Patches of the history, then of the horizon, for each target: (batch, targets, patches,
    units).

    A patch is the sum of linear maps of what is there of its steps: the target's own values, the
    covariates', what is known ahead; of the static features; and of vectors of the target and the
    patch's place. What is not there is 0, and flagged. The horizon is a gap of the values.

    Args:
        shapes: of the inputs, as `xLSTMForecaster` names them.
        horizon: its steps.
        targets: how many of the history's first channels are targets.
        size: steps of a patch.
        units: features of a patch.
    """

    def __init__(self, shapes, horizon, targets, size, units, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.time, channels = shapes["history"][1:]
        self.horizon, self.targets, self.size, self.units = horizon, targets, size, units
        self.before, self.ahead = -(-self.time // size), -(-horizon // size)
        known, static = (shapes.get(name, (0,))[-1] for name in ("future", "static"))
        self.values = self._dense("values", 2 * size)  # twice: with flags
        self.covariates = self._dense("covariates", 2 * size * (channels - targets))
        self.known = self._dense("known", 2 * size * known)
        self.static = self._dense("static", 2 * static)
        self.channels = self._embedding("channels", targets)
        self.places = self._embedding("places", self.before + self.ahead)
        self.built = True

    def _dense(self, name, features):
        """A built Dense of so many features, None of none."""
        if not features:
            return None
        layer = keras.layers.Dense(self.units, dtype=self.dtype_policy, name=name)
        layer.build((None, features))
        return layer

    def _embedding(self, name, count):
        layer = keras.layers.Embedding(count, self.units, dtype=self.dtype_policy, name=name)
        layer.build(())
        return layer

    def call(self, inputs):
        count = self.before + self.ahead
        values, covariates = (
            self._whole(inputs["history"][:, :, part], 0)
            for part in (slice(0, self.targets), slice(self.targets, None))
        )
        values = ops.transpose(values, (0, 2, 1))
        x = self.values(filled(ops.reshape(values, (-1, self.targets, count, self.size))))
        # From 0 by name: jax2onnx does not read arange of one argument.
        x += self.channels(ops.arange(0, self.targets))[None, :, None]
        x += self.places(ops.arange(0, count))[None, None]
        if self.covariates is not None:
            x += self._shared(self.covariates, covariates)
        if self.known is not None:
            known = inputs["future"]
            start = self.time + self.horizon - known.shape[1]
            x += self._shared(self.known, self._whole(known, start))
        if self.static is not None:
            x += self.static(filled(inputs["static"]))[:, None, None]
        return x

    def _whole(self, x, start):
        """Steps from `start` on, and NaN around them: as many as all patches have."""
        before = self.before * self.size - self.time + start
        behind = (self.before + self.ahead) * self.size - before - x.shape[1]
        return ops.pad(x, ((0, 0), (before, behind), (0, 0)), constant_values=np.nan)

    def _shared(self, dense, x):
        """By all targets."""
        x = ops.reshape(x, (-1, self.before + self.ahead, self.size * x.shape[-1]))
        return dense(filled(x))[:, None]
