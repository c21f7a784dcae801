"""Keras layers of xLSTM."""

from keras_xlstm.layers.convolution import CausalConv1D
from keras_xlstm.layers.feed_forward import GatedFeedForward
from keras_xlstm.layers.large_block import xLSTMLargeBlock
from keras_xlstm.layers.mlstm import mLSTM
from keras_xlstm.layers.mlstm_block import mLSTMBlock
from keras_xlstm.layers.norms import MultiHeadNorm
from keras_xlstm.layers.slstm import sLSTM
from keras_xlstm.layers.slstm_block import sLSTMBlock
from keras_xlstm.layers.slstm_cell import sLSTMCell
from keras_xlstm.layers.soft_cap import SoftCap
from keras_xlstm.layers.states import state_from_lstm

__all__ = [
    "CausalConv1D",
    "GatedFeedForward",
    "MultiHeadNorm",
    "SoftCap",
    "mLSTM",
    "mLSTMBlock",
    "sLSTM",
    "sLSTMBlock",
    "sLSTMCell",
    "state_from_lstm",
    "xLSTMLargeBlock",
]
