"""Gate-bias initialisers of the xLSTM paper's models, and how a layer draws for several kernels."""

import keras
import numpy as np
from keras import ops

__all__ = ["LinspaceForgetBias", "PowerLawForgetBias", "get", "reseeded", "serialize"]


def _tensor(values, shape, dtype):
    values = np.broadcast_to(values, shape).copy()
    return ops.convert_to_tensor(values, dtype=dtype or keras.config.floatx())


@keras.saving.register_keras_serializable(package="keras_xlstm")
class PowerLawForgetBias(keras.initializers.Initializer):
    """Forget biases of an sLSTM head from +5 to -7 by a power law: memories from long to short.

    Unit k of d gets `5 - 12 (k / (d - 1)) ** (0.3 + 1.3 r)`, r = block_index / (num_blocks - 1):
    later blocks remember longer. Every head, the last axis, gets the same values.

    Args:
        block_index: position of the layer's block in its stack, from 0.
        num_blocks: blocks in the stack.

    Example:

    >>> bias = keras_xlstm.initializers.PowerLawForgetBias()((4, 3))
    >>> bias.shape
    (4, 3)
    """

    def __init__(self, block_index=0, num_blocks=1):
        if not 0 <= block_index < num_blocks:
            raise ValueError(
                "`block_index` must be from 0 to num_blocks - 1. Received: "
                f"block_index={block_index}, num_blocks={num_blocks}."
            )
        self.block_index = block_index
        self.num_blocks = num_blocks

    def __call__(self, shape, dtype=None):
        ratio = self.block_index / max(self.num_blocks - 1, 1)
        position = np.linspace(0.0, 1.0, shape[-1])
        values = 5.0 - 12.0 * position ** (0.3 + 1.3 * ratio)
        return _tensor(values, shape, dtype)

    def get_config(self):
        return {"block_index": self.block_index, "num_blocks": self.num_blocks}


@keras.saving.register_keras_serializable(package="keras_xlstm")
class LinspaceForgetBias(keras.initializers.Initializer):
    """Evenly spaced values over the last axis: the mLSTM forget biases of the published models.

    Args:
        start, stop: first and last value.

    Example:

    >>> keras.ops.convert_to_numpy(keras_xlstm.initializers.LinspaceForgetBias()((4,)))
    array([3., 4., 5., 6.], dtype=float32)
    """

    def __init__(self, start=3.0, stop=6.0):
        self.start = start
        self.stop = stop

    def __call__(self, shape, dtype=None):
        values = np.linspace(self.start, self.stop, shape[-1])
        return _tensor(values, shape, dtype)

    def get_config(self):
        return {"start": self.start, "stop": self.stop}


_BY_NAME = {"power_law": PowerLawForgetBias, "linspace": LinspaceForgetBias}


def get(identifier):
    """`keras.initializers.get`, which also knows "power_law" and "linspace"."""
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    return keras.initializers.get(identifier)


serialize = keras.initializers.serialize


def reseeded(initializer, offset):
    """The initialiser with another seed, for a further kernel of the same layer.

    A Keras initialiser draws the same numbers at every call, so one instance shared by several
    kernels of equal shape would make them equal.
    """
    if isinstance(getattr(initializer, "seed", None), int):
        config = initializer.get_config()
        return type(initializer).from_config({**config, "seed": initializer.seed + offset})
    return initializer
