"""Exported files, run in their own runtimes in a process that has neither Keras nor the package."""

import importlib.util
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras.layers import GRU, LSTM, Bidirectional, Conv1D, Dense, GlobalAveragePooling1D
from tools import BACKEND, HERE, array

import keras_xlstm
from keras_xlstm import export
from keras_xlstm.layers import mLSTM, sLSTM, sLSTMCell
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

TOLERANCE = 1e-4  # of outputs near one: runtimes order float32 sums in their own ways
FORMATS = {
    "jax": ["onnx", "openvino", "tf_saved_model"],
    "tensorflow": ["onnx", "openvino", "tf_saved_model", "litert"],
    "torch": ["onnx", "openvino", "torch"],
}[BACKEND]
NEEDS = {
    "onnx": ["onnxruntime", export._CONVERTER[BACKEND]],
    "openvino": ["openvino", export._CONVERTER[BACKEND]],
    "litert": ["ai_edge_litert"],
    "tf_saved_model": ["tensorflow"],
    "torch": ["torch"],
}
DYNAMIC = [f for f in FORMATS if (BACKEND, f) not in export._FIXED_LENGTH]
LENGTH = 3


def model_of(layers, features=3):
    return keras.Sequential([keras.Input((None, features), name="frame"), *layers])


def perturbed(model):
    """Every weight moved, so that no zero hides what it multiplies."""
    rng = np.random.default_rng(1)
    for v in model.trainable_weights:
        v.assign(array(v) + 0.1 * rng.normal(size=v.shape).astype("float32"))
    return model


def sensor():
    """Both layers, and what acts on each step."""
    return model_of(
        [
            Dense(8, activation="gelu"),
            sLSTM(8, num_heads=2, return_sequences=True, name="slow"),
            keras.layers.LayerNormalization(),
            mLSTM(8, num_heads=2, return_sequences=True, name="fast"),
            Dense(2),
        ]
    )


def language_model():
    options = {"mlstm_options": {"conv_kernel_size": 3}, "tie_embeddings": True}
    return xLSTMLanguageModel(
        11, units=16, num_blocks=2, num_heads=2, pattern="1:1", logit_soft_cap=5.0, **options
    )


def peer():
    return model_of([LSTM(4, return_sequences=True, name="peer")])


def summary():
    return model_of([sLSTM(4, return_sequences=True), mLSTM(4)])


CASES = {"sensor": sensor, "language": language_model, "peer": peer, "summary": summary}


def wanted(format):
    """The files to make of each case: all as ONNX, of other formats enough to cover the way."""
    both = ["sequence", "streaming"]
    files = {"sensor": both, "language": ["streaming"]}
    if format == "onnx":
        files |= {"peer": ["streaming"], "summary": ["sequence"]}
        if format in DYNAMIC:  # written out step by step it takes long
            files["language"] = both
    if (BACKEND, format) in export._NO_SEQUENCE:
        files["sensor"] = ["streaming"]
    return files


@pytest.fixture(scope="module")
def models():
    keras.utils.set_random_seed(0)
    return {name: perturbed(build()) for name, build in CASES.items()}


def data(name, batch=3, length=LENGTH):
    rng = np.random.default_rng(2)
    if name == "language":
        return rng.integers(0, 11, (batch, length)).astype("int32")
    return rng.normal(size=(batch, length, 3)).astype("float32")


def run(model, x):
    """model(x) in NumPy; on JAX compiled once: op by op it would compile each."""
    return model.predict_on_batch(x) if BACKEND == "jax" else array(model(x))


def steps(step, inputs):
    return step.predict_on_batch(inputs) if BACKEND == "jax" else map(array, step(inputs))


def run_files(format, folder):
    command = [sys.executable, "-I", str(HERE / "exported.py"), format, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def need(format):
    for name in NEEDS[format]:
        pytest.importorskip(name, reason=f"the extra export-{BACKEND}")


@pytest.mark.parametrize("format", FORMATS)
def test_files_in_their_own_runtimes(format, models, tmp_path):
    need(format)
    length = None if format in DYNAMIC else LENGTH
    for name, parts in wanted(format).items():
        paths = export.export_model(models[name], tmp_path / name, format, parts, length)
        assert list(paths) == parts
        np.save(tmp_path / name / "x.npy", data(name))  # neither batch nor length of the export
    run_files(format, tmp_path)
    for name, parts in wanted(format).items():
        want = run(models[name], data(name))
        for part in parts:
            got = np.load(tmp_path / name / f"{part}-ran.npz")["outputs"]
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=f"{name} {part}")


def test_step_model_equals_the_whole_sequence(models):
    for name in ("sensor", "language", "peer"):
        model, x = models[name], data(name)
        step = export.step_model(model)
        state = [np.zeros((len(x), *s.shape[1:]), "float32") for s in step.inputs[1:]]
        want = run(model, x)
        for t in range(LENGTH):
            output, *state = steps(step, [x[:, t], *state])
            np.testing.assert_allclose(output, want[:, t], atol=1e-5)
        assert all(s.dtype == np.float32 for s in state)


