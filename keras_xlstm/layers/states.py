"""States of the sLSTM that did not come from one."""

import sys
from typing import Any

import keras
from keras import ops

from keras_xlstm import backends


def state_from_lstm(h: Any, c: Any) -> list[Any]:
    """The state of an `sLSTM` or `sLSTMCell` that remembers what an LSTM's h and c hold.

    The sLSTM's memory is c / n, and n = 0 says that nothing is remembered: beside h and c it needs
    n = 1 and m = 0. Use it where the two states of a `keras.layers.LSTM`, or of Dense layers that
    make them, start an sLSTM.

    Args:
        h: hidden state, (batch, units), floating point; symbolic in a functional model.
        c: memory, (batch, units).

    Returns:
        `[h, c, n, m]`, each (batch, units), for `initial_state`.

    Example:

    >>> h, c = np.zeros((2, 4), "float32"), np.ones((2, 4), "float32")
    >>> state = keras_xlstm.layers.state_from_lstm(h, c)
    >>> keras_xlstm.layers.sLSTM(4)(np.ones((2, 5, 3)), initial_state=state).shape
    (2, 4)
    """
    return [h, c, ops.ones_like(c), ops.zeros_like(c)]


def contradictions_as_nan(h, c, n, m):
    """A state whose values are not at hand to be refused, in a compiled step: c is NaN where n says
    that there is none, so that it shows in the loss."""
    if backends.host_values(n) is None:
        c = ops.where((n < 0) | ((n == 0) & (c != 0)), float("nan"), c)
    return [h, c, n, m]


def given_to_rnn(cell):
    """The initial state that the `keras.layers.RNN` around a cell was called with, or None: on JAX
    its loop traces the cell, which then sees no values."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "call":
            rnn, state = (frame.f_locals.get(name) for name in ("self", "initial_state"))
            if isinstance(rnn, keras.layers.RNN) and isinstance(state, (list, tuple)):
                cells = getattr(rnn.cell, "cells", None)
                if cells is None:
                    return state if rnn.cell is cell else None
                return next((s for c, s in zip(cells, state, strict=False) if c is cell), None)
        frame = frame.f_back
    return None
