"""The paper's residual block around mLSTM."""

import keras
from keras import ops

from keras_xlstm import initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.block import Block, block_diagonal, dense, layer_norm
from keras_xlstm.layers.convolution import CausalConv1D
from keras_xlstm.layers.feed_forward import rounded_up
from keras_xlstm.layers.norms import MultiHeadNorm
from keras_xlstm.layers.projections import gate_pair
from keras_xlstm.layers.soft_cap import soft_cap
from keras_xlstm.validation import check_cap, check_flag, check_positive


@keras.saving.register_keras_serializable(package="keras_xlstm")
class mLSTMBlock(Block):
    """Residual block around mLSTM, at a multiple of the model's width.

    Normalised inputs are projected up to a cell half and a gate half; the cell half goes through a
    causal convolution, block-diagonal projections to queries, keys and values, and mLSTM; its
    normalised output and a learnable skip from the convolution are gated and projected back:
    [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517), figure 11. The gate
    is SiLU, as in the published models.

    Args:
        num_heads: memories; must divide the inner width.
        projection_factor: inner width over the input's, rounded up to a multiple of 64.
        conv_kernel_size: taps of the convolution; 0 leaves it out, its SiLU too.
        qkv_block_size: size of the blocks that queries, keys and values are projected by.
        use_bias: biases for all projections but those of the gates, which always have theirs.
        gate_soft_cap: bounds the gates' pre-activations x to cap * tanh(x / cap); None does not.
        input_gate: `"exponential"` or `"sigmoid"`.
        dropout: fraction of the block's contribution to drop.
        epsilon: of both norms.
        kernel_initializer: of the projections in; `"small_init"` knows the model's width.
        output_initializer: of the projection out; `"wang_init"` knows `num_blocks` too.
        input_gate_bias_initializer: `None` is normal(0, 0.1).
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
        initial_state: `[conv, C, n, m]` as `return_state` gives them, or None. Without the
            convolution there is no `conv`.
        mask: (batch, time) bool, True for real steps, in any pattern. Other steps leave the block
            as they came and reach nothing.
        segment_ids: (batch, time) integers; where they change, memory and convolution start empty.
        training: whether dropout and `remat` are on.
        return_state: in place of the constructor's.

    Output: of the shape of the input, in the compute dtype; with `return_state` followed by the
    states, in float32.

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> x = np.random.normal(size=(2, 10, 32))
    >>> keras_xlstm.layers.mLSTMBlock(num_heads=4)(x).shape
    (2, 10, 32)
    """

    def __init__(
        self,
        num_heads=4,
        projection_factor=2.0,
        conv_kernel_size=4,
        qkv_block_size=4,
        use_bias=False,
        gate_soft_cap=None,
        input_gate="exponential",
        dropout=0.0,
        epsilon=1e-5,
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
        check_positive("qkv_block_size", qkv_block_size)
        self.projection_factor = self._check_factor("projection_factor", projection_factor)
        self.conv_kernel_size = self._check_taps(conv_kernel_size)
        self.qkv_block_size = qkv_block_size
        self.use_bias = check_flag("use_bias", use_bias)
        self.gate_soft_cap = check_cap("gate_soft_cap", gate_soft_cap)
        self.input_gate_activation = self._check_input_gate(input_gate)
        self.input_gate_bias_initializer = initializers.get(
            input_gate_bias_initializer, default=keras.initializers.RandomNormal(stddev=0.1)
        )
        self.forget_gate_bias_initializer = initializers.get(forget_gate_bias_initializer)

    @property
    def state_names(self):
        return (*("conv",) * bool(self.conv_kernel_size), "C", "n", "m")

    def _state_shapes(self, batch_size):
        H, D = self.num_heads, self.inner // self.num_heads
        shapes = [(batch_size, H, D, D), (batch_size, H, D), (batch_size, H)]
        if self.conv_kernel_size:
            shapes.insert(0, (batch_size, self.conv_kernel_size - 1, self.inner))
        return shapes

    def _build(self, dim):
        self.inner = rounded_up(self.projection_factor * dim, 64)
        self._check_divides("num_heads", self.num_heads, self.inner)
        self._check_divides("qkv_block_size", self.qkv_block_size, self.inner)
        self.norm = layer_norm(self, "norm", dim)
        self.up_projection = dense(self, "up_projection", dim, 2 * self.inner, self.use_bias)
        self.convolution = None
        if self.conv_kernel_size:
            self.convolution = CausalConv1D(
                self.conv_kernel_size, dtype=self.dtype_policy, name="convolution"
            )
            self.convolution.build((None, None, self.inner))
        blocks = self.inner // self.qkv_block_size
        self.query, self.key, self.value = (
            block_diagonal(self, name, blocks, self.qkv_block_size, self.use_bias, offset)
            for offset, name in enumerate(("query", "key", "value"), start=1)
        )
        gates = {"input_gate": self.input_gate_bias_initializer}
        gates["forget_gate"] = self.forget_gate_bias_initializer
        self.input_gate, self.forget_gate = (
            self._gate(name, 3 * self.inner, bias) for name, bias in gates.items()
        )
        self.head_norm = MultiHeadNorm(
            self.num_heads, self.epsilon, dtype=self.dtype_policy, name="head_norm"
        )
        self.head_norm.build((None, None, self.inner))
        self.skip = self.add_weight(
            name="skip", shape=(self.inner,), initializer="ones", autocast=False
        )
        self.down_projection = dense(
            self, "down_projection", self.inner, dim, self.use_bias, self.output_initializer
        )

    def _run(self, x, state, mask, segment_ids, dropped):
        batch, time = ops.shape(x)[:2]
        cell, gate = ops.split(self.up_projection(self.norm(x)), 2, axis=-1)
        convolved, new = cell, []
        if self.convolution is not None:
            conv, state = self._split(state, batch)
            convolved, conv = self.convolution(cell, conv, mask, segment_ids)
            convolved, new = ops.silu(convolved), [conv]

        def projected(layer, x):
            parts = (batch, time, self.inner // self.qkv_block_size, self.qkv_block_size)
            return ops.reshape(layer(ops.reshape(x, parts)), (batch, time, self.inner))

        def heads(x):
            # The cast does nothing but under float64, which Keras leaves on some backends.
            shape = (batch, time, self.num_heads, self.inner // self.num_heads)
            return ops.reshape(ops.cast(x, self.compute_dtype), shape)

        q, k = projected(self.query, convolved), projected(self.key, convolved)
        v = projected(self.value, cell)
        qkv = ops.concatenate([q, k, v], axis=-1)
        input_gate, forget_gate = gate_pair(qkv, self.input_gate, self.forget_gate)
        h, state = xlstm_ops.mlstm(
            heads(q),
            heads(k),
            heads(v),
            soft_cap(input_gate, self.gate_soft_cap),
            soft_cap(forget_gate, self.gate_soft_cap),
            initial_state=state,
            mask=mask,
            segment_ids=segment_ids,
            return_state=True,
            input_gate="exp" if self.input_gate_activation == "exponential" else "sigmoid",
            implementation=self._implementation,
        )
        h = self.head_norm(ops.reshape(h, (batch, time, self.inner)))
        h = h + ops.cast(self.skip, self.compute_dtype) * convolved
        y = self.down_projection(h * ops.silu(gate))
        return x + (y if dropped is None else y * dropped), [*new, *state]

    def get_config(self):
        return {
            **super().get_config(),
            "projection_factor": self.projection_factor,
            "conv_kernel_size": self.conv_kernel_size,
            "qkv_block_size": self.qkv_block_size,
            "use_bias": self.use_bias,
            "gate_soft_cap": self.gate_soft_cap,
            "input_gate": self.input_gate_activation,
            "input_gate_bias_initializer": initializers.serialize(self.input_gate_bias_initializer),
            "forget_gate_bias_initializer": initializers.serialize(
                self.forget_gate_bias_initializer
            ),
        }
