"""mLSTM: matrix memory, exponential gating, parallel over time."""

from typing import Any

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.base import plain
from keras_xlstm.layers.norms import MultiHeadNorm
from keras_xlstm.layers.projections import Gate, gate_pair
from keras_xlstm.layers.recurrent import Recurrent, held, last_output, newest
from keras_xlstm.layers.soft_cap import soft_cap
from keras_xlstm.validation import check_cap, check_flag, check_heads, check_positive


@keras.saving.register_keras_serializable(package="keras_xlstm")
class mLSTM(Recurrent):
    """mLSTM: every head writes key-value pairs into a matrix memory and reads it with queries.

    No hidden state enters its gates, so all steps of a chunk are computed at once. Queries, keys,
    values and gates are linear in the input; each head's output is normalised, then gated:
    [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517), section 2.3, with
    the norm and gate of [xLSTM 7B](https://arxiv.org/abs/2503.13427). The equations are at
    `keras_xlstm.ops.mlstm`.

    There is no recurrent kernel, hence no `recurrent_initializer` and no `recurrent_dropout`.

    Args:
        units: size of the output; divisible by `num_heads`.
        num_heads: memories, each (key_dim, value_dim).
        key_dim: size of a head's queries and keys; units / num_heads by default.
        value_dim: size of a head's values. By default units / num_heads, and the heads side by
            side are the output; any given value adds a Dense that brings them to `units`.
        input_gate: `"exponential"` or `"sigmoid"`.
        gate_soft_cap: bounds the input and forget gate's pre-activations x to +-cap by
            cap * tanh(x / cap); None for no bound. The 7B model used 15.
        use_output_gate: multiply the output by sigmoid of a linear function of the input.
        use_head_norm: normalise each head's output.
        use_bias: biases for queries, keys, values, output gate and output. The input and forget
            gates always have theirs.
        kernel_initializer: of all kernels but those of the input and forget gates, which start at
            zero.
        bias_initializer: of the biases that `use_bias` adds.
        input_gate_bias_initializer: `None` is normal(0, 0.1) as in the paper's models; the 7B
            model used the constant -10.
        forget_gate_bias_initializer: `"spread_heads"` from 1 to 6 over the heads, 3.5 for one
            alone: memories of 4 to 400 steps, and of 34. The published models, and the blocks, have
            `"linspace"` from 3 to 6.
        kernel_regularizer, bias_regularizer: regularisers of the same kernels and biases.
        kernel_constraint, bias_constraint: constraints likewise.
        activity_regularizer: of the outputs.
        dropout: fraction of the inputs to drop, the same ones at all steps of a sequence.
        seed: of the dropout.
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
        initial_state: `[C, n, m]` of shapes (batch, heads, key_dim, value_dim), (batch, heads,
            key_dim) and (batch, heads); zeros or None start fresh.
        mask: (batch, time) bool, True for real steps, in any pattern.
        training: whether dropout is on.
        return_state: in place of the constructor's.
        sequences_mask: Keras's own way to bring the mask when `initial_state` is given.

    Output: (batch, units), or (batch, time, units) with `return_sequences`, in the compute dtype;
    with `return_state` followed by C, n and m, in float32.

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> x = np.random.normal(size=(2, 10, 8))
    >>> keras_xlstm.layers.mLSTM(16, num_heads=4)(x).shape
    (2, 16)
    >>> layer = keras_xlstm.layers.mLSTM(16, return_sequences=True, return_state=True)
    >>> outputs, C, n, m = layer(x)
    >>> next_outputs, *_ = layer(x, initial_state=[C, n, m])
    """

    state_names = ("C", "n", "m")

    def __init__(
        self,
        units: int,
        num_heads: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        input_gate: str = "exponential",
        gate_soft_cap: float | None = None,
        use_output_gate: bool = True,
        use_head_norm: bool = True,
        use_bias: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        input_gate_bias_initializer: Any = None,
        forget_gate_bias_initializer: Any = "spread_heads",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
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
            forget_gate_bias_initializer, kwargs, default="spread_heads"
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
        for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
            if size is not None:
                check_positive(name, size)
        if input_gate not in ("exponential", "sigmoid"):
            raise ValueError(
                '`input_gate` must be "exponential" or "sigmoid". '
                f"Received: input_gate={input_gate!r}."
            )
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.input_gate_activation = input_gate
        self.gate_soft_cap = check_cap("gate_soft_cap", gate_soft_cap)
        self.use_output_gate = check_flag("use_output_gate", use_output_gate)
        self.use_head_norm = check_flag("use_head_norm", use_head_norm)
        self.use_bias = check_flag("use_bias", use_bias)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.input_gate_bias_initializer = initializers.get(
            input_gate_bias_initializer, default=keras.initializers.RandomNormal(stddev=0.1)
        )
        self.forget_gate_bias_initializer = initializers.get(forget_gate_bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

        self._K = key_dim or units // num_heads
        self._V = value_dim or units // num_heads
        with plain():
            self._make_layers()

    def _make_layers(self):
        num_heads = self.num_heads
        width = num_heads * self._V
        self.query = self._dense(num_heads * self._K, "query", 0)
        self.key = self._dense(num_heads * self._K, "key", 1)
        self.value = self._dense(width, "value", 2)
        self.input_gate = self._gate("input_gate", self.input_gate_bias_initializer)
        self.forget_gate = self._gate("forget_gate", self.forget_gate_bias_initializer)
        self.output_gate = self._dense(width, "output_gate", 3) if self.use_output_gate else None
        self.output_projection = (
            None if self.value_dim is None else self._dense(self.units, "output_projection", 4)
        )
        self.head_norm = (
            MultiHeadNorm(num_heads, dtype=self.dtype_policy, name="head_norm")
            if self.use_head_norm
            else None
        )

    def _dense(self, units, name, offset):
        return keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=initializers.reseeded(self.kernel_initializer, offset),
            bias_initializer=initializers.reseeded(self.bias_initializer, offset),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def _gate(self, name, bias_initializer):
        # In float32 whatever the policy.
        return Gate(
            self.num_heads,
            kernel_initializer="zeros",
            bias_initializer=bias_initializer,
            dtype=self.state_dtype,
            name=name,
        )

    def _state_shapes(self, batch_size):
        H, K, V = self.num_heads, self._K, self._V
        return [(batch_size, H, K, V), (batch_size, H, K), (batch_size, H)]

    def _build(self, dim):
        check_heads(self.units, self.num_heads)
        for layer in (self.query, self.key, self.value, self.input_gate, self.forget_gate):
            layer.build((None, None, dim))
        width = self.num_heads * self._V
        if self.output_gate is not None:
            self.output_gate.build((None, None, dim))
        for layer in (self.head_norm, self.output_projection):
            if layer is not None:
                layer.build((None, None, width))

    def _run(self, sequences, state, mask, scale, return_state):
        steps = ops.shape(sequences)[:2]  # not of what Dense made: tf2onnx takes that for rows

        def heads(x, size):
            # Does nothing but under float64, which Keras's Dense leaves on some backends.
            x = ops.cast(x, self.compute_dtype)
            leading = steps if len(x.shape) == 3 else (-1,)
            return ops.reshape(x, (*leading, self.num_heads, size))

        k, v = heads(self.key(sequences), self._K), heads(self.value(sequences), self._V)
        gates = gate_pair(sequences, self.input_gate, self.forget_gate)
        arguments = (k, v, *(soft_cap(gate, self.gate_soft_cap) for gate in gates))
        options = {
            "initial_state": state, "mask": mask,
            "input_gate": "exp" if self.input_gate_activation == "exponential" else "sigmoid",
        }  # fmt: skip
        implementation = backends.prefer(self.use_kernel)
        if not self.return_sequences and backends.reads_once(k, v, implementation):
            x, any_real = newest(sequences, mask)
            h, state = xlstm_ops.mlstm_last(
                heads(self.query(x), self._K), *arguments, **options, return_state=return_state
            )
            h = self._output(h, x)
            return h if any_real is None else ops.where(any_real, h, 0), state
        h, state = xlstm_ops.mlstm(
            heads(self.query(sequences), self._K), *arguments, **options,
            return_state=True, implementation=implementation,
        )  # fmt: skip
        h = self._output(h, sequences)
        h = h if mask is None else held(h, mask)
        return h if self.return_sequences else last_output(h, mask), state

    def _output(self, h, x):
        """What leaves the layer: h (..., H, V) normalised, and gated by the inputs x."""
        leading = ops.shape(x)[:2] if len(x.shape) == 3 else (-1,)
        h = ops.reshape(h, (*leading, self.num_heads * self._V))
        if self.head_norm is not None:
            h = self.head_norm(h)
        if self.output_gate is not None:
            h = h * ops.sigmoid(self.output_gate(x))
        if self.output_projection is not None:
            h = self.output_projection(h)
        return ops.cast(h, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "input_gate": self.input_gate_activation,
            "gate_soft_cap": self.gate_soft_cap,
            "use_output_gate": self.use_output_gate,
            "use_head_norm": self.use_head_norm,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "input_gate_bias_initializer": initializers.serialize(self.input_gate_bias_initializer),
            "forget_gate_bias_initializer": initializers.serialize(
                self.forget_gate_bias_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
