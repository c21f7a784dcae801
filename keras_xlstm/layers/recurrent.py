"""The call surface of `keras.layers.LSTM`, shared by sLSTM and mLSTM."""

import keras
from keras import ops

from keras_xlstm import backends
from keras_xlstm.compat import hands_masks_on
from keras_xlstm.layers.base import StateLayer
from keras_xlstm.masks import from_the_end, last_real_step, newest_of_all, steps_mask
from keras_xlstm.validation import (
    check_flag,
    check_heads,
    check_rate,
    check_use_kernel,
    freeze,
    load_variables,
    refuse_states,
)


class Recurrent(StateLayer):
    """A layer over time with a carried state; subclasses bring the weights and the recurrence.

    A subclass sets `state_names`, and defines `_state_shapes(batch_size)`, `_build(dim)` and
    `_run(sequences, state, mask, scale, return_state)`. That returns outputs and the new state.
    Outputs (B, T, units) repeat the last real one at masked steps; without `return_sequences` they
    are the last one (B, units). The state is None where `return_state` does not ask for it. `scale`
    is what `_recurrent_scale` drew.

    `keras.layers.RNN` cannot be the base: it has no place for a matrix state, casts states to the
    compute dtype and hides stateful variables from JAX.
    """

    def __init__(
        self,
        units,
        num_heads,
        dropout,
        seed,
        return_sequences,
        return_state,
        go_backwards,
        stateful,
        zero_output_for_mask,
        use_kernel,
        remat,
        activity_regularizer=None,
        **kwargs,
    ):
        check_heads(units, num_heads)
        super().__init__(
            activity_regularizer=keras.regularizers.get(activity_regularizer),
            **kwargs,
        )
        self.supports_masking = hands_masks_on()
        self.units = units
        self.num_heads = num_heads
        self.dropout = check_rate("dropout", dropout)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.return_sequences = check_flag("return_sequences", return_sequences)
        self.return_state = check_flag("return_state", return_state)
        self.go_backwards = check_flag("go_backwards", go_backwards)
        self.stateful = check_flag("stateful", stateful)
        self.zero_output_for_mask = check_flag("zero_output_for_mask", zero_output_for_mask)
        self.use_kernel = check_use_kernel(use_kernel)
        self.remat = check_flag("remat", remat)
        self.states = None

    # ------------------------------------------------------------------ shapes and states

    def build(self, sequences_shape, initial_state_shape=None):
        self._build(self._known_features(sequences_shape))
        freeze(self)
        if not self.stateful:
            return
        if sequences_shape[0] is None:
            raise ValueError(
                "`stateful=True` needs a batch size that is known. Received: input shape "
                f"{tuple(sequences_shape)}. Use keras.Input(batch_shape=(batch, time, features))."
            )
        shapes = self._state_shapes(sequences_shape[0])
        self.states = [
            # Tracked, unlike the states of keras.layers.RNN: they carry in JAX's fit and predict.
            self.add_weight(
                name=f"state_{name}", shape=shape, dtype=self.state_dtype, initializer="zeros",
                trainable=False, autocast=False,
            )
            for name, shape in zip(self.state_names, shapes, strict=True)
        ]  # fmt: skip

    def reset_state(self) -> None:
        """Empties the carried state of a `stateful` layer."""
        for variable in self.states or ():
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    def reset_states(self) -> None:
        """`reset_state`, under the name that keras.layers.LSTM also has."""
        self.reset_state()

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        output = self._output_shape(sequences_shape)
        if not self.return_state:
            return output
        return output, *self._state_shapes(output[0])

    def _output_shape(self, shape):
        batch, time, _ = shape
        return (batch, time, self.units) if self.return_sequences else (batch, self.units)

    def compute_output_spec(
        self,
        sequences,
        initial_state=None,
        mask=None,
        training=False,
        return_state=None,
        sequences_mask=None,
    ):
        mask = sequences_mask if mask is None else mask
        self._check(sequences, initial_state, mask, return_state)
        output = keras.KerasTensor(self._output_shape(sequences.shape), dtype=self.compute_dtype)
        if not (self.return_state if return_state is None else return_state):
            return output
        shapes = self._state_shapes(output.shape[0])
        return (output, *(keras.KerasTensor(s, dtype=self.state_dtype) for s in shapes))

    def _check(self, sequences, *arguments):
        super()._check(sequences, *arguments)
        batch = sequences.shape[0]
        if self.stateful and isinstance(batch, int) and batch != self.states[0].shape[0]:
            raise ValueError(
                "`stateful=True` carries states from a batch to the next of the same size. "
                f"Received: {batch} sequences, after a layer built for {self.states[0].shape[0]}. "
                "Leave the short last batch out."
            )

    def compute_mask(self, sequences, mask=None):
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        mask = steps_mask(mask) if self.return_sequences else None
        return (mask, *[None] * len(self.state_names)) if self.return_state else mask

    # ------------------------------------------------------------------ the call

    def call(
        self,
        sequences,
        initial_state=None,
        mask=None,
        training=False,
        return_state=None,
        sequences_mask=None,
    ):
        # With initial_state there are two tensor arguments, and Keras hands the mask of the first
        # over as <its name>_mask.
        mask = sequences_mask if mask is None else mask
        self._check(sequences, initial_state, mask, return_state)
        if initial_state is None and self.stateful:
            sequences = self._of_known_batch(sequences)
            # A copy: torch assigns in place, under the eyes of its autograd.
            state = [ops.copy(variable.value) for variable in self.states]
        else:
            state = self._initial_state(initial_state)
        x = ops.cast(sequences, self.compute_dtype)
        if mask is not None:
            mask = steps_mask(ops.cast(mask, "bool"))
            # Whatever padding holds, NaN too, must not reach a weight's gradient.
            x = ops.where(mask[:, :, None], x, ops.zeros_like(x))
        if self.go_backwards:
            x, mask, _ = from_the_end(self.name, x, mask)
        if training and self.dropout:
            # One draw for all steps of a sequence, as in keras.layers.LSTM.
            shape = (ops.shape(x)[0], 1, x.shape[-1])
            x = x * self._drawn(shape, self.dropout, x.dtype)
        scale = self._recurrent_scale(x) if training else None

        return_state = self.return_state if return_state is None else return_state

        def run(x, *state):
            needed = return_state or self.stateful
            y, state = self._run(x, list(state) or None, mask, scale, needed)
            return (y, *(state or ()))

        run = backends.remat(run) if self.remat and training else run
        outputs, *state = run(x, *(state or ()))
        if self.stateful:
            for variable, value in zip(self.states, state, strict=True):
                variable.assign(value)
        if self.return_sequences and self.zero_output_for_mask and mask is not None:
            outputs = ops.where(mask[:, :, None], outputs, ops.zeros_like(outputs))
        return (outputs, *state) if return_state else outputs

    def _recurrent_scale(self, sequences):
        """Recurrent dropout's draw, made where nothing is computed a second time, or None."""
        return None

    def _of_known_batch(self, sequences):
        """The sequences of a stateful layer: of its batch, where a graph leaves that open."""
        export = backends.export_of(sequences)
        batch = self.states[0].shape[0]
        if export is not None:
            if export.format != "tf_saved_model":
                refuse_states(self, export.format)
            if not backends.changes(self.states[0], sequences):
                raise ValueError(
                    f"{self.name} keeps its states in variables (stateful=True), for {batch} "
                    "sequences. On JAX a SavedModel carries them if its batch is fixed and it is "
                    "not static. Received: an open batch, or is_static=True. Call model.export "
                    f"with input_signature=[keras.InputSpec(shape=({batch}, ...), dtype=...)] and "
                    "without is_static."
                )
        if isinstance(sequences.shape[0], int) or export is None:
            return sequences
        return ops.reshape(sequences, (batch, *ops.shape(sequences)[1:]))

    # ------------------------------------------------------------------ files

    def save_own_variables(self, store):
        """Writes nothing: weights belong to sub-layers, and states to a batch, not to a file."""

    def load_own_variables(self, store):
        load_variables(self, [], store)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "seed": self.seed,
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
            "stateful": self.stateful,
            "zero_output_for_mask": self.zero_output_for_mask,
            "use_kernel": self.use_kernel,
            "remat": self.remat,
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
        }


def newest(sequences, mask):
    """The newest real step (B, features) and, with a mask, whether there is one (B, 1)."""
    if mask is None:
        return sequences[:, -1], None
    last = last_real_step(mask)[:, -1:]
    return backends.steps_of(sequences, ops.maximum(last, 0))[:, 0], last >= 0


def last_output(outputs, mask):
    """(B, units) of outputs (B, T, units) that are held at masked steps."""
    stretches = backends.own_stretch()
    if stretches is None:
        return outputs[:, -1]
    return newest_of_all(stretches, outputs, ops.zeros_like(outputs[:, :1]), mask)[1][:, 0]


def held(outputs, mask):
    """Outputs (B, T, units) with the newest real one at masked steps, zeros before the first."""
    last = last_real_step(mask)
    kept = backends.steps_of(outputs, ops.maximum(last, 0))
    before = ops.zeros_like(kept[:, :1])
    stretches = backends.own_stretch()
    if stretches is not None:
        before, _ = newest_of_all(stretches, outputs, before, mask)
    return ops.where(last[:, :, None] >= 0, kept, before)
