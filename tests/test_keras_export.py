"""Keras's own `model.export`: formats x layers x shapes. A cell of the table is a file that equals
the model in its own runtime, at batches, lengths and inputs other than those it was traced with,
or an error before anything is written.

EXPORT_CELLS=all runs every cell (some minutes a backend); by default those that cover each way.
"""

import importlib
import os

import keras
import numpy as np
import pytest
from keras.layers import RNN, Bidirectional, Embedding, Masking
from tools import BACKEND, array

from keras_xlstm import export
from keras_xlstm.layers import mLSTM, mLSTMBlock, sLSTM, sLSTMBlock, sLSTMCell, xLSTMLargeBlock
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

TOLERANCE = 1e-4
SUFFIX = export._SUFFIX
RUNTIME = {"onnx": "onnxruntime", "litert": "ai_edge_litert", "tf_saved_model": "tensorflow"}
CONVERTER = {"onnx": export._CONVERTER[BACKEND]}
ALL = os.environ.get("EXPORT_CELLS") == "all"


def of(*layers, dtype="float32", features=(4,)):
    return lambda length: keras.Sequential(
        [keras.Input((length, *features), dtype=dtype, name="x"), *(layer() for layer in layers)]
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = mLSTM(4, return_sequences=True), sLSTM(4)

    def call(self, x):
        return self.second(self.first(x))


def functional(length):
    x = keras.Input((length, 4), name="x")
    memory, *_ = sLSTM(4, return_sequences=True, return_state=True)(x)
    return keras.Model(x, keras.layers.Concatenate()([mLSTM(4, return_sequences=True)(memory), x]))


def language_model(length):
    return xLSTMLanguageModel(11, units=8, num_blocks=2, num_heads=2, pattern="1:1")


BLOCK = {"num_heads": 2}
CASES = {
    "slstm": of(lambda: sLSTM(4, return_sequences=True)),
    "mlstm": of(lambda: mLSTM(4, return_sequences=True)),
    "last": of(lambda: mLSTM(4, num_heads=2, return_sequences=True), lambda: sLSTM(4)),
    "cell": of(lambda: RNN([sLSTMCell(4), sLSTMCell(4)], return_sequences=True)),
    "unrolled": of(lambda: RNN(sLSTMCell(4), unroll=True)),
    "both": of(lambda: Bidirectional(sLSTM(4, return_sequences=True)), lambda: mLSTM(4)),
    "masked": of(Masking, lambda: sLSTM(4, return_sequences=True), lambda: mLSTM(4)),
    "masked both": of(Masking, lambda: Bidirectional(mLSTM(4, return_sequences=True))),
    "backwards": of(Masking, lambda: mLSTM(4, go_backwards=True)),
    "mlstm block": of(Masking, lambda: mLSTMBlock(**BLOCK)),
    "slstm block": of(lambda: sLSTMBlock(**BLOCK)),
    "large block": of(lambda: xLSTMLargeBlock(**BLOCK)),
    "stack": of(lambda: xLSTMStack(4, num_blocks=2, num_heads=2, pattern="1:1")),
    "stack both": of(Masking, lambda: xLSTMStack(4, 2, num_heads=2, direction="both")),
    "embedded": of(
        lambda: Embedding(11, 4, mask_zero=True), lambda: mLSTMBlock(**BLOCK), dtype="int32",
        features=(),
    ),
    "functional": functional,
    "subclassed": lambda length: Subclassed(),
    "language model": language_model,
}  # fmt: skip
# (format, cases or None for all, whether the length is open, or None for both, the error's words):
# the first that fits; every other cell is a right file.
REFUSED = {
    "jax": [
        ("openvino", None, None, "keras_xlstm.export.export_model"),
        ("litert", None, None, "TensorFlow"),  # Keras's
        ("torch", None, None, "PyTorch backend|torch"),  # Keras's
    ],
    "tensorflow": [
        ("litert", {"cell"}, None, "unroll=True"),
        ("openvino", {"cell"}, None, "unroll=True"),
        ("litert", None, True, "keras_xlstm.export.export_model.*length="),
        ("torch", None, None, "PyTorch backend|torch"),  # Keras's
    ],
    "torch": [
        # Keras's, of Dense too; the last is of inputs in a dict.
        ("tf_saved_model", None, None, "dynamic_shapes|inputs|torch_xla|'dict' object has no"),
        ("litert", None, None, "litert-torch|keras_xlstm.export.export_model"),
        (None, None, True, "keras_xlstm.export.export_model.*length="),
    ],
}[BACKEND]
# What no length is asked of twice: a subclass has that of its first call, and Keras's RNN unrolls.
FIXED = {"subclassed", "unrolled"}
# Its converter has no rule for what PyTorch writes of a module in a module.
SKIPPED = {("torch", "openvino", "subclassed")}
DEFAULT = {
    "jax": {
        "onnx": set(CASES), "tf_saved_model": {"mlstm block"}, "openvino": {"slstm"},
        "litert": {"slstm"}, "torch": {"slstm"},
    },
    "tensorflow": {
        "onnx": {"last", "slstm block"}, "tf_saved_model": {"language model"},
        "litert": {"masked both", "slstm block", "cell"}, "openvino": {"masked", "cell"},
        "torch": {"slstm"},
    },
    "torch": {
        "onnx": set(CASES), "openvino": {"masked", "stack"}, "torch": {"masked both", "stack"},
        "litert": {"slstm"}, "tf_saved_model": {"slstm"},
    },
}[BACKEND]  # fmt: skip


def words(format, case, open_length):
    for its, cases, its_open, message in REFUSED:
        if its in (None, format) and (cases is None or case in cases):
            if its_open in (None, open_length):
                return message
    return None


def cells():
    for format in SUFFIX:
        for case in CASES:
            if (BACKEND, format, case) in SKIPPED or not (ALL or case in DEFAULT[format]):
                continue
            for length in (5, None):
                if not (length is None and case in FIXED):
                    yield format, case, length


def perturbed(model):
    """Every weight moved, so that no zero hides what it multiplies."""
    rng = np.random.default_rng(1)
    for v in model.trainable_weights:
        v.assign(array(v) + 0.2 * rng.normal(size=v.shape).astype("float32"))
    return model


def data(case, batch, length, seed=0):
    rng = np.random.default_rng([seed, batch, length])
    if case in ("embedded", "language model"):
        return rng.integers(0, 11, (batch, length)).astype("int32")
    x = rng.normal(size=(batch, length, 4)).astype("float32")
    x[0, -1] = x[0, length // 2] = 0  # steps that a mask takes out
    return x


def need(format):
    for name in filter(None, (CONVERTER.get(format), RUNTIME.get(format, format))):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the extra export-{BACKEND}")


def opened(format, path):
    """The file as a function of one array, in its own runtime."""
    return globals()[f"open_{format}"](str(path))


def open_onnx(path):
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    session = onnxruntime.InferenceSession(path)
    (x,) = session.get_inputs()
    return lambda value: session.run(None, {x.name: value})[0]


def open_openvino(path):
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}  # or bfloat16 where the processor has it
    model = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", options)
    return lambda value: next(iter(model([value]).values())).copy()


def open_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    def run(value):
        interpreter = Interpreter(path)
        (x,), (y,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(x["index"], value.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(x["index"], value)
        interpreter.invoke()
        return interpreter.get_tensor(y["index"])

    return run


def open_tf_saved_model(path):
    import tensorflow as tf

    function = tf.saved_model.load(path).signatures["serving_default"]
    (name,) = function.structured_input_signature[1]
    return lambda value: next(iter(function(**{name: tf.constant(value)}).values())).numpy()


def open_torch(path):
    import torch

    return of_arrays(torch.export.load(path).module())


def of_arrays(module):
    import torch

    return lambda value: array(module(torch.from_numpy(value)))


def run(model, x):
    return model.predict_on_batch(x) if BACKEND == "jax" else array(model(x))


def assert_equal(file, model, case, shapes):
    for batch, length in shapes:
        x = data(case, batch, length, seed=1)
        want, got = run(model, x), file(x)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=f"{batch} x {length}")


def built(case, length):
    model = CASES[case](length)
    called(model, data(case, 2, length or 5))
    return perturbed(model)


def called(model, x):
    """Keras exports no model to ONNX that was never called."""
    model(keras.KerasTensor(x.shape, dtype=x.dtype.name))


def signature(case, length, batch=None):
    """What a language model needs to have a fixed length: its inputs have none."""
    dtype = data(case, 1, 1).dtype.name
    shape = (batch, length) if dtype == "int32" else (batch, length, 4)
    spec = keras.InputSpec(shape=shape, dtype=dtype, name="x")
    return [{"token_ids": spec} if case == "language model" else spec]


@pytest.mark.parametrize(
    ("format", "case", "length"), list(cells()), ids=lambda x: str(x).replace(" ", "_")
)
def test_cell(format, case, length, tmp_path):
    refused = words(format, case, length is None)
    options = {}
    if case == "language model" and length:
        options["input_signature"] = signature(case, length)
        if (BACKEND, format) == ("torch", "torch"):
            pytest.skip("a .pt2 file takes the model's dict, not one tensor")
    if format == "torch" and not refused:
        import torch

        options["dynamic_shapes"] = {0: torch.export.Dim("batch")}  # else Keras's is of batch 1
        if case in ("cell", "unrolled"):  # Keras's RNN takes a batch for a number
            options = {}
    if not refused:
        need(format)
    elif format == "openvino":
        need(format)
    model, path = built(case, length), tmp_path / f"model{SUFFIX[format]}"
    arguments = {"format": format, "verbose": False, **options}
    if refused:
        with pytest.raises(Exception, match=f"(?s){refused}"):
            model.export(str(path), **arguments)
        assert not list(tmp_path.iterdir())
        return
    model.export(str(path), **arguments)
    shapes = [(1, 5), (3, 5)] if length else [(1, 4), (3, 7), (2, 1)]
    if format == "torch" and not options:
        shapes = [(1, 5)]
    assert_equal(opened(format, path), model, case, shapes)


@pytest.mark.parametrize("case", ["masked", "mlstm block"] if BACKEND == "torch" else ["masked"])
def test_a_batch_that_is_fixed(case, tmp_path):
    """On torch Keras takes another exporter then, and the first again where that one fails."""
    need("onnx")
    model = built(case, None)
    path = tmp_path / "model.onnx"
    given = {"format": "onnx", "verbose": False}
    model.export(path, input_signature=signature(case, 5, batch=3), **given)
    assert_equal(opened("onnx", path), model, case, [(3, 5)])


def test_many_chunks(tmp_path):
    format = "litert" if BACKEND == "tensorflow" else "onnx"
    need(format)
    model, path = built("mlstm", 130), tmp_path / f"model{SUFFIX[format]}"
    model.export(path, format=format, verbose=False)
    assert_equal(opened(format, path), model, "mlstm", [(2, 130)])


# ---------------------------------------------------------------------------------- states


def stateful(layer):
    layers = {
        "slstm": lambda: sLSTM(4, stateful=True),
        "mlstm": lambda: mLSTM(4, stateful=True),
        "both": lambda: Bidirectional(mLSTM(4, stateful=True)),
        "cell": lambda: RNN(sLSTMCell(4), stateful=True),
    }
    return keras.Sequential([keras.Input(batch_shape=(1, 5, 4)), layers[layer]()])


@pytest.mark.parametrize("layer", ["slstm", "both", "cell"])
@pytest.mark.parametrize("format", ["onnx", "litert", "openvino", "torch"])
def test_states_that_a_file_cannot_carry(format, layer, tmp_path):
    need(format)
    if words(format, "slstm", False):
        pytest.skip("refused whatever the layers are")
    model = stateful(layer)
    called(model, data("slstm", 1, 5))
    before = [array(v) for v in model.variables]
    path, options = str(tmp_path / f"m{SUFFIX[format]}"), {"format": format, "verbose": False}
    if layer == "cell":  # Keras's RNN asks for its batch
        options["input_signature"] = signature("slstm", 5, 1)
    with pytest.raises(Exception, match="(?s)stateful=True.*streaming.*step_model"):
        model.export(path, **options)
    assert not list(tmp_path.iterdir())
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, array(new))
    if layer != "cell":
        refused = (
            "of whole sequences" if (BACKEND, format) in export._NO_SEQUENCE else "stateful=True"
        )
        with pytest.raises(ValueError, match=f"(?s){refused}.*streaming"):
            export.export_model(model, tmp_path / "ours", format, parts="sequence", length=5)
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BACKEND == "torch", reason="a SavedModel holds a TensorFlow graph")
@pytest.mark.parametrize("layer", ["slstm", "mlstm"])
def test_states_that_a_saved_model_carries(layer, tmp_path):
    model = stateful(layer)
    options = {"format": "tf_saved_model", "verbose": False}
    if BACKEND == "jax":
        for more in ({}, {"input_signature": signature("slstm", 5, 1), "is_static": True}):
            with pytest.raises(ValueError, match="(?s)stateful=True.*input_signature"):
                model.export(str(tmp_path / "m"), **options, **more)
        assert not list(tmp_path.iterdir())
        options["input_signature"] = signature("slstm", 5, 1)
    model.export(str(tmp_path / "m"), **options)
    ours = export.export_model(model, tmp_path / "ours", "tf_saved_model", "sequence")["sequence"]
    steps = [data("slstm", 1, 5, seed) for seed in (1, 2)]
    want = [model.predict(x, verbose=0) for x in steps]
    for path in (tmp_path / "m", ours):
        file = opened("tf_saved_model", path)
        for x, y in zip(steps, want, strict=True):
            np.testing.assert_allclose(file(x), y, atol=TOLERANCE)


