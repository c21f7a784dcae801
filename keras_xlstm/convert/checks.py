"""Whether official weights are those of a model, before anything is assigned."""

import re

import numpy as np

from keras_xlstm.convert.official_names import (
    FORMATS,
    HEAD,
    equal,
    format_of,
    official_shapes,
    pairs_of,
    some,
)
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack


def checked(model, tensors):
    """The pairs of a model and the tensors that belong to it, in their format and layouts."""
    format = format_of(tensors)
    check_model(model)
    if any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        raise ValueError(
            "`model` must not have LoRA: its updates would be added to the loaded weights. "
            "Received: a model after enable_lora. Load the weights first, then enable LoRA."
        )
    if model.settings["architecture"] != FORMATS[format].architecture:
        raise ValueError(
            f'`model` must have architecture="{FORMATS[format].architecture}" for tensors named '
            f'as in the format "{format}". Received: architecture='
            f'"{model.settings["architecture"]}". from_state_dict builds the model that fits.'
        )
    pairs = pairs_of(model, format, tensors)
    _check_tensors(model, format, pairs, tensors)
    return pairs


def check_model(model):
    if not isinstance(model, (xLSTMLanguageModel, xLSTMStack)):
        raise ValueError(
            "`model` must be an xLSTMLanguageModel or an xLSTMStack. "
            f"Received: {type(model).__name__}. Of a larger model, convert the part."
        )
    if any(getattr(layer, "quantization_mode", None) for layer in model._flatten_layers()):
        raise ValueError(
            "`model` must have floating-point weights. Received: a quantized model. "
            "Convert it before it is quantized."
        )


def _check_tensors(model, format, pairs, tensors):
    """Every tensor there and as it should be, before anything is assigned."""
    expected, wrong = {}, {"missing": [], "unknown": [], "misshapen": [], "not floating point": []}
    for pair in pairs:
        shapes = official_shapes(pair)
        rows = sum(shape[0] for shape in shapes) // len(pair.names)
        expected |= dict.fromkeys(pair.names, (rows, *shapes[0][1:]))
    if model.settings.get("tie_embeddings") and HEAD in tensors:
        expected[HEAD] = expected[FORMATS[format].embedding]
    wrong["unknown"] = [repr(name) for name in set(tensors) - set(expected)]
    for name, shape in expected.items():
        if name not in tensors:
            wrong["missing"].append(repr(name))
            continue
        got, dtype = tuple(np.shape(tensors[name])), _dtype(tensors[name])
        if got != shape:
            wrong["misshapen"].append(f"{name!r} of shape {got} in place of {shape}")
        if not re.search(r"\bb?float(16|32|64)\b", dtype):
            wrong["not floating point"].append(f"{name!r} of dtype {dtype}")
    if any(wrong.values()):
        said = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        raise ValueError(
            f'`tensors` must hold exactly the tensors of the model, as the format "{format}" names '
            f"them. Received: {said}. from_state_dict builds the model that tensors belong to; "
            "what it does not know, as biases of norms, this package has no counterpart for."
        )
    if HEAD in tensors and model.settings.get("tie_embeddings"):
        if not equal(tensors, HEAD, FORMATS[format].embedding):
            raise ValueError(
                f"{HEAD!r} must equal the embedding for a model with tie_embeddings=True. "
                "Received: another matrix. Give tie_embeddings=False."
            )


def _dtype(value):
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return getattr(dtype, "name", str(dtype))
