"""A layer that starts from a state and returns one: what all layers of the package share."""

import functools

import keras
from keras import ops

from keras_xlstm.masks import steps_mask
from keras_xlstm.validation import check_flag, check_floating, check_state_values


class Rematerialized:
    """A layer whose `call` computes again in the backward pass where `remat` is True.

    `keras.RematScope` sets it, too: its own way takes `training` for a tensor on JAX, cannot be
    traced on TensorFlow and would draw dropouts a second time.
    """

    remat = False

    def rematerialized_call(self, layer_call, *args, **kwargs):
        if super().rematerialized_call(layer_call, *args, **kwargs) is layer_call:
            return layer_call  # the scope leaves this layer out

        @functools.wraps(layer_call)
        def call(*args, **kwargs):
            before, self.remat = self.remat, True
            try:
                return layer_call(*args, **kwargs)
            finally:
                self.remat = before

        return call


def plain():
    """Layers made inside are computed once, under `keras.RematScope`, too: what they are parts of
    is computed again as a whole."""
    return keras.RematScope(mode=None)


class StateLayer(Rematerialized, keras.layers.Layer):
    """Checks of inputs, masks and states.

    A subclass sets `state_names` and defines `_state_shapes(batch_size)`.
    """

    state_names = ()

    def __init__(self, **kwargs):
        # States stay float32 under mixed precision only if Keras does not cast call arguments.
        super().__init__(autocast=False, **kwargs)
        check_floating(self)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def state_dtype(self):
        """float32, or float64 for a float64 layer."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def get_initial_state(self, batch_size):
        """A fresh state: zeros."""
        if batch_size is None:
            raise ValueError(
                f"{type(self).__name__}.get_initial_state needs a batch size. Received: "
                "batch_size=None. In a functional model leave `initial_state` out: the layer "
                "starts empty by itself."
            )
        return [ops.zeros(shape, self.state_dtype) for shape in self._state_shapes(batch_size)]

    def _known_features(self, shape):
        if shape[-1] is None:
            raise ValueError(
                f"The last dimension of the input of {type(self).__name__} must be known. "
                f"Received: input shape {tuple(shape)}. Give it in keras.Input."
            )
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: shape[-1]})
        return shape[-1]

    def _drawn(self, shape, rate, dtype):
        return keras.random.dropout(ops.ones(shape, dtype), rate, seed=self.seed_generator)

    def _check(self, sequences, state=None, mask=None, return_state=None):
        """Refuses what a call cannot honour, symbolic tensors too: before a model is trained."""
        dtype = keras.backend.standardize_dtype(sequences.dtype)
        if "float" not in dtype:
            raise ValueError(
                f"{type(self).__name__} takes floating-point sequences. Received: dtype {dtype}. "
                "Embed token ids with keras.layers.Embedding, or cast counts to float32."
            )
        if isinstance(sequences.shape[1], int) and sequences.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__} needs at least one time step. Received: sequences of shape "
                f"{tuple(sequences.shape)}."
            )
        if state is not None:
            self._check_state(state, sequences)
        if mask is not None:
            self._check_mask(mask, sequences)
        if return_state is not None:
            check_flag("return_state", return_state)

    def _check_mask(self, mask, sequences):
        if not _fits(steps_mask(mask), sequences.shape[:2]):
            raise ValueError(
                "`mask` must have shape (batch, time), True for real steps. Received: mask "
                f"{_described(mask)} for sequences of shape {tuple(sequences.shape)}."
            )

    def _check_state(self, state, sequences):
        self._check_state_shapes(state, sequences)
        values = dict(zip(self.state_names, state, strict=True))
        check_state_values(f"`initial_state` of {type(self).__name__}", values)

    def _check_state_shapes(self, state, sequences):
        names = ", ".join(self.state_names)
        if not isinstance(state, (list, tuple)) or len(state) != len(self.state_names):
            got = (
                f"{len(state)} tensors"
                if isinstance(state, (list, tuple))
                else type(state).__name__
            )
            raise ValueError(
                f"`initial_state` of {type(self).__name__} must be a list of the "
                f"{len(self.state_names)} tensors ({names}), as `return_state=True` returns them. "
                f"Received: {got}."
            )
        shapes = self._state_shapes(sequences.shape[0])
        for name, value, shape in zip(self.state_names, state, shapes, strict=True):
            if not _fits(value, shape):
                raise ValueError(
                    f"`initial_state` {name} of {type(self).__name__} must have shape {shape}. "
                    f"Received: {_described(value)}. The order is ({names})."
                )
            dtype = keras.backend.standardize_dtype(value.dtype)
            if "float" not in dtype:
                raise ValueError(
                    f"`initial_state` {name} of {type(self).__name__} must be floating-point. "
                    f"Received: dtype {dtype}. Cast it to {self.state_dtype}."
                )

    def _initial_state(self, state):
        """In the dtype of states; None for a fresh start."""
        return None if state is None else [ops.cast(s, self.state_dtype) for s in state]


def _fits(value, shape):
    """Whether a tensor may have this shape, as far as sizes are known."""
    got = getattr(value, "shape", None)
    return (
        got is not None
        and len(got) == len(shape)
        and all(
            a == b
            for a, b in zip(got, shape, strict=True)
            if isinstance(a, int) and isinstance(b, int)
        )
    )


def _described(value):
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"shape {tuple(shape)}"