def test_names(models):
    assert [x.name for x in export.step_model(models["sensor"]).inputs] == [
        "frame", "slow_h", "slow_c", "slow_n", "slow_m", "fast_C", "fast_n", "fast_m",
    ]  # fmt: skip
    names = [x.name for x in export.step_model(models["language"]).inputs]
    assert names[:3] == ["token_ids", "block_0_conv", "block_0_C"]
    assert names[-1] == "block_1_m"


def test_graphs():
    """Branches, an input without time, a model in a model, a layer used twice, several outputs."""
    frame, place = keras.Input((None, 3), name="frame"), keras.Input((2,), name="place")
    shared = sLSTM(4, return_sequences=True, return_state=True, name="shared")
    x, *_ = shared(Dense(4)(frame))
    x, last, *_ = shared(x * 2)
    inner = model_of([GRU(4, return_sequences=True), Dense(4)], features=4)
    x = keras.layers.Concatenate()([x, inner(x)])
    x = xLSTMStack(8, num_blocks=2, num_heads=2, architecture="large")(x)
    cells = keras.layers.RNN([sLSTMCell(4), sLSTMCell(4)], return_sequences=True)(x)
    summary = keras.layers.Concatenate()([x[:, -1], last, Dense(4)(place)])
    model = perturbed(keras.Model([frame, place], [cells, summary]))
    step = export.step_model(model)
    names = [x.name for x in step.inputs]
    assert names[:2] == ["frame", "place"]
    assert {"shared_h", "shared_again_h"} < set(names)
    x, place = data("sensor"), np.ones((3, 2), "float32")
    state = [np.zeros((3, *s.shape[1:]), "float32") for s in step.inputs[2:]]
    for t in range(LENGTH):
        cells, summary, *state = steps(step, [x[:, t], place, *state])
        if t in (0, LENGTH - 1):
            want = steps(model, [x[:, : t + 1], place])
            for got, whole in zip((cells, summary), want, strict=True):
                np.testing.assert_allclose(
                    got, whole if whole.ndim == 2 else whole[:, -1], atol=1e-5
                )


class Place(keras.layers.Layer):
    """Adds the number of the step."""

    def call(self, x):
        return x + keras.ops.arange(keras.ops.shape(x)[1], dtype="float32")[None, :, None]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Bidirectional(mLSTM(4), name="both")], "both cannot stream: it reads the sequence from its end"),
        ([sLSTM(4, go_backwards=True, name="back")], "back cannot stream.*go_backwards"),
        ([mLSTM(4, return_sequences=True), GlobalAveragePooling1D(name="mean")], "mean .*depend on other steps"),
        ([Conv1D(4, 3, padding="causal", name="conv"), sLSTM(4)], "conv .*depend on other steps"),
        ([Place(name="place"), sLSTM(4)], "place .*the step's place"),
        ([Dense(4)], "no layer that carries a state"),
    ],
)  # fmt: skip
def test_what_cannot_stream_is_named(layers, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.step_model(model_of(layers))


def test_states_from_elsewhere_are_refused():
    frame, context = keras.Input((None, 3)), keras.Input((4,))
    start = [Dense(4)(context) for _ in range(4)]
    model = keras.Model([frame, context], sLSTM(4, name="decoder")(frame, initial_state=start))
    with pytest.raises(ValueError, match="decoder starts from a state that the model computes"):
        export.step_model(model)
    model = keras.Sequential([keras.Input(batch_shape=(2, 5, 3)), sLSTM(4, stateful=True)])
    with pytest.raises(ValueError, match="stateful=False"):
        export.step_model(model)


def test_bad_arguments_write_nothing(models, tmp_path):
    model, folder = models["sensor"], tmp_path / "files"
    with pytest.raises(ValueError, match="`format` must be one of"):
        export.export_model(model, folder, "pickle")
    with pytest.raises(ValueError, match="`parts` must be"):
        export.export_model(model, folder, FORMATS[-1], parts="all")
    impossible = set(export._SUFFIX) - set(FORMATS)
    for format in impossible:
        with pytest.raises(ValueError, match=f"cannot write {format} files: .*load it with"):
            export.export_model(model, folder, format)
    for format in set(FORMATS) - set(DYNAMIC):
        need(format)
        with pytest.raises(ValueError, match="needs a fixed length.*length="):
            export.export_model(model, folder, format)
    for _, format in (key for key in export._NO_SEQUENCE if key[0] == BACKEND):
        need(format)
        with pytest.raises(ValueError, match="of whole sequences.*parts="):
            export.export_model(model, folder, format)
    if "litert" in FORMATS:
        with pytest.raises(ValueError, match="loop of peer"):
            export.export_model(models["peer"], folder, "litert", "sequence", length=LENGTH)
    need(FORMATS[-1])
    fixed = keras.Sequential([keras.Input((5, 3)), mLSTM(4)])
    with pytest.raises(ValueError, match="has the length 5"):
        export.export_model(fixed, folder, FORMATS[-1], length=6)
    assert not folder.exists()


def test_mixed_precision_is_refused(tmp_path):
    if importlib.util.find_spec(export._CONVERTER[BACKEND]) is None:
        pytest.skip("no converter")
    keras.config.set_dtype_policy("mixed_bfloat16")
    with pytest.raises(ValueError, match="computes in bfloat16"):
        export.export_model(model_of([mLSTM(4)]), tmp_path, "onnx")


def test_package_has_the_module():
    assert keras_xlstm.export is export
