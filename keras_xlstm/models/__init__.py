"""Whole models of xLSTM blocks."""

from keras_xlstm.models import cloning, configs
from keras_xlstm.models.forecaster import xLSTMForecaster
from keras_xlstm.models.language_model import xLSTMLanguageModel
from keras_xlstm.models.stack import xLSTMStack
from keras_xlstm.models.state_files import load_state, save_state
from keras_xlstm.models.weight_decay import exclude_from_weight_decay

cloning.register()

__all__ = [
    "configs",
    "exclude_from_weight_decay",
    "load_state",
    "save_state",
    "xLSTMForecaster",
    "xLSTMLanguageModel",
    "xLSTMStack",
]
