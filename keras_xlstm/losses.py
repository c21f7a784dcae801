"""Losses of forecasts, which leave out targets that are missing."""

import keras
import numpy as np
from keras import ops

from keras_xlstm.validation import check_quantiles, one_of

__all__ = ["ObservedLoss", "PinballLoss"]


def _agree(shape, other):
    """Whether two shapes may be one, their batches aside, as far as sizes are known."""
    pairs = list(zip(shape[1:], other[1:], strict=False))
    return len(shape) == len(other) and all(a == b or None in (a, b) for a, b in pairs)


class _OfObserved(keras.losses.Loss):
    """The mean over the targets that are not NaN. A subclass defines `losses`, one a target."""

    def call(self, y_true, y_pred):
        observed = ops.logical_not(ops.isnan(y_true))
        # Filled before: where alone keeps NaN out of a value, not out of its gradient.
        losses = self.losses(ops.where(observed, y_true, ops.zeros_like(y_true)), y_pred)
        losses = ops.where(observed, losses, ops.zeros_like(losses))
        if self.reduction in (None, "none", "sum"):
            return losses
        count = ops.sum(ops.cast(observed, losses.dtype))  # Keras will divide by all of them
        return losses * (ops.cast(ops.size(losses), losses.dtype) / ops.maximum(count, 1.0))


@keras.saving.register_keras_serializable(package="keras_xlstm")
class PinballLoss(_OfObserved):
    """The loss that the quantiles of a distribution minimise, a mean over quantiles and targets.

    Of quantile q, target y and forecast f: max(q (y - f), (q - 1) (y - f)).
    [Regression Quantiles](https://doi.org/10.2307/1913643), with q for the paper's θ.

    Args:
        quantiles: as in `xLSTMForecaster`: rising numbers between 0 and 1.
        **kwargs: `name`, `reduction`, `dtype`.

    Call arguments:
        y_true: targets (...). NaN: not there, and left out.
        y_pred: forecasts (..., quantiles).

    Raises:
        ValueError: for quantiles that are none, or forecasts of another number of them.

    Example:

    >>> loss = keras_xlstm.losses.PinballLoss([0.1, 0.9])
    >>> value = loss(np.array([[3.0, np.nan]]), np.array([[[1.0, 2.0], [5.0, 5.0]]]))
    >>> round(float(value), 3)
    0.55
    """

    def __init__(self, quantiles, name="pinball", **kwargs):
        super().__init__(name=name, **kwargs)
        self.quantiles = check_quantiles(quantiles)

    def losses(self, y, forecast):
        if not _agree(tuple(forecast.shape), (*y.shape, len(self.quantiles))):
            raise ValueError(
                f"PinballLoss of {len(self.quantiles)} quantiles takes targets (...) and forecasts "
                f"(..., {len(self.quantiles)}). Received: targets {tuple(y.shape)}, forecasts "
                f"{tuple(forecast.shape)}. Give the model the same `quantiles`, and as many "
                "targets."
            )
        q = ops.convert_to_tensor(np.array(self.quantiles), forecast.dtype)
        error = y[..., None] - forecast
        return ops.mean(ops.maximum(q * error, (q - 1) * error), axis=-1)

    def get_config(self):
        return {**super().get_config(), "quantiles": list(self.quantiles)}


@keras.saving.register_keras_serializable(package="keras_xlstm")
class ObservedLoss(_OfObserved):
    """A loss of Keras's, taken over the targets that are there.

    Args:
        loss: its name: `"mse"`, `"mae"`, `"mape"`, `"msle"`, `"huber"` or `"log_cosh"`.
        **kwargs: `name`, `reduction`, `dtype`.

    Call arguments:
        y_true: targets (...). NaN: not there, and left out.
        y_pred: forecasts of the same shape.

    Raises:
        ValueError: for another name, or forecasts of another shape.

    Example:

    >>> loss = keras_xlstm.losses.ObservedLoss("mse")
    >>> float(loss(np.array([[3.0, np.nan]]), np.array([[1.0, 5.0]])))
    4.0
    """

    def __init__(self, loss="mse", name="observed", **kwargs):
        super().__init__(name=name, **kwargs)
        one_of("loss", loss, ("mse", "mae", "mape", "msle", "huber", "log_cosh"))
        self.loss = loss

    def losses(self, y, forecast):
        if not _agree(tuple(forecast.shape), tuple(y.shape)):
            raise ValueError(
                "ObservedLoss takes targets and forecasts of one shape. Received: targets "
                f"{tuple(y.shape)}, forecasts {tuple(forecast.shape)}. For forecasts of quantiles "
                "take keras_xlstm.losses.PinballLoss."
            )
        # Each is a mean over the last axis.
        return keras.losses.get(self.loss)(y[..., None], forecast[..., None])

    def get_config(self):
        return {**super().get_config(), "loss": self.loss}
