"""What a model is exported for, seen from inside it: Keras's `model.export` tells no layer."""

import collections
import sys

import keras

# `format` as in `model.export`, None where a converter was called without Keras; `open_length`:
# whether the file is to take inputs whose size is not that of those it is traced with, in an axis
# after the first; `stateful`: the keras.layers.RNN with states in variables that is called, if any.
Export = collections.namedtuple("Export", "format open_length stateful")

_FORMATS = {"onnx", "litert", "openvino", "torch"}  # modules of keras.src.export
_CONVERTERS = {"tf2onnx": "onnx", "tensorflow.lite": "litert", "torch.onnx": "onnx"}


def current():
    """The export that calls this, by way of a tracer, or None."""
    found, format, open_length, aside, stateful = False, None, False, False, None
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        # What TensorFlow saves of every model inside the model, with input shapes of its own.
        layer = frame.f_locals.get("self") if name.startswith("keras.src.layers.rnn.") else None
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            stateful = layer
        aside |= frame.f_code.co_name.endswith("serving_default")
        if name.startswith("keras.src.export."):
            found, module = True, name.rpartition(".")[2]
            # The outermost: all formats of TensorFlow's go by way of a SavedModel.
            format = module if module in _FORMATS else format or "tf_saved_model"
            open_length |= _open_signature(frame.f_locals.get("input_signature"))
        else:
            for converter, its in _CONVERTERS.items():
                if name == converter or name.startswith(f"{converter}."):
                    found, format = True, its
                    open_length |= _open_axes(frame.f_locals.get("dynamic_axes"))
        frame = frame.f_back
    format = "tf_saved_model" if aside else format
    return Export(format, open_length, stateful) if found else None


def _open_signature(signature):
    return any(
        None in tuple(spec.shape)[1:]
        for spec in keras.tree.flatten(signature)
        if getattr(spec, "shape", None) is not None
    )


def _open_axes(axes):
    """Of torch.onnx: {input or output: {axis: name} or [axis]}."""
    return isinstance(axes, dict) and any(axis != 0 for each in axes.values() for axis in each)
