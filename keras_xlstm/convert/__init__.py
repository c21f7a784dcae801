"""Weights of the official PyTorch models, in and out, without PyTorch.

Three formats: `"xlstm"`, the paper's `xLSTMLMModel` and `xLSTMBlockStack`; `"xlstm_large"`,
`xLSTMLarge`; `"transformers"`, Hugging Face's `xLSTMForCausalLM`, in which the 7B model is out.
"""

import pathlib

import keras
import numpy as np
from keras import ops

from keras_xlstm import backends
from keras_xlstm.convert.checks import check_model, checked
from keras_xlstm.convert.huggingface import read_config
from keras_xlstm.convert.infer import settings_of
from keras_xlstm.convert.official_names import (
    FORMATS,
    HEAD,
    as_array,
    check_format,
    official_shapes,
    pairs_of,
    without_prefix,
)
from keras_xlstm.convert.safetensors import Safetensors, widened
from keras_xlstm.initializers import undrawn
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

__all__ = ["from_pretrained", "from_state_dict", "load_state_dict", "to_state_dict"]

_PIECE = 1 << 22  # numbers that are in float32 at once

# ---------------------------------------------------------------- loading and writing


def load_state_dict(model, tensors):
    """Fills a model with official weights, or leaves it as it is if they do not fit exactly or
    cannot all be read.

    The format, and its layouts (sLSTM of the vanilla or the CUDA backend, single or fused
    projections of the Large model), are told from names and shapes. A prefix that all names share
    is left out: `module.`, `model.backbone.`, whatever wrappers put there.

    Args:
        model: an `xLSTMLanguageModel`, or an `xLSTMStack` for tensors without embedding and head.
        tensors: a mapping from official names to arrays: NumPy, PyTorch (bfloat16 too), or anything
            with a shape, a dtype and `__array__`. Each one is read when it is its turn, and what is
            in a file still, neither NumPy nor PyTorch, once before that, to see that it can be.

    Raises:
        ValueError: if a tensor is unknown, missing, misshapen or not floating point, only some
            names have a prefix, or the model is quantized, has LoRA or another architecture.

    Example:

    >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=2)
    >>> tensors = keras_xlstm.convert.to_state_dict(model)
    >>> keras_xlstm.convert.load_state_dict(model, tensors)
    """
    tensors = without_prefix(tensors)
    pairs = checked(model, tensors)
    for tensor in (tensors[name] for name in tensors):
        if not isinstance(tensor, np.ndarray) and not hasattr(tensor, "detach"):
            as_array(tensor)
    _assign(pairs, tensors)


def to_state_dict(model, format="xlstm"):
    """A model's weights under their official names, in the official layouts.

    sLSTM is written in the layout of the vanilla backend, the Large model with single projections.
    LoRA updates are merged. A state dict holds weights alone: soft caps, epsilon and the like go
    into the other configuration by hand. Of the paper's norms, official files hold scale - 1: what
    float32 keeps of it, which is all for scales from 0.5 up.

    Args:
        model: an `xLSTMLanguageModel`, or an `xLSTMStack`.
        format: `"xlstm"` for architecture `"paper"`; `"xlstm_large"` or `"transformers"` for
            `"large"`.

    Returns:
        A dict of NumPy arrays, float64 where the model is and float32 otherwise.

    Raises:
        ValueError: if the format has no such model.

    Example:

    >>> stack = keras_xlstm.models.xLSTMStack(64, num_blocks=1)
    >>> keras_xlstm.convert.to_state_dict(stack)["post_blocks_norm.weight"].shape
    (64,)
    """
    check_model(model)
    check_format(model, format)
    tensors = {}
    for pair in pairs_of(model, format):
        whole = _joined([pair.kind.theirs(_weight(*ours)) for ours in pair.ours])
        for name, part in zip(pair.names, np.split(whole, len(pair.names)), strict=True):
            tensors[name] = np.array(part, order="C")
    if model.settings.get("tie_embeddings"):  # official modules list a shared matrix twice
        tensors[HEAD] = tensors[FORMATS[format].embedding].copy()
    return tensors


def from_state_dict(tensors, **overrides):
    """The model that official weights belong to, filled with them.

    Names and shapes tell sizes, heads, which blocks are sLSTM, convolutions, biases, feed-forward
    blocks and the final norm. What they cannot tell is as published: soft caps of the Large model
    (15 for the gates, 30 for the logits) and epsilon, no dropout. Embeddings are tied if there is
    no `lm_head.weight`, or if it equals the embedding.

    Args:
        tensors: as in `load_state_dict`.
        **overrides: arguments of the model, as `dtype`, `dropout`, `logit_soft_cap=None` or
            `tie_embeddings`; `mlstm_options` and `slstm_options` add to what the tensors tell.

    Returns:
        An `xLSTMLanguageModel`, or an `xLSTMStack` for an `xLSTMBlockStack`'s tensors.

    Raises:
        ValueError: if the tensors are not exactly those of a model.

    Example:

    >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=2, pattern="1:1")
    >>> tensors = keras_xlstm.convert.to_state_dict(model)
    >>> keras_xlstm.convert.from_state_dict(tensors, dropout=0.1).settings["slstm_at"]
    [1]
    """
    tensors = without_prefix(tensors)
    settings = settings_of(tensors, overrides.get("tie_embeddings"))
    return _filled(tensors, settings, overrides)


