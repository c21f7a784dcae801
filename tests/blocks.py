"""Blocks with every option, and random weights: cases of several tests."""

from tools import perturbed

from keras_xlstm.layers import mLSTMBlock, sLSTMBlock, xLSTMLargeBlock

B, T, D, H = 3, 9, 16, 2
CASES = {
    "mlstm": (mLSTMBlock, {}),
    "mlstm-plain": (mLSTMBlock, {"conv_kernel_size": 0}),
    "mlstm-options": (mLSTMBlock, {
        "conv_kernel_size": 2, "qkv_block_size": 8, "use_bias": True, "gate_soft_cap": 2.0,
        "input_gate": "sigmoid", "projection_factor": 1.0,
    }),
    "slstm": (sLSTMBlock, {}),
    "slstm-options": (sLSTMBlock, {
        "conv_kernel_size": 0, "feed_forward_factor": None, "forget_activation": "exponential",
    }),
    "large": (xLSTMLargeBlock, {}),
    "large-options": (xLSTMLargeBlock, {
        "key_dim_factor": 1.0, "value_dim_factor": 0.5, "gate_soft_cap": None, "use_bias": True,
        "input_gate": "sigmoid",
    }),
}  # fmt: skip


def data(rng, *shape):
    return rng.normal(size=shape or (B, T, D)).astype("float32")


def built(case, rng, **options):
    Block, given = CASES[case]
    block = Block(num_heads=H, **{**given, **options})
    block.build((None, None, D))
    return perturbed(block, rng)
