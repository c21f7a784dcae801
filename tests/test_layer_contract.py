"""Keras's own check of a layer, `run_layer_test`, for every layer of the package.

It serialises and revives, builds, calls with symbolic and with real tensors, trains a step as the
backend does by default, and compares dtypes under mixed precision (on torch with a GPU alone).
"""

import keras
import numpy as np
import pytest
from keras.src import testing
from tools import array

from keras_xlstm import layers

ROW, SEQUENCE = (3, 4), (3, 5, 8)
# As keras.layers.LSTM of this version of Keras.
RECURRENT = {"input_shape": SEQUENCE, "supports_masking": keras.layers.LSTM(1).supports_masking}
BLOCK = {"input_shape": SEQUENCE, "expected_output_shape": SEQUENCE, "supports_masking": True}
# Around LSTM, too, TimeDistributed declares its own dtype and returns that of the layer within.
DISTRIBUTED = {
    "supports_masking": keras.layers.TimeDistributed(keras.layers.Dense(1)).supports_masking,
    "run_mixed_precision_check": False,
}
# name: layer, its arguments, those of the check.
CASES = {
    "sLSTM": (
        layers.sLSTM,
        {"units": 6, "num_heads": 2, "dropout": 0.2, "recurrent_dropout": 0.2},
        {"expected_output_shape": (3, 6), "expected_num_trainable_weights": 3, **RECURRENT},
    ),
    "sLSTM, sequences": (
        layers.sLSTM,
        {
            "units": 6, "return_sequences": True, "forget_activation": "exponential",
            "kernel_regularizer": "l2", "recurrent_regularizer": "l2", "bias_regularizer": "l1",
            "recurrent_initializer": "orthogonal",
        },
        {"expected_output_shape": (3, 5, 6), "expected_num_losses": 3, **RECURRENT},
    ),
    "mLSTM": (
        layers.mLSTM,
        {"units": 6, "num_heads": 2, "dropout": 0.2},
        {"expected_output_shape": (3, 6), **RECURRENT},
    ),
    "mLSTM, sequences": (
        layers.mLSTM,
        {
            "units": 6, "return_sequences": True, "key_dim": 4, "value_dim": 3, "use_bias": True,
            "kernel_regularizer": "l2", "gate_soft_cap": 15.0, "go_backwards": True,
        },
        {"expected_output_shape": (3, 5, 6), "expected_num_losses": 5, **RECURRENT},
    ),
    "sLSTMCell in RNN": (
        keras.layers.RNN,
        {"cell": layers.sLSTMCell(6, num_heads=2)},
        {
            "expected_output_shape": (3, 6), "expected_num_trainable_weights": 3,
            "expected_num_seed_generators": 0, **RECURRENT,
        },
    ),
    "sLSTMCells in RNN": (
        keras.layers.RNN,
        {"cell": [layers.sLSTMCell(6), layers.sLSTMCell(4)], "return_sequences": True},
        {
            "expected_output_shape": (3, 5, 4), "expected_num_trainable_weights": 6, **RECURRENT,
        },
    ),
    "Bidirectional(sLSTM)": (
        keras.layers.Bidirectional,
        {"layer": layers.sLSTM(4), "merge_mode": "sum"},
        {"expected_output_shape": (3, 4), "expected_num_trainable_weights": 6, **RECURRENT},
    ),
    "Bidirectional(mLSTM)": (
        keras.layers.Bidirectional,
        {"layer": layers.mLSTM(4, return_sequences=True)},
        {"expected_output_shape": (3, 5, 8), **RECURRENT},
    ),
    "Bidirectional(mLSTMBlock)": (
        keras.layers.Bidirectional,
        {"layer": layers.mLSTMBlock(num_heads=2), "merge_mode": "ave"},
        {"expected_output_shape": SEQUENCE, **RECURRENT},
    ),
    "TimeDistributed(sLSTM)": (
        keras.layers.TimeDistributed,
        {"layer": layers.sLSTM(4)},
        {"input_shape": (3, 2, 5, 8), "expected_output_shape": (3, 2, 4), **DISTRIBUTED},
    ),
    "TimeDistributed(mLSTM)": (
        keras.layers.TimeDistributed,
        {"layer": layers.mLSTM(4)},
        {"input_shape": (3, 2, 5, 8), "expected_output_shape": (3, 2, 4), **DISTRIBUTED},
    ),
    "mLSTMBlock": (
        layers.mLSTMBlock,
        {"num_heads": 2, "dropout": 0.2},
        BLOCK,
    ),
    "sLSTMBlock": (
        layers.sLSTMBlock,
        {"num_heads": 2, "dropout": 0.2},
        BLOCK,
    ),
    "xLSTMLargeBlock": (
        layers.xLSTMLargeBlock,
        {"num_heads": 2},
        BLOCK,
    ),
    "MultiHeadNorm": (
        layers.MultiHeadNorm,
        {"num_heads": 2},
        {
            "input_shape": SEQUENCE, "expected_output_shape": SEQUENCE, "supports_masking": True,
            "expected_num_trainable_weights": 1,
        },
    ),
    "CausalConv1D": (
        layers.CausalConv1D,
        {"kernel_size": 3},
        {
            "input_shape": {"inputs_shape": SEQUENCE, "state_shape": (3, 2, 8)},
            "expected_output_shape": (SEQUENCE, (3, 2, 8)), "supports_masking": True,
            "run_training_check": False,  # that one gives the first argument alone
        },
    ),
    "GatedFeedForward": (
        layers.GatedFeedForward,
        {"hidden_dim": 16},
        {
            "input_shape": SEQUENCE, "expected_output_shape": SEQUENCE,
            "expected_num_trainable_weights": 2,
        },
    ),
    "SoftCap": (
        layers.SoftCap,
        {"cap": 3.0},
        {
            "input_shape": ROW, "expected_output_shape": ROW, "supports_masking": True,
            "expected_num_trainable_weights": 0, "expected_num_non_trainable_weights": 0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_run_layer_test(case):
    layer, arguments, check = case
    testing.TestCase().run_layer_test(layer, arguments, **check)


def test_one_cell():
    """A cell is no layer of sequences: its call takes states beside the inputs."""
    cell = layers.sLSTMCell(6, num_heads=2)
    revived = testing.TestCase().run_class_serialization_test(cell)
    assert revived.state_size == [6, 6, 6, 6]


@pytest.mark.parametrize("units", [[3], [3, 2]], ids=["a cell", "two cells"])
def test_cells_carry_states_from_call_to_call(rng, units):
    cells = [layers.sLSTMCell(n) for n in units]
    cells = cells[0] if len(cells) == 1 else cells
    x = 3 * rng.normal(size=(2, 6, 4)).astype("float32")
    want = array(keras.layers.RNN(cells)(x))
    stateful = keras.layers.RNN(cells, stateful=True)
    for _ in range(2):
        stateful(x[:, :2])
        np.testing.assert_allclose(array(stateful(x[:, 2:])), want, atol=1e-6)
        for variable in keras.tree.flatten(stateful.states):  # reset_state knows one cell alone
            variable.assign(keras.ops.zeros(variable.shape))


@pytest.mark.parametrize("states", [2, 5])
def test_a_cell_says_how_many_states_it_has(states):
    zeros = [np.zeros((2, 3), "float32")] * states
    with pytest.raises(ValueError, match=f"4 tensors .h, c, n, m.*Received: {states} tensors"):
        layers.sLSTMCell(3)(np.zeros((2, 4), "float32"), zeros)
