"""Blocks with every option and random weights, and their equations in float64 NumPy."""

import math

import numpy as np
import oracle
from tools import array, perturbed

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


# ------------------------------------------------------------------------- the equations, again


def normalised(x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rms(x, layer):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w(layer.scale)


def w(variable):
    return array(variable).astype("float64")


def dense(layer, x):
    y = x @ w(layer.kernel)
    return y + w(layer.bias) if layer.bias is not None else y


def diagonal(layer, x):
    blocks, size, _ = layer.kernel.shape
    x = x.reshape(*x.shape[:2], blocks, size)
    y = np.stack([x[:, :, b] @ w(layer.kernel)[b] for b in range(blocks)], axis=2)
    y = y + w(layer.bias) if layer.bias is not None else y
    return y.reshape(*y.shape[:2], blocks * size)


def silu(x):
    return x * oracle.sigmoid(x)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def convolution(layer, x):
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for tap in range(layer.kernel_size):
            if (source := t - layer.kernel_size + 1 + tap) >= 0:
                y[:, t] += x[:, source] * w(layer.kernel)[tap]
    return y + w(layer.bias)


def split(x, heads=H):
    return x.reshape(*x.shape[:2], heads, -1)


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def head_norm(block, h, eps):
    return normalised(h, eps).reshape(*h.shape[:2], -1) * w(block.head_norm.gamma)


def feed_forward(block, x, activation):
    gate, up = np.split(dense(block.feed_forward.up_projection, x), 2, axis=-1)
    return dense(block.feed_forward.down_projection, activation(gate) * up)


def expected(block, x):
    x = x.astype("float64")
    gate = "sigmoid" if getattr(block, "input_gate_activation", "") == "sigmoid" else "exp"
    if isinstance(block, xLSTMLargeBlock):
        u = rms(x, block.norm)
        i, f = (
            capped(dense(g, u), block.gate_soft_cap) for g in (block.input_gate, block.forget_gate)
        )
        q, k, v = (split(dense(p, u)) for p in (block.query, block.key, block.value))
        h = head_norm(block, oracle.mlstm(q, k, v, i, f, input_gate=gate)[0], 1e-6)
        x = x + dense(block.output_projection, oracle.sigmoid(dense(block.output_gate, u)) * h)
        return x + feed_forward(block, rms(x, block.feed_forward_norm), silu)
    u = normalised(x, 1e-5) * w(block.norm.gamma)
    if isinstance(block, mLSTMBlock):
        a, z = np.split(dense(block.up_projection, u), 2, axis=-1)
        ca = silu(convolution(block.convolution, a)) if block.convolution is not None else a
        q, k, v = diagonal(block.query, ca), diagonal(block.key, ca), diagonal(block.value, a)
        qkv = np.concatenate([q, k, v], axis=-1)
        i, f = (
            capped(dense(g, qkv), block.gate_soft_cap)
            for g in (block.input_gate, block.forget_gate)
        )
        h = oracle.mlstm(split(q), split(k), split(v), i, f, input_gate=gate)[0]
        y = (head_norm(block, h, 1e-5) + w(block.skip) * ca) * silu(z)
        return x + dense(block.down_projection, y)
    cu = silu(convolution(block.convolution, u)) if block.convolution is not None else u
    gates = [
        diagonal(block.input_gate, cu), diagonal(block.forget_gate, cu),
        diagonal(block.cell_input, u), diagonal(block.output_gate, u),
    ]  # fmt: skip
    gates = np.stack([split(g) for g in gates], axis=2)
    forget = "exp" if block.forget_activation == "exponential" else "sigmoid"
    h = oracle.slstm(gates, w(block.recurrent_kernel), w(block.bias), forget_gate=forget)[0]
    x = x + head_norm(block, h, 1e-5)
    if block.feed_forward is None:
        return x
    u = normalised(x, 1e-5) * w(block.feed_forward_norm.gamma)
    return x + feed_forward(block, u, gelu)
