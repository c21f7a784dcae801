"""Models as files that run without Keras and without this package.

Two files with one call: the whole sequence, and **one step** of it (token or frame and states in,
output and new states out), which has no loop and so exports to every format.

Inputs and outputs of a step file stand in this order and have these names, in every format:

- the model's inputs without their time axis, (batch, ...), then the states, `<layer>_<state>`;
- `output` (`output_0`, `output_1`, ... of several), then the new states, `next_<layer>_<state>`.

States are float32, of the shapes that the file itself gives, and **start as zeros**. Name inputs
and layers: those that Keras names (`input_layer_3`, `s_lstm_2`) count up with every model built.
"""

import contextlib
import importlib.util
import pathlib

import keras

from keras_xlstm import backends
from keras_xlstm.export.one_step import Stepped, timed
from keras_xlstm.export.writers import write
from keras_xlstm.models.stack import StackModel
from keras_xlstm.validation import refuse_states

__all__ = ["export_model", "step_model"]

_SUFFIX = {
    "tf_saved_model": "", "onnx": ".onnx", "litert": ".tflite", "openvino": ".xml", "torch": ".pt2",
}  # fmt: skip
# What a format cannot come from, and where it can.
_IMPOSSIBLE = {
    ("jax", "litert"): ("LiteRT's converter reads TensorFlow graphs", "tensorflow"),
    ("torch", "litert"): ("LiteRT's converter reads TensorFlow graphs", "tensorflow"),
    ("torch", "tf_saved_model"): ("a SavedModel holds a TensorFlow graph", "tensorflow or jax"),
    ("jax", "torch"): ("a .pt2 file holds a PyTorch graph", "torch"),
    ("tensorflow", "torch"): ("a .pt2 file holds a PyTorch graph", "torch"),
}
_NO_SEQUENCE = {
    ("tensorflow", "openvino"): ("OpenVINO cannot read the loops that TensorFlow writes", "jax"),
}
_TORCH = "PyTorch writes a loop over time out step by step"
_FIXED_LENGTH = {
    ("torch", "onnx"): _TORCH,
    ("torch", "openvino"): _TORCH,
    ("torch", "torch"): _TORCH,
    ("tensorflow", "litert"): "LiteRT's runtime does not run TensorFlow's loops over time",
}
_CONVERTER = {"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnxscript"}


def export_model(
    model, folder, format="onnx", parts=("sequence", "streaming"), length=None, batch_size=None
):
    """Writes a model as files for other runtimes.

    The native form is traced, whatever runs in training: a file needs no kernel of ours.

    Args:
        model: a built functional or Sequential `keras.Model` of any layers for `"sequence"`; for
            `"streaming"` see `step_model`.
        folder: where the files go; made if it is not there.
        format: `"onnx"`, `"openvino"`, `"tf_saved_model"`, `"litert"` or `"torch"` (.pt2).
        parts: `"sequence"`, `"streaming"` or both.
        length: time of the sequence file, where it must be fixed; None leaves it open where the
            format can, and is an error where it cannot. A fixed length is written out step by step
            on torch, and for LiteRT and OpenVINO on TensorFlow: keep it in the hundreds.
        batch_size: None leaves it open.

    Returns:
        `{part: path}`: `sequence` and `streaming` with `.onnx`, `.xml` (and `.bin` beside it),
        `.tflite`, `.pt2`, or a folder for a SavedModel.

    Raises:
        ValueError: for what the format, the backend or the model cannot do, before anything is
            written: with the reason and what to do.
        ImportError: for a converter that is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 3)), keras_xlstm.layers.mLSTM(4)])
    >>> keras_xlstm.export.step_model(model).inputs[0].shape
    (None, 3)
    """
    backend = keras.backend.backend()
    parts = _checked(backend, format, parts)
    _check_float32(model, format)
    stateful = _check_states(model, format, parts)
    models = {}
    if "sequence" in parts:
        models["sequence"] = _sequence_model(model, length, batch_size, stateful)
        if (backend, format) in _FIXED_LENGTH and _open(models["sequence"][0]):
            raise ValueError(
                f"The {format} file of whole sequences needs a fixed length on {backend}: "
                f"{_FIXED_LENGTH[backend, format]}. Give export_model length=, or "
                "parts=('streaming',), or export the model on another backend (docs/export.md)."
            )
        _check_loops(model, format)
        _check_batch(model, backend, batch_size)
    if "streaming" in parts:
        models["streaming"] = _named_step(model, batch_size)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part: folder / f"{part}{_SUFFIX[format]}" for part in models}
    with backends.use("native"), contextlib.ExitStack() as plain:
        for part in model._flatten_layers():
            if isinstance(part, StackModel):
                plain.enter_context(part._run_by())
        for part, (traced, names) in models.items():
            write(backend, format, traced, names, str(paths[part]))
    return {part: str(path) for part, path in paths.items()}