def from_pretrained(folder, dtype=None, **overrides):
    """The model in a folder that Hugging Face's `save_pretrained` wrote, as NX-AI/xLSTM-7b.

    Reads config.json and safetensors files, one or several, tensor by tensor: it takes the memory
    of the model and a few times that of its largest matrix. Nothing is downloaded or unpickled.

        folder = huggingface_hub.snapshot_download("NX-AI/xLSTM-7b")
        model = keras_xlstm.convert.from_pretrained(folder, dtype="bfloat16")

    Args:
        folder: where the files are.
        dtype: policy of all layers; None takes Keras's own, whatever the files hold.
        **overrides: as in `from_state_dict`; they win over config.json.

    Returns:
        An `xLSTMLanguageModel`.

    Raises:
        ValueError: if files are missing, damaged, of another model, or contradict one another.
    """
    folder = pathlib.Path(folder)
    config, tensors = read_config(folder), without_prefix(Safetensors(folder))
    tied = overrides.get("tie_embeddings")
    if tied is None and HEAD in tensors and not config["tie_word_embeddings"]:
        tied = False
    settings = settings_of(tensors, tied)
    said = {
        "vocabulary_size": config["vocab_size"],
        "units": config["hidden_size"],
        "num_blocks": config["num_blocks"],
        "num_heads": config["num_heads"],
    }
    if "tie_embeddings" not in overrides:
        said["tie_embeddings"] = config["tie_word_embeddings"]
    for name, value in said.items():
        if settings.get(name) != value:
            raise ValueError(
                f"config.json and the tensors in {folder} must agree. Received: {name} is {value} "
                f"in config.json and {settings.get(name)} by the tensors. Use the files of one "
                "model, or from_state_dict, which does not read config.json."
            )
    settings["logit_soft_cap"] = config["output_logit_soft_cap"]
    settings["mlstm_options"] |= {
        "gate_soft_cap": config["gate_soft_cap"],
        "epsilon": config["norm_eps"],
    }
    return _filled(tensors, settings, {"dtype": dtype, **overrides})


def _filled(tensors, settings, overrides):
    for name in ("mlstm_options", "slstm_options"):
        overrides = {**overrides, name: {**settings[name], **(overrides.get(name) or {})}}
    kind = xLSTMLanguageModel if "vocabulary_size" in settings else xLSTMStack
    with undrawn():
        model = kind(**{**settings, **overrides})
    _assign(checked(model, tensors), tensors)
    return model


def _assign(pairs, tensors):
    for pair in pairs:
        values = _read(pair, tensors)
        for ours in pair.ours:
            getattr(*ours).assign(backends.tensor(values.pop(0)))


def _read(pair, tensors):
    """What the variables of a pair are to hold; what it was made of is free again."""
    whole = _joined([as_array(tensors[name]) for name in pair.names])
    start, values = 0, []
    for ours, shape in zip(pair.ours, official_shapes(pair), strict=True):
        variable = getattr(*ours)
        part = pair.kind.ours(whole[start : start + shape[0]], variable.shape)
        start += shape[0]
        values.append(_copied(part, variable.dtype))
    return values


def _copied(array, dtype):
    """A copy, whatever happened before: a backend may keep the memory that it is given.

    By a few rows at a time: the whole in float32 would be twice a matrix of bfloat16 again.
    """
    # NumPy alone has no bfloat16.
    copy = np.empty(array.shape, ops.convert_to_numpy(ops.zeros((1,), dtype)).dtype)
    rows = max(1, _PIECE * len(array) // array.size)
    for start in range(0, len(array), rows):
        copy[start : start + rows] = widened(array[start : start + rows])
    return copy


def _joined(arrays):
    if len(arrays) == 1:
        return arrays[0]
    if len({array.dtype for array in arrays}) > 1:
        arrays = [widened(array) for array in arrays]
    return np.concatenate(arrays)


def _weight(layer, attribute):
    weight = getattr(layer, attribute)
    wide = keras.backend.standardize_dtype(weight.dtype) == "float64"
    return ops.convert_to_numpy(weight if wide else ops.cast(weight, "float32"))
