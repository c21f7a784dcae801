"""Keras layers of xLSTM."""

from keras_xlstm.layers.mlstm import mLSTM
from keras_xlstm.layers.parts import MultiHeadNorm
from keras_xlstm.layers.slstm import sLSTM
from keras_xlstm.layers.slstm_cell import sLSTMCell

__all__ = ["MultiHeadNorm", "mLSTM", "sLSTM", "sLSTMCell"]
