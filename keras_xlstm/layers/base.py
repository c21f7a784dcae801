"""A layer that starts from a state and returns one: what all layers of the package share."""

import keras
from keras import ops


class StateLayer(keras.layers.Layer):
    """Checks of inputs, masks and states.

    A subclass sets `state_names` and defines `_state_shapes(batch_size)`.
    """

    state_names = ()

    def __init__(self, **kwargs):
        # States stay float32 under mixed precision only if Keras does not cast call arguments.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def state_dtype(self):
        """float32, or float64 for a float64 layer."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def get_initial_state(self, batch_size):
        """A fresh state: zeros."""
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

    def _check(self, sequences):
        dtype = keras.backend.standardize_dtype(sequences.dtype)
        if "float" not in dtype:
            raise ValueError(
                f"{type(self).__name__} takes floating-point sequences. Received: dtype {dtype}. "
                "Embed token ids with keras.layers.Embedding, or cast counts to float32."
            )

    def _check_mask(self, mask, sequences):
        fits = len(mask.shape) == 2 and all(
            a == b
            for a, b in zip(mask.shape, sequences.shape[:2], strict=True)
            if isinstance(a, int) and isinstance(b, int)
        )
        if not fits:
            raise ValueError(
                "`mask` must have shape (batch, time), True for real steps. Received: mask shape "
                f"{tuple(mask.shape)} for sequences of shape {tuple(sequences.shape)}."
            )
        return ops.cast(mask, "bool")

    def _initial_state(self, sequences, state):
        """The given state, checked; None for a fresh start."""
        if state is None:
            return None
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
            got = tuple(value.shape)
            fits = len(got) == len(shape) and all(
                a == b
                for a, b in zip(got, shape, strict=True)
                if isinstance(a, int) and isinstance(b, int)
            )
            if not fits:
                raise ValueError(
                    f"`initial_state` {name} of {type(self).__name__} must have shape {shape}. "
                    f"Received: shape {got}. The order is ({names})."
                )
        return [ops.cast(s, self.state_dtype) for s in state]