def step_model(model, batch_size=None):
    """One step of a model: `[inputs, *states]` to `[outputs, *new states]`.

    The weights are the model's own. A layer that returns only its last output streams too: every
    step gives the output for all that came until then.

    Args:
        model: a built functional or Sequential `keras.Model`, `xLSTMStack` or
            `xLSTMLanguageModel`: xLSTM layers and blocks, `keras.layers.RNN` and those built on it
            (LSTM, GRU), and any layer or operation that acts on every step by itself, which is
            checked on random numbers. An input (batch, features) of fixed size without time is
            given at every step.
        batch_size: None leaves it open.

    Returns:
        A `keras.Model`: inputs (batch, ...) without their time axis, then states, float32, which
        start as zeros; outputs and new states in that order. `[x.name for x in step.inputs]` are
        the names.

    Raises:
        ValueError: with the name of the layer that cannot stream, and why.

    Example:

    >>> inputs = keras.Input((None, 3))
    >>> x = keras_xlstm.layers.sLSTM(4, return_sequences=True, name="memory")(inputs)
    >>> step = keras_xlstm.export.step_model(keras.Model(inputs, keras.layers.Dense(1)(x)))
    >>> [x.name for x in step.inputs]
    ['input', 'memory_h', 'memory_c', 'memory_n', 'memory_m']
    >>> output, *state = step([np.ones((2, 3)), *[np.zeros((2, 4))] * 4])
    >>> output.shape
    (2, 1)
    """
    return _named_step(model, batch_size)[0]


# ---------------------------------------------------------------------------------- checks


def _checked(backend, format, parts):
    if format not in _SUFFIX:
        raise ValueError(f"`format` must be one of {list(_SUFFIX)}. Received: format={format!r}.")
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts or not set(parts) <= {"sequence", "streaming"}:
        raise ValueError(
            f"`parts` must be 'sequence', 'streaming' or both. Received: parts={parts!r}."
        )
    refused = _IMPOSSIBLE.get((backend, format))
    if refused is None and "sequence" in parts:
        refused = _NO_SEQUENCE.get((backend, format))
    if refused is not None:
        whole = "" if (backend, format) in _IMPOSSIBLE else " of whole sequences"
        raise ValueError(
            f"The {backend} backend cannot write {format} files{whole}: {refused[0]}. Save the "
            f"model as .keras, load it with the Keras backend {refused[1]} and export it there"
            f"{', or take parts=' + repr(('streaming',)) if whole else ''}."
        )
    needed = {
        "onnx": [_CONVERTER[backend]], "openvino": [_CONVERTER[backend], "openvino"],
        "tf_saved_model": ["tensorflow"],
    }.get(format, [])  # fmt: skip
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Exporting to {format} on {backend} needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}, or the extra keras-xlstm[export-{backend}]."
        )
    return parts


def _check_float32(model, format):
    if format in ("tf_saved_model", "torch"):
        return
    for layer in model._flatten_layers():
        if layer.compute_dtype not in (None, "float32"):
            raise ValueError(
                f"{format} files are written in float32, and {layer.name} computes in "
                f"{layer.compute_dtype}. Build the model under the policy float32 and load the "
                "same weights."
            )


