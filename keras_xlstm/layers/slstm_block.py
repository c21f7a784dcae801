"""The paper's residual block around sLSTM."""

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.compat import forget_bias
from keras_xlstm.layers.block import Block, block_diagonal, layer_norm
from keras_xlstm.layers.convolution import CausalConv1D
from keras_xlstm.layers.feed_forward import GatedFeedForward, rounded_up
from keras_xlstm.layers.norms import MultiHeadNorm
from keras_xlstm.validation import check_clip


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
        go_backwards: read the sequence from its end; outputs come in that order. States are then
            of the future: the initial one of steps behind the last, the new one of all, from the
            last to the first. `keras.layers.Bidirectional` adds a copy that does, with its own
            weights: twice the parameters and the time.
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
        go_backwards=False,
        **kwargs,
    ):
        forget_gate_bias_initializer = forget_bias(
            forget_gate_bias_initializer, kwargs, default="power_law"
        )
        super().__init__(
            num_heads, dropout, epsilon, kernel_initializer, output_initializer, block_index,
            num_blocks, seed, return_state, remat, use_kernel, go_backwards, **kwargs,
        )  # fmt: skip
        if forget_activation not in ("sigmoid", "exponential"):
            raise ValueError(
                '`forget_activation` must be "sigmoid" or "exponential". '
                f"Received: forget_activation={forget_activation!r}."
            )
        check_clip(recurrent_gradient_clip)
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
        backends.check_sequential()  # before the convolution, which gathers
        batch, time = ops.shape(x)[:2]
        heads = (self.num_heads, self.dim // self.num_heads)
        u = self.norm(x)
        convolved, new = u, []
        if self.convolution is not None:
            conv, state = self._split(state, batch)
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
            initial_state=state and [ops.reshape(s, (batch, *heads)) for s in state],
            mask=mask,
            segment_ids=segment_ids,
            return_state=True,
            forget_gate="exp" if self.forget_activation == "exponential" else "sigmoid",
            recurrent_gradient_clip=self.recurrent_gradient_clip,
            implementation=self._implementation,
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
