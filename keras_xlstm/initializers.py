"""Gate-bias initialisers of the xLSTM paper's models, and how a layer draws for several kernels."""

import contextlib
import contextvars
import functools
import inspect

import keras
import numpy as np
from keras import ops

__all__ = [
    "LinspaceForgetBias",
    "PowerLawForgetBias",
    "SmallInit",
    "SpreadForgetBias",
    "WangInit",
    "get",
    "reseeded",
    "serialize",
]


_drawn = contextvars.ContextVar("keras_xlstm_drawn", default=True)


@contextlib.contextmanager
def undrawn():
    """Kernels that are made inside are zeros: they are about to be loaded. Drawing those of the 7B
    takes minutes, and on JAX eight times the memory of the kernel."""
    token = _drawn.set(False)
    try:
        yield
    finally:
        _drawn.reset(token)


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

    def __init__(self, block_index: int = 0, num_blocks: int = 1) -> None:
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

    def __init__(self, start: float = 3.0, stop: float = 6.0) -> None:
        self.start = start
        self.stop = stop

    def __call__(self, shape, dtype=None):
        values = np.linspace(self.start, self.stop, shape[-1])
        return _tensor(values, shape, dtype)

    def get_config(self):
        return {"start": self.start, "stop": self.stop}


@keras.saving.register_keras_serializable(package="keras_xlstm")
class SpreadForgetBias(LinspaceForgetBias):
    """Evenly spaced values over the last axis, a single one in the middle: the forget biases that
    `sLSTM` and `mLSTM` start with.

    With `"spread"` the units of a head of `sLSTM` get -2 to 4: memories of 1 to 50 steps. With
    `"spread_heads"` the heads of `mLSTM` get 1 to 6: memories of 4 to 400 steps.

    Args:
        start, stop: first and last value.

    Example:

    >>> bias = keras_xlstm.initializers.SpreadForgetBias()
    >>> keras.ops.convert_to_numpy(bias((4,))), keras.ops.convert_to_numpy(bias((1,)))
    (array([-2.,  0.,  2.,  4.], dtype=float32), array([1.], dtype=float32))
    """

    def __init__(self, start: float = -2.0, stop: float = 4.0) -> None:
        super().__init__(start, stop)

    def __call__(self, shape, dtype=None):
        if shape[-1] == 1:
            return _tensor((self.start + self.stop) / 2, shape, dtype)
        return super().__call__(shape, dtype)


class _Scaled(keras.initializers.RandomNormal):
    """Normal with a standard deviation that follows from sizes, `_stddev(dim)`."""

    def __init__(self, dim=None, seed=None):
        if dim is not None and not dim > 0:
            raise ValueError(
                "`dim` must be positive, or None for the first size of what is drawn. "
                f"Received: dim={dim!r}."
            )
        super().__init__(seed=seed)
        self.dim = dim

    def __call__(self, shape, dtype=None):
        if not _drawn.get():
            return ops.zeros(shape, dtype or keras.config.floatx())
        self.stddev = self._stddev(self.dim or shape[0])
        return super().__call__(shape, dtype=dtype)

    def get_config(self):
        return {"dim": self.dim, "seed": super().get_config()["seed"]}


@keras.saving.register_keras_serializable(package="keras_xlstm")
class SmallInit(_Scaled):
    """Normal, standard deviation sqrt(2 / (5 dim)): embeddings and input projections.

    Args:
        dim: width of the model; None takes the first size of what is drawn.
        seed: integer or None.

    Example:

    >>> keras_xlstm.initializers.SmallInit(dim=64)((64, 128)).shape
    (64, 128)
    """

    def _stddev(self, dim):
        return (2 / (5 * dim)) ** 0.5


@keras.saving.register_keras_serializable(package="keras_xlstm")
class WangInit(_Scaled):
    """Normal, standard deviation 2 / (num_blocks sqrt(dim)): projections back into the residual.

    Args:
        dim: width of the model; None takes the first size of what is drawn.
        num_blocks: residual blocks in the stack.
        seed: integer or None.

    Example:

    >>> keras_xlstm.initializers.WangInit(dim=64, num_blocks=24)((128, 64)).shape
    (128, 64)
    """

    def __init__(self, dim=None, num_blocks=1, seed=None):
        super().__init__(dim, seed)
        self.num_blocks = num_blocks

    def _stddev(self, dim):
        return 2 / (self.num_blocks * dim**0.5)

    def get_config(self):
        return {**super().get_config(), "num_blocks": self.num_blocks}


_BY_NAME = {
    "power_law": PowerLawForgetBias,
    "linspace": LinspaceForgetBias,
    "spread": SpreadForgetBias,
    "spread_heads": functools.partial(SpreadForgetBias, 1.0, 6.0),
    "small_init": SmallInit,
    "wang_init": WangInit,
}


def get(identifier, default=None, **sizes):
    """`keras.initializers.get`, which also knows "power_law", "linspace", "spread", "spread_heads",
    "small_init" and "wang_init"; those take what they need of `sizes` (dim, num_blocks,
    block_index).

    None is `default`, or an error where there is none: Keras leaves it to `add_weight`, which draws
    biases too.
    """
    identifier = default if identifier is None else identifier
    if identifier is None:
        raise ValueError(
            "An initializer must be a name, an Initializer or a function of (shape, dtype). "
            'Received: None. For no bias use "zeros".'
        )
    if isinstance(identifier, str) and identifier in _BY_NAME:
        kind = _BY_NAME[identifier]
        taken = inspect.signature(kind).parameters
        return kind(**{name: size for name, size in sizes.items() if name in taken})
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
