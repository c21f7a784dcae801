"""sLSTM: scalar memory, exponential gating, memory mixing within heads."""

from typing import Any

import keras
from keras import ops

from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.base import plain
from keras_xlstm.layers.recurrent import Recurrent
from keras_xlstm.layers.slstm_cell import sLSTMCell
from keras_xlstm.layers.states import contradictions_as_nan
from keras_xlstm.validation import check_rate


@keras.saving.register_keras_serializable(package="keras_xlstm")
class sLSTM(Recurrent):
    """sLSTM: an LSTM with exponential gates and a normaliser, that stands where `LSTM` stood.

    It keeps the LSTM's memory mixing (h enters the gates), so it tracks states that parallel
    models cannot. [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517),
    section 2.2; the equations are at `keras_xlstm.ops.slstm`.

    Args:
        units: size of the output; divisible by `num_heads`.
        num_heads: heads; h of a head reaches the gates of that head alone. More heads, fewer
            recurrent weights.
        forget_activation: `"sigmoid"` or `"exponential"`.
        use_bias: whether gates have biases.
        kernel_initializer: of the input kernel (features, 4 * units), gates in the order
            i, f, z, o.
        recurrent_initializer: of the recurrent kernel, drawn per head as (units, 4 * units) of a
            head. LSTM's; the paper's, which the blocks keep, is `"zeros"`.
        bias_initializer: of the biases of i, z and o.
        forget_gate_bias_initializer: of the forget gate's, (num_heads, units of a head):
            `"spread"` from -2 to 4 over the units of a head, memories of 1 to 50 steps; the
            paper's is `"power_law"`. `forget_bias_initializer` is its older name.
        kernel_regularizer, recurrent_regularizer, bias_regularizer: regularisers.
        kernel_constraint, recurrent_constraint, bias_constraint: constraints.
        activity_regularizer: of the outputs.
        dropout: fraction of the inputs to drop, the same ones at all steps of a sequence.
        recurrent_dropout: fraction of h to drop where it enters the gates, likewise.
        recurrent_gradient_clip: bounds the gradient that flows from a step's gates to the h before
            it, elementwise. None keeps it exact; the paper used 10.
        seed: of the dropouts.
        return_sequences: return every step's output, not the last alone.
        return_state: return the states too.
        go_backwards: read the sequence from its end; outputs come in that order.
        stateful: start each batch from the states that the last one left.
        zero_output_for_mask: with `return_sequences`, zeros at masked steps, where otherwise the
            output before them is repeated.
        use_kernel: `"auto"`: a fused kernel where one fits; True: a kernel or an error; False:
            never. Results agree; `keras_xlstm.backends.available()` says what there is.
        remat: in training, compute the layer again in the backward pass and store its input alone.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        sequences: (batch, time, features), floating point; any time, known or not.
        initial_state: `[h, c, n, m]`, each (batch, units); zeros or None start fresh.
        mask: (batch, time) bool, True for real steps, in any pattern.
        training: whether dropout is on.
        return_state: in place of the constructor's.
        sequences_mask: Keras's own way to bring the mask when `initial_state` is given.

    Output: (batch, units), or (batch, time, units) with `return_sequences`, in the compute dtype;
    with `return_state` followed by h, c, n and m, (batch, units) each, in float32.

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> x = np.random.normal(size=(2, 10, 8))
    >>> keras_xlstm.layers.sLSTM(16, num_heads=4)(x).shape
    (2, 16)
    >>> layer = keras_xlstm.layers.sLSTM(16, return_sequences=True, return_state=True)
    >>> outputs, h, c, n, m = layer(x)
    >>> next_outputs, *_ = layer(x, initial_state=[h, c, n, m])
    """

    state_names = ("h", "c", "n", "m")

    def __init__(
        self,
        units: int,
        num_heads: int = 1,
        forget_activation: str = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        forget_gate_bias_initializer: Any = "spread",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_gradient_clip: float | None = None,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        zero_output_for_mask: bool = False,
        use_kernel: bool | str = "auto",
        remat: bool = False,
        **kwargs: Any,
    ) -> None:
        forget_gate_bias_initializer = forget_bias(
            forget_gate_bias_initializer, kwargs, default="spread"
        )
        super().__init__(
            units=units,
            num_heads=num_heads,
            dropout=dropout,
            seed=seed,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            zero_output_for_mask=zero_output_for_mask,
            use_kernel=use_kernel,
            remat=remat,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.recurrent_dropout = check_rate("recurrent_dropout", recurrent_dropout)
        with plain():
            self.cell = sLSTMCell(
                units,
                num_heads,
                forget_activation=forget_activation,
                use_bias=use_bias,
                kernel_initializer=kernel_initializer,
                recurrent_initializer=recurrent_initializer,
                bias_initializer=bias_initializer,
                forget_gate_bias_initializer=forget_gate_bias_initializer,
                kernel_regularizer=kernel_regularizer,
                recurrent_regularizer=recurrent_regularizer,
                bias_regularizer=bias_regularizer,
                kernel_constraint=kernel_constraint,
                recurrent_constraint=recurrent_constraint,
                bias_constraint=bias_constraint,
                recurrent_gradient_clip=recurrent_gradient_clip,
                dtype=self.dtype_policy,
                name="cell",
            )

    def _state_shapes(self, batch_size):
        return [(batch_size, self.units)] * 4

    def _initial_state(self, state):
        state = super()._initial_state(state)
        return None if state is None else contradictions_as_nan(*state)

    def _build(self, dim):
        self.cell.build((None, dim))

    def _recurrent_scale(self, sequences):
        if not self.recurrent_dropout:
            return None
        heads = (self.num_heads, self.units // self.num_heads)
        shape = (ops.shape(sequences)[0], *heads)
        return self._drawn(shape, self.recurrent_dropout, self.state_dtype)

    def _run(self, sequences, state, mask, scale, return_state):
        h, state = self.cell.run(sequences, state, mask, scale, self.use_kernel)
        if self.return_sequences:
            return h, state
        # The last h, which masked steps hold: so no loop has to keep those before it.
        return ops.cast(state[0], self.compute_dtype), state

    def get_config(self):
        config = {**super().get_config(), **self.cell.settings()}
        return {**config, "recurrent_dropout": self.recurrent_dropout}
