"""What the residual blocks share: the call, states, masks, recomputation, sub-layers."""

import keras
from keras import ops

from keras_xlstm import backends, initializers
from keras_xlstm.layers.base import StateLayer, plain
from keras_xlstm.layers.norms import LayerNormalization
from keras_xlstm.layers.projections import BlockDiagonal, Gate
from keras_xlstm.masks import from_the_end, mask_and_segments, steps_mask
from keras_xlstm.validation import (
    check_flag,
    check_positive,
    check_rate,
    check_use_kernel,
    freeze,
    load_variables,
)


def run_plain(block, *arguments, states=True):
    """`block._run(*arguments)`; `states`: whether anybody reads the new state."""
    if block.use_kernel is not False:
        return block._run(*arguments)
    with backends.use(block._implementation):  # of what is around the memory, too
        return block._run(*arguments)


class Block(StateLayer):
    """(B, T, D) to (B, T, D), with a carried state.

    A subclass defines `state_names`, `_state_shapes(batch_size)`, `_build(dim)` and
    `_run(x, state, mask, segment_ids, dropped)`, which returns the block's output, its residual
    included, and the new state; `dropped` is None or a dropout mask of x's shape.
    """

    # What runs `_run`: this, or compiled (the backends' compile_blocks.py), or with weights that
    # other processes hold (torch's fsdp.py).
    runner = staticmethod(run_plain)

    # What keras.layers.Bidirectional also asks of a layer.
    return_sequences, stateful, states = True, False, None

    def __init__(
        self,
        num_heads,
        dropout,
        epsilon,
        kernel_initializer,
        output_initializer,
        block_index,
        num_blocks,
        seed,
        return_state,
        remat,
        use_kernel,
        go_backwards,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive("num_heads", num_heads)
        check_positive("num_blocks", num_blocks)
        if isinstance(block_index, bool) or block_index not in range(num_blocks):
            raise ValueError(
                "`block_index` must be from 0 to num_blocks - 1. Received: "
                f"block_index={block_index!r}, num_blocks={num_blocks}."
            )
        self.num_heads = num_heads
        self.dropout = check_rate("dropout", dropout)
        self.epsilon = epsilon
        # Resolved when the width is known; a name stays a name in the config.
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.output_initializer = initializers.get(output_initializer, num_blocks=num_blocks)
        self.block_index = block_index
        self.num_blocks = num_blocks
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.return_state = check_flag("return_state", return_state)
        self.remat = check_flag("remat", remat)
        self.use_kernel = check_use_kernel(use_kernel)
        self.go_backwards = check_flag("go_backwards", go_backwards)
        self.dim = None

    # ------------------------------------------------------------------ checks

    def _check_factor(self, name, factor):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
            raise ValueError(f"`{name}` must be a positive number. Received: {name}={factor!r}.")
        return factor

    def _check_taps(self, size):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(
                "`conv_kernel_size` must be a positive integer, or 0 for no convolution. "
                f"Received: conv_kernel_size={size!r}."
            )
        return size

    def _check_input_gate(self, input_gate):
        if input_gate not in ("exponential", "sigmoid"):
            raise ValueError(
                '`input_gate` must be "exponential" or "sigmoid". '
                f"Received: input_gate={input_gate!r}."
            )
        return input_gate

    def _check_divides(self, name, value, width):
        if width % value:
            raise ValueError(
                f"`{name}` of {type(self).__name__} must divide the width that it splits, "
                f"{width} for {self.dim} features. Received: {name}={value}."
            )

    @property
    def _implementation(self):
        """What `use_kernel`, or the user around this call, asks of the op."""
        return backends.prefer(self.use_kernel)

    # ------------------------------------------------------------------ sub-layers

    def build(self, sequences_shape, initial_state_shape=None, segment_ids_shape=None):
        self.dim = self._known_features(sequences_shape)
        with plain():
            self._build(self.dim)
        freeze(self)

    def _initializer(self, initializer, offset):
        """The initialiser for one of several kernels; scaled ones are told the model's width.

        Reseeded by the block too: a whole stack, and both directions of a
        `keras.layers.Bidirectional`, may have been given the same instance.
        """
        if getattr(initializer, "dim", 0) is None:
            config = {**initializer.get_config(), "dim": self.dim}
            initializer = type(initializer).from_config({**config, "seed": initializer.seed})
        offset += 100 * self.block_index + 50 * self.go_backwards
        return initializers.reseeded(initializer, offset)

    def _gate(self, name, width, bias_initializer):
        # In float32 whatever the policy.
        layer = Gate(
            self.num_heads,
            kernel_initializer="zeros",
            bias_initializer=bias_initializer,
            dtype=self.state_dtype,
            name=name,
        )
        layer.build((None, None, width))
        return layer

    # ------------------------------------------------------------------ the call

    def call(
        self,
        sequences,
        initial_state=None,
        mask=None,
        segment_ids=None,
        training=False,
        return_state=None,
        sequences_mask=None,
    ):
        # With several tensor arguments Keras hands the mask of the first over as
        # <its name>_mask.
        mask = sequences_mask if mask is None else mask
        self._check(sequences, initial_state, mask, return_state)
        state = self._initial_state(initial_state)
        inputs = ops.cast(sequences, self.compute_dtype)
        mask = None if mask is None else steps_mask(ops.cast(mask, "bool"))
        if segment_ids is not None:
            sizes = {"B": sequences.shape[0], "T": sequences.shape[1]}
            sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
            mask, segment_ids = mask_and_segments(mask, segment_ids, sizes)
        if self.go_backwards:
            inputs, mask, segment_ids = from_the_end(self.name, inputs, mask, segment_ids)
        x = inputs
        if mask is not None:
            # Whatever padding holds, NaN too, must not reach a weight's gradient.
            x = ops.where(mask[:, :, None], x, ops.zeros_like(x))
        dropped = None
        if training and self.dropout:
            # Drawn here: not in what may run a second time.
            dropped = self._drawn(ops.shape(x), self.dropout, x.dtype)

        return_state = self.return_state if return_state is None else return_state
        runner = self.runner

        def run(x, *state):
            arguments = x, list(state) or None, mask, segment_ids, dropped
            y, state = runner(self, *arguments, states=return_state)
            return (ops.cast(y, self.compute_dtype), *state)

        run = backends.remat(run) if self.remat and training else run
        outputs, *state = run(x, *(state or ()))
        if mask is not None:
            outputs = ops.where(mask[:, :, None], outputs, inputs)
        return (outputs, *state) if return_state else outputs

    def _split(self, state, batch):
        """The convolution's state and that of the memory, which is None for a fresh start."""
        if state is not None:
            return state[0], state[1:]
        return ops.zeros(self._state_shapes(batch)[0], self.state_dtype), None

    def compute_output_shape(
        self, sequences_shape, initial_state_shape=None, segment_ids_shape=None
    ):
        if not self.return_state:
            return sequences_shape
        return (sequences_shape, *self._state_shapes(sequences_shape[0]))

    def compute_output_spec(
        self,
        sequences,
        initial_state=None,
        mask=None,
        segment_ids=None,
        training=False,
        return_state=None,
        sequences_mask=None,
    ):
        mask = sequences_mask if mask is None else mask
        self._check(sequences, initial_state, mask, return_state)
        output = keras.KerasTensor(sequences.shape, dtype=self.compute_dtype)
        if not (self.return_state if return_state is None else return_state):
            return output
        shapes = self._state_shapes(sequences.shape[0])
        return (output, *(keras.KerasTensor(s, dtype=self.state_dtype) for s in shapes))

    def compute_mask(self, sequences, mask=None):
        mask = steps_mask(mask[0] if isinstance(mask, (list, tuple)) else mask)
        if self.go_backwards and mask is not None:
            mask = ops.flip(mask, axis=1)  # as the outputs
        return (mask, *[None] * len(self.state_names)) if self.return_state else mask

    # ------------------------------------------------------------------ files

    def save_own_variables(self, store):
        for variable in self._trainable_variables:
            store[variable.name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        load_variables(self, self._trainable_variables, store)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "epsilon": self.epsilon,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "output_initializer": initializers.serialize(self.output_initializer),
            "block_index": self.block_index,
            "num_blocks": self.num_blocks,
            "seed": self.seed,
            "return_state": self.return_state,
            "remat": self.remat,
            "use_kernel": self.use_kernel,
            "go_backwards": self.go_backwards,
        }


def dense(block, name, width, units, use_bias=False, initializer=None, offset=0):
    """A built Dense of a block."""
    layer = keras.layers.Dense(
        units,
        use_bias=use_bias,
        kernel_initializer=block._initializer(initializer or block.kernel_initializer, offset),
        dtype=block.dtype_policy,
        name=name,
    )
    layer.build((None, None, width))
    return layer


def block_diagonal(block, name, blocks, size, use_bias, offset):
    """A built projection (B, T, blocks, size) to the same, each of the blocks by itself."""
    layer = BlockDiagonal(
        blocks,
        size,
        use_bias,
        kernel_initializer=block._initializer(block.kernel_initializer, offset),
        dtype=block.dtype_policy,
        name=name,
    )
    layer.build((None, None, blocks, size))
    return layer


def layer_norm(block, name, dim):
    """A built layer norm, without a bias as in the published models."""
    layer = LayerNormalization(
        epsilon=block.epsilon, center=False, dtype=block.dtype_policy, name=name
    )
    layer.build((None, None, dim))
    return layer
