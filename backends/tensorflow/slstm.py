"""The sLSTM on TensorFlow: the native form, compiled by XLA one pass at a time."""

from keras_xlstm.backends import reference
from keras_xlstm.backends.tensorflow import xla

slstm = xla.compiled(reference.slstm)


def unsupported(x=None):
    """Why XLA cannot run the native form on these tensors, or None."""
    return xla.unsupported()


def not_preferred(x):
    """Why it is better not picked for these tensors unless it is asked for, or None."""
    return xla.not_preferred(x)
