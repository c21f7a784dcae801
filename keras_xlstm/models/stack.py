"""xLSTMStack: residual blocks one after another, and what models of them share."""

import contextlib
from collections import OrderedDict

import keras
from keras import ops

from keras_xlstm.masks import steps_mask
from keras_xlstm.models.graph import block_names, stacked
from keras_xlstm.models.settings import ARGUMENTS, check_direction, settings_of
from keras_xlstm.models.side_inputs import SIDE
from keras_xlstm.models.training import BlockTraining
from keras_xlstm.validation import check_positive, check_segments


class StackModel(BlockTraining, keras.Model):
    """A functional model of blocks; a call may give padding and packed documents beside its input.

    A subclass sets `_main`, the name of its first input, and `_outer_dim`.
    """

    supports_masking = True
    _optional = ("padding_mask", "segment_ids")
    quantization = None

    # ------------------------------------------------------------------ calling

    def _named(self, inputs):
        """One tensor, or a dict that leaves inputs out, as the dict of all inputs.

        Ordered: Keras sorts the names of a plain dict, and would compare the padding mask with the
        model's input.
        """
        if not isinstance(inputs, dict):
            inputs = {self._main: inputs}
        unknown = set(inputs) - {self._main, *self._optional}
        if unknown or self._main not in inputs:
            raise ValueError(
                f"{type(self).__name__} takes one tensor, or a dict with {self._main!r} and, if "
                f"wanted, {' and '.join(map(repr, self._optional))}. "
                f"Received: a dict with {sorted(inputs)}."
            )
        return OrderedDict((name, inputs.get(name)) for name in (self._main, *self._optional))

    # Of one tensor, which `call` takes out of the dict that Keras would compare it with.
    input_spec = None

    def rematerialized_call(self, call, *args, **kwargs):
        return call  # under keras.RematScope each block computes itself again

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(self._named(inputs), *args, **kwargs)

    def call(self, inputs, training=None, mask=None):
        inputs = self._named(inputs)
        mask = None if mask is None else self._named(mask)[self._main]
        with self._side(inputs):
            outputs = super().call(inputs[self._main], training=training, mask=mask)
        # The last layer's outputs carry the mask: a copy does not.
        return outputs if self.settings["output_mask"] else ops.copy(outputs)

    @contextlib.contextmanager
    def _side(self, inputs):
        """Inside, blocks are given what these named inputs hold beside the main one."""
        side = [inputs[name] for name in self._optional]
        if side[1] is not None:
            check_segments(side[1])  # Keras would round them
        token = SIDE.set(side)
        try:
            yield
        finally:
            SIDE.reset(token)

    def compute_mask(self, inputs, mask=None):
        if not self.settings["output_mask"]:
            return None
        padding_mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
        mask = mask.get(self._main) if isinstance(mask, dict) else mask
        return steps_mask(mask if padding_mask is None else padding_mask)

    def compute_output_shape(self, input_shape):
        shape = input_shape[self._main] if isinstance(input_shape, dict) else input_shape
        return (*shape[:2], self._outer_dim)

    def compute_output_spec(self, inputs, training=None, mask=None):
        x = self._named(inputs)[self._main]
        return keras.KerasTensor((*x.shape[:2], self._outer_dim), dtype=self.outputs[0].dtype)

    # ------------------------------------------------------------------ states

    @property
    def blocks(self):
        """The residual blocks, first to last."""
        return [self.get_layer(name) for name in block_names(self.settings)]

    @property
    def direction(self):
        """Which way the blocks read."""
        return self.settings.get("direction", "forward")

    def _check_carries(self, method):
        if self.direction != "forward":
            raise ValueError(
                f"{type(self).__name__}.{method} is for states that go on from the past, and some "
                f"blocks of {self.name} read from the end. Received: a model with "
                f"direction={self.direction!r}. Call the model with whole sequences, or build it "
                'with direction="forward". States of both directions: '
                "keras.layers.Bidirectional(mLSTMBlock(return_state=True))."
            )

    def get_initial_state(self, batch_size):
        """A fresh state: per block, a list of zeros. Its size does not depend on any length."""
        self._check_carries("get_initial_state")
        return [block.get_initial_state(batch_size) for block in self.blocks]

    def _run_blocks(self, x, state, padding_mask=None, segment_ids=None, runners=None):
        """All blocks and the norm, from a state. By `runners`, {kind of block: runner}, without the
        layers' own calls, which take longer than a single step's kernels."""
        new, blocks = [], self.blocks
        for block, before in zip(blocks, state or [None] * len(blocks), strict=True):
            if runners is None:
                x, *after = block(
                    x, initial_state=before, mask=padding_mask, segment_ids=segment_ids,
                    training=False, return_state=True,
                )  # fmt: skip
            else:
                x = ops.cast(x, block.compute_dtype)
                x, after = runners[type(block)](block, x, list(before), padding_mask, None, None)
                x = ops.cast(x, block.compute_dtype)
            new.append(list(after))
        return (self.get_layer("norm")(x) if self.settings["final_norm"] else x), new

    # ------------------------------------------------------------------ adapting

    def with_graph(self, inputs, outputs):
        """A model of this class and these settings, of other layers: what a clone is."""
        new = type(self).__new__(type(self))
        super(StackModel, new).__init__(inputs=inputs, outputs=outputs, name=self.name)
        new.settings, new._outer_dim = dict(self.settings), self._outer_dim
        new.quantization = self.quantization
        return new

    def enable_lora(self, rank, lora_alpha=None):
        """Freezes the model and adds trainable low-rank updates to the projections of all blocks.

        Args:
            rank: of the updates.
            lora_alpha: scale of the updates times rank; None takes rank.
        """
        check_positive("rank", rank)
        for variable in self.weights:
            variable.trainable = False
        for block in self.blocks:
            for layer in block._flatten_layers(include_self=False):
                if type(layer) is keras.layers.Dense and layer not in self._gates():
                    layer.enable_lora(rank, lora_alpha=lora_alpha)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """`keras.Model.quantize` of all projections, embedding and head, as with "int8".

        The input and forget gates of a memory are exponents and few numbers per step: they stay
        in float32. A quantised model is saved and loaded like any other, unless `filters` are
        given, which its file does not hold.
        """
        # Up to Keras 3.15 there is a config by now, of a mode, too.
        self.quantization = (mode if config is None else config) if filters is None else None
        if filters is None:
            gates = self._gates()
            filters = lambda layer: layer not in gates  # noqa: E731
        return super().quantize(mode, config=config, filters=filters, **kwargs)

    def _gates(self):
        return [gate for block in self.blocks for gate in (block.input_gate, block.forget_gate)]

    def get_config(self):
        config = {**self.settings, "quantization": self.quantization}
        config = keras.saving.serialize_keras_object(config)
        return {**config, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = keras.saving.deserialize_keras_object(dict(config), custom_objects)
        trainable, quantization = config.pop("trainable", True), config.pop("quantization", None)
        model = cls(**config)
        if quantization is not None:
            by_mode = isinstance(quantization, str)
            model.quantize(**{"mode" if by_mode else "config": quantization})
        model.trainable = trainable
        return model


@keras.saving.register_keras_serializable(package="keras_xlstm")
class xLSTMStack(StackModel):
    """Residual xLSTM blocks, for any sequence of features.

    A functional model from (batch, time, units) to the same:
    [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517), section 2.4.

    Args:
        units: features of the sequences, in and out.
        {arguments}
        direction: `"forward"`: a step sees those before it alone, and states can be carried on.
            `"alternate"`: blocks 1, 3, 5, ... read from the end, as in
            [Vision-LSTM](https://arxiv.org/abs/2406.04303): parameters and time stay the same.
            `"both"`: each block has a second one, with weights of its own, that reads from the
            end, and the mean of the two goes on: twice the parameters and the time. It is
            `keras.layers.Bidirectional(block, merge_mode="ave")` that knows packed documents.
            Padding stays where it is, and documents stay apart.

    Inputs: sequences (batch, time, units), or a dict of `"sequences"` and arrays (batch, time):
    if wanted `"padding_mask"`, True for real steps; if wanted `"segment_ids"`, integers that
    change where a packed sequence begins. The mask of `Masking` or `Embedding(mask_zero=True)`
    is honoured too.

    Output: (batch, time, units).

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> sequences = keras.Input((None, 6))
    >>> x = keras.layers.Dense(64)(sequences)
    >>> x = keras_xlstm.models.xLSTMStack(64, num_blocks=2, pattern="1:1")(x)
    >>> model = keras.Model(sequences, keras.layers.Dense(1)(x[:, -1]))
    >>> model(np.ones((2, 10, 6))).shape
    (2, 1)
    """

    _main = "sequences"

    def __init__(
        self,
        units,
        num_blocks,
        num_heads=4,
        architecture="paper",
        pattern=None,
        slstm_at=None,
        mlstm_options=None,
        slstm_options=None,
        dropout=0.0,
        final_norm=True,
        seed=None,
        remat=False,
        use_kernel="auto",
        dtype=None,
        name=None,
        output_mask=True,
        direction="forward",
    ):
        settings = settings_of(
            units, num_blocks, num_heads, architecture, pattern, slstm_at, mlstm_options,
            slstm_options, dropout, final_norm, seed, remat, use_kernel, dtype, output_mask,
        )  # fmt: skip
        settings["direction"] = check_direction(direction, num_blocks)
        sequences = keras.Input((None, units), name="sequences")
        super().__init__(inputs=sequences, outputs=stacked(settings, sequences), name=name)
        self.settings = settings
        self._outer_dim = units

    def call(self, inputs, training=None, mask=None):
        inputs = self._named(inputs)
        self.blocks[0]._check(inputs["sequences"])  # Keras would make floats of integers
        padding_mask = inputs["padding_mask"]
        if padding_mask is None and mask is not None:
            padding_mask = self._named(mask)["sequences"]
        inputs["sequences"] = self._without_padding(inputs["sequences"], padding_mask)
        return super().call(inputs, training=training, mask=mask)

    def _without_padding(self, sequences, mask):
        """Zeros at masked steps: they go by the blocks to the norm, where NaN would reach the
        gradient of its scale."""
        if mask is None:
            return sequences
        self.blocks[0]._check_mask(mask, sequences)
        mask = steps_mask(ops.cast(mask, "bool"))
        return ops.where(mask[:, :, None], sequences, ops.zeros_like(sequences))

    def run(self, sequences, state, padding_mask=None, segment_ids=None):
        """The same, from a state and with the new one: `(outputs, state)`.

        Args:
            sequences: (batch, time, units).
            state: as `get_initial_state(batch)` or an earlier call gives it; None starts empty.
            padding_mask, segment_ids: as in the inputs, or None.

        Raises:
            ValueError: with a `direction` other than "forward".
        """
        self._check_carries("run")
        sequences = self._without_padding(sequences, padding_mask)
        return self._run_blocks(sequences, state, padding_mask, segment_ids)


xLSTMStack.__doc__ = xLSTMStack.__doc__.replace("{arguments}", ARGUMENTS)
