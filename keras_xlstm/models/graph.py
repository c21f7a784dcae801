"""The residual blocks of a model as a graph: their kinds, names and directions."""

import keras
from keras import ops

from keras_xlstm.layers import mLSTMBlock, sLSTMBlock, xLSTMLargeBlock
from keras_xlstm.layers.base import plain
from keras_xlstm.layers.norms import LayerNormalization, RMSNormalization
from keras_xlstm.models.side_inputs import SideInputs


@keras.saving.register_keras_serializable(package="keras_xlstm")
class ReverseTime(keras.layers.Layer):
    """The steps of (batch, time, features) in the opposite order, and their mask.

    Example:

    >>> keras_xlstm.models.graph.ReverseTime()(np.array([[[1.0], [2.0]]]))[0, 0, 0] == 2
    True
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return ops.flip(inputs, axis=1)

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else ops.flip(mask, axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config()  # Keras's own guess cannot write a dtype policy


def readers(settings, index):
    """Of the blocks that stand at one place: {name: whether it reads from the end}."""
    direction = settings.get("direction", "forward")  # older files do not say it
    if direction == "both":
        return {f"block_{index}": False, f"block_{index}_backward": True}
    return {f"block_{index}": direction == "alternate" and index % 2 == 1}


def block_names(settings):
    """All blocks, first to last."""
    return [name for index in range(settings["num_blocks"]) for name in readers(settings, index)]


def stacked(settings, x):
    """The blocks on symbolic inputs."""
    side_inputs, seed = SideInputs(name="side_inputs"), settings["seed"]
    names = block_names(settings)
    for index in range(settings["num_blocks"]):
        kind, options = _kind(settings, index)
        outputs, dtype = [], settings["dtype"]
        for name, go_backwards in readers(settings, index).items():
            arguments = {
                "num_heads": settings["num_heads"],
                "dropout": settings["dropout"],
                "block_index": index,
                "num_blocks": settings["num_blocks"],
                "seed": None if seed is None else seed + names.index(name),
                "remat": settings["remat"],
                "use_kernel": settings["use_kernel"],
                "dtype": dtype,
                **options,
            }
            block = kind(**arguments, go_backwards=go_backwards, name=name)
            padding_mask, segment_ids = side_inputs(x)
            y = block(x, mask=padding_mask, segment_ids=segment_ids)
            if go_backwards:
                with plain():
                    y = ReverseTime(dtype=dtype, name=f"{name}_in_order")(y)
            outputs.append(y)
        x = outputs[0]
        if len(outputs) > 1:
            with plain():
                x = keras.layers.Average(dtype=dtype, name=f"block_{index}_mean")(outputs)
    return _final_norm(settings, x, block.epsilon) if settings["final_norm"] else x


def _kind(settings, index):
    """The class of a block, and the arguments that the user gave for that class."""
    if settings["architecture"] == "large":
        return xLSTMLargeBlock, settings["mlstm_options"]
    if index in settings["slstm_at"]:
        return sLSTMBlock, settings["slstm_options"]
    return mLSTMBlock, settings["mlstm_options"]


def _final_norm(settings, x, epsilon):
    options = {"epsilon": epsilon, "dtype": settings["dtype"], "name": "norm"}
    with plain():
        if settings["architecture"] == "large":
            norm = RMSNormalization(**options)
            norm.supports_masking = True  # it acts on every step by itself
        else:
            norm = LayerNormalization(center=False, **options)
    return norm(x)