# ---------------------------------------------------------------------------------- PyTorch's own


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own tracers")
@pytest.mark.parametrize("case", ["slstm", "mlstm", "mlstm block"])
def test_tracers_called_without_keras(case, tmp_path):
    """Another batch is right, another length an error: when it is written or when it runs."""
    import torch

    model, x = built(case, None), torch.from_numpy(data(case, 2, 5))
    for length in (5, 1):
        traced = torch.jit.trace(model, x[:, :length])
        assert_equal(of_arrays(traced), model, case, [(3, length)])
        with pytest.raises(RuntimeError):
            traced(torch.from_numpy(data(case, 2, 6 - length)))
    free = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=((free,),), strict=False).module()
    assert_equal(of_arrays(program), model, case, [(3, 5)])
    open_length = (({1: torch.export.Dim("time")},),)
    with pytest.raises(ValueError, match="length is not fixed"):
        torch.export.export(model, (x,), dynamic_shapes=open_length, strict=False)
    path = str(tmp_path / "model.onnx")
    options = {"dynamo": False, "input_names": ["x"]}
    with pytest.raises(ValueError, match="length is not fixed"):
        torch.onnx.export(model, (x,), path, dynamic_axes={"x": {0: "b", 1: "t"}}, **options)
    assert not list(tmp_path.iterdir())
    torch.onnx.export(model, (x,), path, dynamic_axes={"x": {0: "b"}}, **options)
    assert_equal(opened("onnx", path), model, case, [(3, 5)])