def _check_states(model, format, parts):
    """Whether states are in variables, which the sequence file of a SavedModel alone carries."""
    stateful = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    if stateful and "sequence" in parts and format != "tf_saved_model":
        refuse_states(stateful[0], format)
    return bool(stateful)


def _check_batch(model, backend, batch_size):
    for layer in model._flatten_layers() if backend == "torch" and batch_size is None else ():
        if type(layer) is keras.layers.RNN:
            raise ValueError(
                f"{layer.name}, a keras.layers.RNN, takes its batch for a number on torch. "
                "Received: batch_size=None. Give export_model batch_size=, or use the layer sLSTM "
                "in place of a cell, or export the model on another backend (docs/export.md)."
            )


def _check_loops(model, format):
    for layer in model._flatten_layers() if format == "litert" else ():
        if isinstance(layer, keras.layers.RNN) and not layer.unroll:
            raise ValueError(
                f"A litert file of whole sequences cannot hold the loop of {layer.name}, one of "
                "Keras's own layers. Build it with unroll=True and an input of fixed length, or "
                "take parts=('streaming',)."
            )


def _open(model):
    return any(timed(x) and x.shape[1] is None for x in model.inputs)


# ---------------------------------------------------------------------------------- what is traced


def _input_names(inputs, names):
    """The names that the user gave; "input" for those that Keras made up."""
    made_up = ("input_layer", "keras_tensor")
    if len(inputs) == 1 and names[0].startswith(made_up):
        return ["input"]
    return [f"input_{i}" if n.startswith(made_up) else n for i, n in enumerate(names)]


def _output_names(count):
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _main_inputs(model):
    """The inputs that a file has, without optional ones for padding and packed documents."""
    if isinstance(model, StackModel):
        return model.inputs, [model._main]
    return model.inputs, _input_names(model.inputs, [x.name for x in model.inputs])


def _sequence_model(model, length, batch_size, stateful):
    if not isinstance(model, keras.Model) or not model.built or not hasattr(model, "inputs"):
        raise ValueError(
            f"`model` must be a built keras.Model with inputs. Received: {model!r}. "
            "Give it a keras.Input."
        )
    inputs, names = _main_inputs(model)
    given = []
    for x, name in zip(inputs, names, strict=True):
        shape = list(x.shape[1:])
        if timed(x) and length is not None:
            if shape[0] not in (None, length):
                raise ValueError(
                    f"The model's input {name!r} has the length {shape[0]}. "
                    f"Received: length={length}. Leave length out."
                )
            shape[0] = length
        batch = x.shape[0] if stateful and batch_size is None else batch_size
        given.append(keras.Input(shape, batch_size=batch, dtype=x.dtype, name=name))
    structure = given[0]
    if not isinstance(model, (StackModel, keras.Sequential)):
        structure = keras.tree.pack_sequence_as(model.input, given)
    outputs = keras.tree.flatten(model(structure))
    return keras.Model(given, outputs), _output_names(len(outputs))


def _named_step(model, batch_size):
    stepped = Stepped(model)
    inputs, names = _main_inputs(model)
    given, one_step = [], []
    for x, name, has_time in zip(inputs, names, stepped.timed[0], strict=True):
        shape = x.shape[2:] if has_time else x.shape[1:]
        given.append(keras.Input(shape, batch_size=batch_size, dtype=x.dtype, name=name))
        one_step.append(given[-1][:, None] if has_time else given[-1])
    states = [keras.Input(s, batch_size=batch_size, name=n) for n, s in stepped.states]
    outputs = stepped.model([*one_step, *states])
    count = len(stepped.timed[1])
    named = [
        x[:, 0] if has_time else x
        for x, has_time in zip(outputs[:count], stepped.timed[1], strict=True)
    ]
    names = [*_output_names(count), *(f"next_{name}" for name, _ in stepped.states)]
    return keras.Model([*given, *states], [*named, *outputs[count:]]), names
