"""What the names and shapes of official weights tell of their model."""

import re

import numpy as np

from keras_xlstm.convert.official_names import FORMATS, HEAD, KERNEL, QKVO, equal, format_of, some
from keras_xlstm.layers.feed_forward import rounded_up


def _size(tensors, name, axis=0):
    shape = np.shape(tensors[name]) if name in tensors else None
    if shape is None or not -len(shape) <= axis < len(shape) or 0 in shape:
        got = "no such tensor" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"`tensors` must hold {name!r}, whose axis {axis} is a size of the model. "
            f"Received: {got}. Give the whole state dict."
        )
    return shape[axis]


def _factor(name, size, width, published, rounded=lambda x: rounded_up(x, 64)):
    """A factor that makes size of width: the published one if it does, as others read better."""
    for factor in (published, size / width, (size - 0.5) / width, (size + 0.5) / width):
        if rounded(factor * width) == size:
            return factor
    raise ValueError(
        f"The size that {name} gives must be a multiple of 64. Received: {size} for a width of "
        f"{width}. This package has no counterpart of another rounding."
    )


def settings_of(tensors, tied):
    """The model's arguments, as names and shapes tell them."""
    format = format_of(tensors)
    official = FORMATS[format]
    language = official.embedding in tensors or any(n.startswith(official.stack) for n in tensors)
    stack = official.stack if language else ""
    found = [re.match(re.escape(stack) + r"blocks\.(\d+)\.", name) for name in tensors]
    found = {int(match[1]) for match in found if match}
    if found != set(range(len(found))) or not found:
        raise ValueError(
            "`tensors` must hold blocks 0, 1, 2 and so on, without a gap. "
            f"Received: blocks {some(map(str, found)) or '-'}. Give the whole state dict."
        )
    read = _paper_settings if format == "xlstm" else _large_settings
    settings = read(tensors, f"{stack}blocks.", len(found))
    settings["num_blocks"] = len(found)
    # Hugging Face's model has the norm whatever its config says.
    settings["final_norm"] = format == "transformers" or stack + official.norm in tensors
    if language:
        settings["vocabulary_size"] = _size(tensors, official.embedding)
        if tied is None:
            tied = HEAD not in tensors or equal(tensors, HEAD, official.embedding)
        settings["tie_embeddings"] = tied
    return settings


def _paper_settings(tensors, blocks, num_blocks):
    at = [b for b in range(num_blocks) if f"{blocks}{b}.{KERNEL}" in tensors]
    units = _size(tensors, f"{blocks}0.xlstm_norm.weight")

    taps = "xlstm.conv1d.conv.weight"
    mlstm, slstm = {}, {}
    if len(at) < num_blocks:
        block = f"{blocks}{min(set(range(num_blocks)) - set(at))}."
        inner = _size(tensors, block + "xlstm.learnable_skip")
        mlstm = {
            "num_heads": _size(tensors, block + "xlstm.mlstm_cell.igate.bias"),
            "projection_factor": _factor("projection_factor", inner, units, 2.0),
            "conv_kernel_size": _size(tensors, block + taps, -1),  # there is none without
            "qkv_block_size": _size(tensors, block + "xlstm.q_proj.weight", 2),
            "use_bias": block + "xlstm.proj_up.bias" in tensors,
        }
    if at:
        block = f"{blocks}{at[0]}."
        slstm = {
            "num_heads": _size(tensors, block + KERNEL),
            "conv_kernel_size": _size(tensors, block + taps, -1) if block + taps in tensors else 0,
            "feed_forward_factor": None,
        }
        down = block + "ffn.proj_down.weight"
        if down in tensors:
            hidden = _size(tensors, down, 1)
            slstm["feed_forward_factor"] = _factor("feed_forward_factor", hidden, units, 1.3)
    heads = (mlstm or slstm).pop("num_heads")
    if slstm.get("num_heads") == heads:
        slstm.pop("num_heads")
    return {
        "units": units, "num_heads": heads, "slstm_at": at, "mlstm_options": mlstm,
        "slstm_options": slstm,
    }  # fmt: skip


def _large_settings(tensors, blocks, _):
    block = blocks + "0."
    units = _size(tensors, block + "norm_mlstm.weight")
    values = _size(tensors, block + "mlstm_layer.out_proj.weight", 1)
    if block + QKVO in tensors:
        heads = _size(tensors, block + "mlstm_layer.ifgate_preact.bias") // 2
        keys = _size(tensors, block + QKVO) // 2 - values
    else:
        heads = _size(tensors, block + "mlstm_layer.igate_preact.bias")
        keys = _size(tensors, block + "mlstm_layer.q.weight")
    hidden = _size(tensors, block + "ffn.proj_down.weight", 1)
    options = {
        "key_dim_factor": _factor("key_dim_factor", keys, units, 0.5, int),
        "value_dim_factor": _factor("value_dim_factor", values, units, 1.0, int),
        "feed_forward_factor": _factor("feed_forward_factor", hidden, units, 2.667),
    }
    settings = {"units": units, "num_heads": heads, "architecture": "large"}
    settings |= {"mlstm_options": options, "slstm_options": {}}
    if blocks != "blocks.":
        settings["logit_soft_cap"] = 30.0
    return settings
