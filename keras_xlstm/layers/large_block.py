"""The residual block of xLSTM 7B."""

import keras
from keras import ops

from keras_xlstm import initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.block import Block, dense
from keras_xlstm.layers.feed_forward import GatedFeedForward, rounded_up
from keras_xlstm.layers.norms import MultiHeadNorm, RMSNormalization
from keras_xlstm.layers.projections import added_dense, gate_pair, unfused_dense
from keras_xlstm.validation import check_cap, check_flag


@keras.saving.register_keras_serializable(package="keras_xlstm")
class xLSTMLargeBlock(Block):
    """Residual block around mLSTM at the model's width, and a gated feed-forward block behind it.

    No convolution, no up-projection around the memory: the block that trains and generates fastest,
    [xLSTM 7B](https://arxiv.org/abs/2503.13427), section 3.

    Args:
        num_heads: memories, each (key_dim_factor * width / num_heads, value_dim_factor * width /
            num_heads).
        key_dim_factor: size of all queries over the width.
        value_dim_factor: size of all values over the width.
        feed_forward_factor: hidden size of the feed-forward block over the width, rounded up to a
            multiple of 64.
        gate_soft_cap: bounds the gates' pre-activations x to cap * tanh(x / cap); None does not.
        input_gate: `"exponential"` or `"sigmoid"`.
        use_bias: biases for queries, keys, values, output gate and output; the input and forget
            gates always have theirs.
        dropout: fraction of mLSTM's contribution to drop.
        epsilon: of all norms.
        kernel_initializer: of the projections in; `"small_init"` knows the model's width.
        output_initializer: of both projections out; `"wang_init"` knows `num_blocks` too.
        input_gate_bias_initializer: the 7B model's is the constant -10.
        forget_gate_bias_initializer: `"linspace"` from 3 to 6 over the heads.
        block_index, num_blocks: place in the stack, for the initialisers.
        seed: of the dropout.
        return_state: return the states too.
        remat: in training, compute the block again in the backward pass and store its input alone.
        use_kernel: as in `mLSTM`.
        go_backwards: read the sequence from its end; outputs come in that order. States are then
            of the future: the initial one of steps behind the last, the new one of all, from the
            last to the first. `keras.layers.Bidirectional` adds a copy that does, with its own
            weights: twice the parameters and the time.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        sequences: (batch, time, features), floating point.
        initial_state: `[C, n, m]` as `return_state` gives them, or None.
        mask: (batch, time) bool, True for real steps, in any pattern. Other steps leave the block
            as they came and reach nothing.
        segment_ids: (batch, time) integers; where they change, the memory starts empty.
        training: whether dropout and `remat` are on.
        return_state: in place of the constructor's.

    Output: of the shape of the input, in the compute dtype; with `return_state` followed by the
    states, in float32.

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> x = np.random.normal(size=(2, 10, 32))
    >>> keras_xlstm.layers.xLSTMLargeBlock(num_heads=4)(x).shape
    (2, 10, 32)
    """

    state_names = ("C", "n", "m")

    def __init__(
        self,
        num_heads=8,
        key_dim_factor=0.5,
        value_dim_factor=1.0,
        feed_forward_factor=2.667,
        gate_soft_cap=15.0,
        input_gate="exponential",
        use_bias=False,
        dropout=0.0,
        epsilon=1e-6,
        kernel_initializer="small_init",
        output_initializer="wang_init",
        input_gate_bias_initializer=None,
        forget_gate_bias_initializer="linspace",
        block_index=0,
        num_blocks=1,
        seed=None,
        return_state=False,
        remat=False,
        use_kernel="auto",
        go_backwards=False,
        **kwargs,
    ):
        forget_gate_bias_initializer = forget_bias(
            forget_gate_bias_initializer, kwargs, default="linspace"
        )
        super().__init__(
            num_heads, dropout, epsilon, kernel_initializer, output_initializer, block_index,
            num_blocks, seed, return_state, remat, use_kernel, go_backwards, **kwargs,
        )  # fmt: skip
        self.key_dim_factor = self._check_factor("key_dim_factor", key_dim_factor)
        self.value_dim_factor = self._check_factor("value_dim_factor", value_dim_factor)
        self.feed_forward_factor = self._check_factor("feed_forward_factor", feed_forward_factor)
        self.gate_soft_cap = check_cap("gate_soft_cap", gate_soft_cap)
        self.input_gate_activation = self._check_input_gate(input_gate)
        self.use_bias = check_flag("use_bias", use_bias)
        self.input_gate_bias_initializer = initializers.get(
            input_gate_bias_initializer, default=keras.initializers.Constant(-10.0)
        )
        self.forget_gate_bias_initializer = initializers.get(forget_gate_bias_initializer)

    def _state_shapes(self, batch_size):
        H, K, V = self.num_heads, self.keys // self.num_heads, self.values // self.num_heads
        return [(batch_size, H, K, V), (batch_size, H, K), (batch_size, H)]

    def _build(self, dim):
        self.keys, self.values = (
            int(factor * dim) for factor in (self.key_dim_factor, self.value_dim_factor)
        )
        for width in (self.keys, self.values):
            self._check_divides("num_heads", self.num_heads, width)
        self.norm = self._rms_norm("norm")
        self.query, self.key, self.value = (
            dense(self, name, dim, width, self.use_bias, offset=offset)
            for offset, (name, width) in enumerate(
                {"query": self.keys, "key": self.keys, "value": self.values}.items()
            )
        )
        zeros = keras.initializers.Zeros()
        self.output_gate = dense(self, "output_gate", dim, self.values, self.use_bias, zeros)
        self.input_gate = self._gate("input_gate", dim, self.input_gate_bias_initializer)
        self.forget_gate = self._gate("forget_gate", dim, self.forget_gate_bias_initializer)
        self.head_norm = MultiHeadNorm(
            self.num_heads, self.epsilon, dtype=self.dtype_policy, name="head_norm"
        )
        self.head_norm.build((None, None, self.values))
        self.output_projection = dense(
            self, "output_projection", self.values, dim, self.use_bias, self.output_initializer
        )
        self.feed_forward_norm = self._rms_norm("feed_forward_norm")
        self.feed_forward = GatedFeedForward(
            rounded_up(self.feed_forward_factor * dim, 64),
            activation="silu",
            kernel_initializer=self._initializer(self.kernel_initializer, 3),
            output_initializer=self._initializer(self.output_initializer, 4),
            dtype=self.dtype_policy,
            name="feed_forward",
        )
        self.feed_forward.build((None, None, dim))

    def _rms_norm(self, name):
        layer = RMSNormalization(epsilon=self.epsilon, dtype=self.dtype_policy, name=name)
        layer.build((None, None, self.dim))
        return layer

    def _run(self, x, state, mask, segment_ids, dropped):
        batch, time = ops.shape(x)[:2]

        def heads(x):
            # The cast does nothing but under float64, which Keras leaves on some backends.
            x = ops.cast(x, self.compute_dtype)
            return ops.reshape(x, (batch, time, self.num_heads, x.shape[-1] // self.num_heads))

        u = self.norm(x)
        input_gate, forget_gate = gate_pair(
            u, self.input_gate, self.forget_gate, self.gate_soft_cap
        )
        q, k, v, gate = unfused_dense(u, self.query, self.key, self.value, self.output_gate)
        h, state = xlstm_ops.mlstm(
            heads(q),
            heads(k),
            heads(v),
            input_gate,
            forget_gate,
            initial_state=state,
            mask=mask,
            segment_ids=segment_ids,
            return_state=True,
            input_gate="exp" if self.input_gate_activation == "exponential" else "sigmoid",
            implementation=self._implementation,
        )
        h = self.head_norm.gated(ops.reshape(h, (batch, time, self.values)), gate)
        if dropped is None:
            x = added_dense(x, h, self.output_projection)
        else:
            x = x + self.output_projection(h) * dropped
        return self.feed_forward.added(x, self.feed_forward_norm(x)), list(state)

    def get_config(self):
        return {
            **super().get_config(),
            "key_dim_factor": self.key_dim_factor,
            "value_dim_factor": self.value_dim_factor,
            "feed_forward_factor": self.feed_forward_factor,
            "gate_soft_cap": self.gate_soft_cap,
            "input_gate": self.input_gate_activation,
            "use_bias": self.use_bias,
            "input_gate_bias_initializer": initializers.serialize(self.input_gate_bias_initializer),
            "forget_gate_bias_initializer": initializers.serialize(
                self.forget_gate_bias_initializer
            ),
        }
