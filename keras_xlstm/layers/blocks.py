"""The residual blocks that xLSTM models are stacks of: the paper's two."""

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.layers.block import Block, block_diagonal, dense, layer_norm
from keras_xlstm.layers.parts import (
    CausalConv1D,
    GatedFeedForward,
    MultiHeadNorm,
    check_cap,
    check_positive,
    rounded_up,
    soft_cap,
)


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
        **kwargs,
    ):
        super().__init__(
            num_heads, dropout, epsilon, kernel_initializer, output_initializer, block_index,
            num_blocks, seed, return_state, remat, use_kernel, **kwargs,
        )  # fmt: skip
        check_positive("qkv_block_size", qkv_block_size)
        self.projection_factor = self._check_factor("projection_factor", projection_factor)
        self.conv_kernel_size = self._check_taps(conv_kernel_size)
        self.qkv_block_size = qkv_block_size
        self.use_bias = use_bias
        self.gate_soft_cap = check_cap("gate_soft_cap", gate_soft_cap)
        self.input_gate_activation = self._check_input_gate(input_gate)
        self.input_gate_bias_initializer = initializers.get(
            input_gate_bias_initializer or keras.initializers.RandomNormal(stddev=0.1)
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
            conv, *state = state
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
        h, state = xlstm_ops.mlstm(
            heads(q),
            heads(k),
            heads(v),
            soft_cap(self.input_gate(qkv), self.gate_soft_cap),
            soft_cap(self.forget_gate(qkv), self.gate_soft_cap),
            initial_state=state,
            mask=mask,
            segment_ids=segment_ids,
            return_state=True,
            input_gate="exp" if self.input_gate_activation == "exponential" else "sigmoid",
            implementation=backends.prefer(self.use_kernel),
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


@keras.saving.register_keras_serializable(package="keras_xlstm")
class sLSTMBlock(Block):
    """Residual block around sLSTM, and a gated feed-forward block behind it.

    Normalised inputs go through a causal convolution to the input and forget gates, and directly
    to the cell input and output gate, head by head; sLSTM's output is normalised per head and
    added: [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517), figure 10.

    Args:
        num_heads: heads; must divide the width.
        conv_kernel_size: taps of the convolution; 0 leaves it out, its SiLU too.
        feed_forward_factor: hidden size of the feed-forward block over the width, rounded up to a
            multiple of 64; None leaves the block out. The published models use 1.3.
        forget_activation: `"sigmoid"` or `"exponential"`.
        recurrent_gradient_clip: as in `sLSTM`; None is exact.
        dropout: fraction of sLSTM's outputs to drop.
        epsilon: of all norms.
        kernel_initializer: of the projections in; `"small_init"` knows the model's width.
        output_initializer: of the projection out; `"wang_init"` knows `num_blocks` too.
        recurrent_initializer: of each head's recurrent kernel.
        forget_gate_bias_initializer: `"power_law"` knows `block_index` and `num_blocks`.
        block_index, num_blocks: place in the stack, for the initialisers.
        seed: of the dropout.
        return_state: return the states too.
        remat: in training, compute the block again in the backward pass and store its input alone.
        use_kernel: as in `sLSTM`.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        sequences: (batch, time, features), floating point.
        initial_state: `[conv, h, c, n, m]` as `return_state` gives them, or None. Without the
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
    >>> keras_xlstm.layers.sLSTMBlock(num_heads=4)(x).shape
    (2, 10, 32)
    """

    def __init__(
        self,
        num_heads=4,
        conv_kernel_size=4,
        feed_forward_factor=1.3,
        forget_activation="sigmoid",
        recurrent_gradient_clip=None,
        dropout=0.0,
        epsilon=1e-5,
        kernel_initializer="small_init",
        output_initializer="wang_init",
        recurrent_initializer="zeros",
        forget_gate_bias_initializer="power_law",
        block_index=0,
        num_blocks=1,
        seed=None,
        return_state=False,
        remat=False,
        use_kernel="auto",
        **kwargs,
    ):
        super().__init__(
            num_heads, dropout, epsilon, kernel_initializer, output_initializer, block_index,
            num_blocks, seed, return_state, remat, use_kernel, **kwargs,
        )  # fmt: skip
        if forget_activation not in ("sigmoid", "exponential"):
            raise ValueError(
                '`forget_activation` must be "sigmoid" or "exponential". '
                f"Received: forget_activation={forget_activation!r}."
            )
        xlstm_ops.check_clip(recurrent_gradient_clip)
        self.conv_kernel_size = self._check_taps(conv_kernel_size)
        self.feed_forward_factor = feed_forward_factor
        if feed_forward_factor is not None:
            self._check_factor("feed_forward_factor", feed_forward_factor)
        self.forget_activation = forget_activation
        self.recurrent_gradient_clip = recurrent_gradient_clip
        self.recurrent_initializer = initializers.get(recurrent_initializer)
        self.forget_gate_bias_initializer = initializers.get(
            forget_gate_bias_initializer, block_index=block_index, num_blocks=num_blocks
        )

    @property
    def state_names(self):
        return (*("conv",) * bool(self.conv_kernel_size), "h", "c", "n", "m")

    def _state_shapes(self, batch_size):
        shapes = [(batch_size, self.dim)] * 4
        if self.conv_kernel_size:
            shapes.insert(0, (batch_size, self.conv_kernel_size - 1, self.dim))
        return shapes

    def _build(self, dim):
        self._check_divides("num_heads", self.num_heads, dim)
        H, D = self.num_heads, dim // self.num_heads
        self.norm = layer_norm(self, "norm", dim)
        self.convolution = None
        if self.conv_kernel_size:
            self.convolution = CausalConv1D(
                self.conv_kernel_size, dtype=self.dtype_policy, name="convolution"
            )
            self.convolution.build((None, None, dim))
        self.input_gate, self.forget_gate, self.cell_input, self.output_gate = (
            block_diagonal(self, name, H, D, False, offset)
            for offset, name in enumerate(
                ("input_gate", "forget_gate", "cell_input", "output_gate"), start=1
            )
        )
        self.recurrent_kernel = self.add_weight(
            name="recurrent_kernel", shape=(H, D, 4, D), initializer=self._draw_recurrent,
            autocast=False,
        )  # fmt: skip
        self.bias = self.add_weight(
            name="bias", shape=(4, H, D), initializer=self._draw_bias, autocast=False
        )
        self.head_norm = MultiHeadNorm(H, self.epsilon, dtype=self.dtype_policy, name="head_norm")
        self.head_norm.build((None, None, dim))
        self.feed_forward_norm = self.feed_forward = None
        if self.feed_forward_factor is not None:
            self.feed_forward_norm = layer_norm(self, "feed_forward_norm", dim)
            self.feed_forward = GatedFeedForward(
                rounded_up(self.feed_forward_factor * dim, 64),
                kernel_initializer=self._initializer(self.kernel_initializer, 5),
                output_initializer=self._initializer(self.output_initializer, 6),
                dtype=self.dtype_policy,
                name="feed_forward",
            )
            self.feed_forward.build((None, None, dim))

    def _draw_recurrent(self, shape, dtype=None):
        H, D, _, _ = shape
        draws = (self._initializer(self.recurrent_initializer, head) for head in range(H))
        return ops.reshape(ops.stack([draw((D, 4 * D), dtype=dtype) for draw in draws]), shape)

    def _draw_bias(self, shape, dtype=None):
        zeros = ops.zeros(shape[1:], dtype)
        forget = self.forget_gate_bias_initializer(shape[1:], dtype=dtype)
        return ops.stack([zeros, forget, zeros, zeros])

    def _run(self, x, state, mask, segment_ids, dropped):
        batch, time = ops.shape(x)[:2]
        heads = (self.num_heads, self.dim // self.num_heads)
        u = self.norm(x)
        convolved, new = u, []
        if self.convolution is not None:
            conv, *state = state
            convolved, conv = self.convolution(u, conv, mask, segment_ids)
            convolved, new = ops.silu(convolved), [conv]
        u, convolved = (ops.reshape(a, (batch, time, *heads)) for a in (u, convolved))
        gates = [
            self.input_gate(convolved), self.forget_gate(convolved), self.cell_input(u),
            self.output_gate(u),
        ]  # fmt: skip
        h, state = xlstm_ops.slstm(
            ops.cast(ops.stack(gates, axis=2), self.compute_dtype),
            ops.cast(self.recurrent_kernel, self.compute_dtype),
            self.bias,
            initial_state=[ops.reshape(s, (batch, *heads)) for s in state],
            mask=mask,
            segment_ids=segment_ids,
            return_state=True,
            forget_gate="exp" if self.forget_activation == "exponential" else "sigmoid",
            recurrent_gradient_clip=self.recurrent_gradient_clip,
            implementation=backends.prefer(self.use_kernel),
        )
        y = ops.reshape(h, (batch, time, self.dim))
        x = x + self.head_norm(y if dropped is None else y * dropped)
        if self.feed_forward is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, [*new, *(ops.reshape(s, (batch, self.dim)) for s in state)]

    def get_config(self):
        return {
            **super().get_config(),
            "conv_kernel_size": self.conv_kernel_size,
            "feed_forward_factor": self.feed_forward_factor,
            "forget_activation": self.forget_activation,
            "recurrent_gradient_clip": self.recurrent_gradient_clip,
            "recurrent_initializer": initializers.serialize(self.recurrent_initializer),
            "forget_gate_bias_initializer": initializers.serialize(
                self.forget_gate_bias_initializer
            ),
        }
