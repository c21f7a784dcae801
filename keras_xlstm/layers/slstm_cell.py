"""sLSTMCell: the weights of sLSTM, and one step of it."""

from typing import Any

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.base import Rematerialized, plain
from keras_xlstm.layers.projections import are_plain
from keras_xlstm.layers.states import contradictions_as_nan, given_to_rnn
from keras_xlstm.validation import (
    check_clip,
    check_flag,
    check_floating,
    check_heads,
    check_state_agrees,
    check_state_values,
    freeze,
    load_variables,
    refuse_states,
)

_FORGET = ("sigmoid", "exponential")


@keras.saving.register_keras_serializable(package="keras_xlstm")
class sLSTMCell(Rematerialized, keras.layers.Layer):
    """One step of sLSTM, for `keras.layers.RNN` and `StackedRNNCells`.

    [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517), section 2.2. The
    `sLSTM` layer runs the same weights over whole sequences, faster; it also has the dropouts.

    Args:
        units: size of the output; divisible by `num_heads`.
        num_heads: heads; h of a head reaches the gates of that head alone.
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
        recurrent_gradient_clip: bounds the gradient that flows from a step's gates to the h before
            it, elementwise. None keeps it exact; the paper used 10.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: (batch, features).
        states: `[h, c, n, m]`, each (batch, units). `keras.layers.RNN` keeps them in the compute
            dtype; the sLSTM layer in float32.
        training: ignored: a cell has no dropout.

    Returns:
        h (batch, units) and the new `[h, c, n, m]`.

    Example:

    >>> x = np.random.normal(size=(2, 10, 8))
    >>> cells = [keras_xlstm.layers.sLSTMCell(16), keras_xlstm.layers.sLSTMCell(16, num_heads=4)]
    >>> keras.layers.RNN(cells)(x).shape
    (2, 16)
    """

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
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        recurrent_gradient_clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        forget_gate_bias_initializer = forget_bias(
            forget_gate_bias_initializer, kwargs, default="spread"
        )
        check_heads(units, num_heads)
        if forget_activation not in _FORGET:
            raise ValueError(
                '`forget_activation` must be "sigmoid" or "exponential". '
                f"Received: forget_activation={forget_activation!r}."
            )
        check_clip(recurrent_gradient_clip)
        if kwargs.get("activity_regularizer") is not None:
            raise ValueError(
                "sLSTMCell cannot honour `activity_regularizer`: a loop over time keeps no losses. "
                f"Received: activity_regularizer={kwargs['activity_regularizer']!r}. Give it to "
                "keras.layers.RNN, or to the layer sLSTM."
            )
        super().__init__(autocast=False, **kwargs)
        check_floating(self)
        self.units = units
        self.num_heads = num_heads
        self.forget_activation = forget_activation
        self.use_bias = check_flag("use_bias", use_bias)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.recurrent_initializer = initializers.get(recurrent_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.forget_gate_bias_initializer = initializers.get(forget_gate_bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.recurrent_regularizer = keras.regularizers.get(recurrent_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.recurrent_constraint = keras.constraints.get(recurrent_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.recurrent_gradient_clip = recurrent_gradient_clip
        self.state_size = [units] * 4
        self.output_size = units
        with plain():
            self.gates = keras.layers.Dense(
                4 * units,
                use_bias=False,
                kernel_initializer=self.kernel_initializer,
                kernel_regularizer=self.kernel_regularizer,
                kernel_constraint=self.kernel_constraint,
                dtype=self.dtype_policy,
                name="gates",
            )

    def build(self, input_shape):
        self.gates.build(input_shape)
        H, D = self.num_heads, self.units // self.num_heads
        self.recurrent_kernel = self.add_weight(
            name="recurrent_kernel",
            shape=(H, D, 4, D),
            initializer=self._draw_recurrent,
            regularizer=self.recurrent_regularizer,
            constraint=self.recurrent_constraint,
            autocast=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(4, H, D),
                initializer=self._draw_bias,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
                autocast=False,
            )
        freeze(self)

    def _draw_recurrent(self, shape, dtype=None):
        H, D, _, _ = shape
        # Backends make no orthogonal matrices in half precision.
        wide = "float32" if dtype in ("float16", "bfloat16") else dtype
        heads = [
            initializers.reseeded(self.recurrent_initializer, head)((D, 4 * D), dtype=wide)
            for head in range(H)
        ]
        return ops.cast(ops.reshape(ops.stack(heads), shape), dtype)

    def _draw_bias(self, shape, dtype=None):
        draws = [self.bias_initializer] * 4
        draws[1] = self.forget_gate_bias_initializer
        draws = [initializers.reseeded(draw, gate) for gate, draw in enumerate(draws)]
        return ops.stack([draw(shape[1:], dtype=dtype) for draw in draws])

    def run(self, inputs, state=None, mask=None, recurrent_scale=None, use_kernel="auto"):
        """All steps: inputs (B, T, features) to h (B, T, units), new states (B, units)."""
        heads = (self.num_heads, self.units // self.num_heads)
        batch, time = ops.shape(inputs)[:2]
        kernel = None
        if are_plain(self.gates) and backends.multiplies_inside(
            inputs, self.units, backends.prefer(use_kernel)
        ):
            x, kernel = inputs, self.gates.kernel
        else:
            # Rows, not sequences of one: XLA cannot compile the gradient of that Dense in a loop.
            x = self.gates(inputs[:, 0] if backends.size(inputs.shape[1]) == 1 else inputs)
            # A cast that does nothing but under float64, which Dense leaves on some backends.
            x = ops.reshape(ops.cast(x, self.compute_dtype), (batch, time, 4, *heads))
        if state is not None:
            state = tuple(ops.reshape(s, (batch, *heads)) for s in state)
        h, state = xlstm_ops.slstm(
            x,
            ops.cast(self.recurrent_kernel, self.compute_dtype),
            self.bias,
            initial_state=state,
            mask=mask,
            return_state=True,
            forget_gate="exp" if self.forget_activation == "exponential" else "sigmoid",
            recurrent_gradient_clip=self.recurrent_gradient_clip,
            recurrent_scale=recurrent_scale,
            kernel=kernel,
            implementation=backends.prefer(use_kernel),
        )
        h = ops.reshape(h, (batch, time, self.units))
        return h, [ops.reshape(s, (batch, self.units)) for s in state]

    def call(self, inputs, states, training=False):
        export = backends.export_of(inputs)
        if export and export.stateful and export.format != "tf_saved_model":
            refuse_states(export.stateful, export.format)
        if not isinstance(states, (list, tuple)) or len(states) != 4:
            got = f"{len(states)} tensors" if isinstance(states, (list, tuple)) else type(states)
            raise ValueError(
                f"The states of sLSTMCell must be the 4 tensors (h, c, n, m). Received: {got}. For "
                "the h and c of an LSTM use keras_xlstm.layers.state_from_lstm(h, c)."
            )
        seen = states
        if backends.host_values(states[0]) is None:
            seen = given_to_rnn(self) or states
        for check in (check_state_values, check_state_agrees):
            check("The state of sLSTMCell", dict(zip("hcnm", seen, strict=True)))
        x = ops.cast(inputs, self.compute_dtype)

        def run(x, *state):
            # One step is no work for a kernel.
            h, new = self.run(x[:, None], state, use_kernel=False)
            return (h, *new)

        if self.remat and training:
            run = self._recomputed(run)
        h, *new = run(x, *contradictions_as_nan(*states))
        # keras.layers.RNN scans with the dtype that it gave.
        return h[:, 0], [ops.cast(s, old.dtype) for s, old in zip(new, states, strict=True)]

    def _recomputed(self, run):
        if keras.backend.backend() == "tensorflow":
            raise ValueError(
                "TensorFlow cannot compute a step of its loops again in the backward pass. "
                "Received: keras.RematScope around sLSTMCell. Use the layer sLSTM(remat=True), or "
                "make the cell outside the scope."
            )
        return keras.remat(run)

    def save_own_variables(self, store):
        for variable in self._own():
            store[variable.name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        load_variables(self, self._own(), store)

    def _own(self):
        return [v for v in (self.recurrent_kernel, self.bias) if v is not None]

    def get_initial_state(self, batch_size=None):
        # Four tensors: of one, torch would make stateful variables that share their memory.
        return [ops.zeros((batch_size, self.units), self.compute_dtype) for _ in range(4)]

    def get_config(self):
        return {**super().get_config(), **self.settings()}

    def settings(self):
        """The constructor's arguments, serialised."""
        config = {
            "units": self.units,
            "num_heads": self.num_heads,
            "forget_activation": self.forget_activation,
            "use_bias": self.use_bias,
            "recurrent_gradient_clip": self.recurrent_gradient_clip,
        }
        for name in ("kernel", "recurrent", "bias", "forget_gate_bias"):
            initializer = getattr(self, f"{name}_initializer")
            config[f"{name}_initializer"] = initializers.serialize(initializer)
        for name in ("kernel", "recurrent", "bias"):
            regularizer = getattr(self, f"{name}_regularizer")
            config[f"{name}_regularizer"] = keras.regularizers.serialize(regularizer)
            constraint = getattr(self, f"{name}_constraint")
            config[f"{name}_constraint"] = keras.constraints.serialize(constraint)
        return config
