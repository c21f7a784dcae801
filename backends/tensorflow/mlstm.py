"""The mLSTM on TensorFlow: the native form, compiled by XLA one pass at a time."""

from keras_xlstm.backends import reference
from keras_xlstm.backends.tensorflow import xla

mlstm = xla.compiled(reference.mlstm)


def unsupported(q=None, v=None, chunk_size=None):
    """Why XLA cannot run the native form on these tensors, or None."""
    return xla.unsupported()


def not_preferred(q, v=None, chunk_size=None):
    """Why it is better not picked for these tensors unless it is asked for, or None."""
    return xla.not_preferred(q)
