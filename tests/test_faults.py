"""Killed runs, damaged and hostile files, threads, and the same numbers run to run."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import keras
import killed
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import BACKEND, EXAMPLES, HERE, array

from keras_xlstm import convert, models
from keras_xlstm.layers import mLSTM, sLSTM

# ----------------------------------------------------------------------------- killed, repeated


def test_killed_and_resumed(tmp_path):
    """The loss curve of a run that was not killed; the last checkpoint is whole."""
    at = np.random.default_rng().integers(killed.BATCHES, killed.EPOCHS * killed.BATCHES - 1)
    command = [sys.executable, str(HERE / "killed.py"), str(tmp_path), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert abs(done.returncode) == killed.KILL, done.stderr  # negative on POSIX alone
    want, whole = killed.fit()
    got, resumed = killed.fit(tmp_path)
    assert len(got) == killed.EPOCHS - at // killed.BATCHES, at
    np.testing.assert_allclose(got, want[-len(got) :], rtol=1e-6, err_msg=f"killed at {at}")
    last = keras.models.load_model(tmp_path / f"{killed.EPOCHS}.keras")
    for model in (resumed, last):
        for a, b in zip(model.weights, whole.weights, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-6, atol=1e-7)


def test_same_seed_same_numbers():
    (a, first), (b, second) = killed.fit(), killed.fit()
    assert a == b
    for v, w in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(array(v), array(w))


DETERMINISTIC = {
    "torch": "import torch; torch.use_deterministic_algorithms(True)",
    "tensorflow": "import tensorflow as tf; tf.config.experimental.enable_op_determinism()",
    "jax": "",  # on GPUs a flag; it is one that every jaxlib knows
}


def test_same_numbers_where_determinism_is_asked_for():
    """In another process, with what the framework offers: no error, and the numbers of this one."""
    code = f"import keras; {DETERMINISTIC[BACKEND]}\nimport killed; print(killed.fit()[0])"
    flags = f"{os.environ['XLA_FLAGS']} --xla_gpu_deterministic_ops=true"
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(got, killed.fit()[0], rtol=1e-6)  # by its own operators, perhaps


# ------------------------------------------------------------------------------- damaged files


def small(seed=0):
    keras.utils.set_random_seed(seed)
    layers = [sLSTM(8, num_heads=2, return_sequences=True, name="s"), mLSTM(8, name="m")]
    return keras.Sequential([keras.Input((None, 3)), *layers])


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_truncated(name, kept, tmp_path):
    """An error; and where there is a model already, its weights are what they were."""
    path, model = tmp_path / name, small()
    (model.save if name == "model.keras" else model.save_weights)(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    other = small(seed=1)
    before = [array(v) for v in other.weights]
    with pytest.raises((ValueError, OSError)) as error:
        keras.models.load_model(path) if name == "model.keras" else other.load_weights(path)
    assert str(error.value)
    for v, w in zip(other.weights, before, strict=True):
        np.testing.assert_array_equal(array(v), w)


# ------------------------------------------------------------------------------- hostile files

CONFIG = {
    "model_type": "xlstm", "vocab_size": 17, "hidden_size": 16, "num_blocks": 1, "num_heads": 2,
    "tie_word_embeddings": False, "norm_eps": 1e-6, "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0, "eps": 1e-6, "use_bias": False,
}  # fmt: skip
ODD = [
    None, True, -1, 0, 2**62, 2**70, 1.5, float("nan"), float("inf"), "x", "16", "../x", [], [16],
    {}, [[1]],
]  # fmt: skip


@pytest.fixture(scope="module")
def official():
    """The header and the bytes of a small model's file."""
    model = models.xLSTMLanguageModel(17, 16, num_blocks=1, num_heads=2, architecture="large")
    header, body = {}, b""
    for name, a in convert.to_state_dict(model, format="transformers").items():
        offsets = [len(body), len(body) + a.nbytes]
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": offsets}
        body += a.tobytes()
    return header, body


def packed(header, body):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def write(folder, data, config=CONFIG, name="model.safetensors"):
    config = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(config)
    (folder / name).write_bytes(data)


def refused(folder, words="must"):
    """A ValueError that says what must be, soon: whatever else comes up is a bug."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=words):
        convert.from_pretrained(folder)
    assert time.monotonic() - start < 10


def test_the_file_itself_loads(official, tmp_path):
    write(tmp_path, packed(*official))
    assert convert.from_pretrained(tmp_path).settings["units"] == 16


@pytest.mark.parametrize("name", CONFIG)
def test_config_values_of_the_wrong_type(name, official, tmp_path):
    fits = {"norm_eps": (0, 1.5), "gate_soft_cap": (1.5,), "output_logit_soft_cap": (1.5,)}
    for value in ODD:
        # None says nothing of the default; a bool is a number to Python's `in`.
        if value is None or (type(value) is not bool and value in fits.get(name, ())):
            continue
        write(tmp_path, packed(*official), {**CONFIG, name: value})
        refused(tmp_path)


@pytest.mark.parametrize("text", ["", "null", "[]", '"xlstm"', "{", "[" * 200_000, "1" * 5000])
def test_config_that_is_no_object(text, official, tmp_path):
    write(tmp_path, packed(*official), text)
    refused(tmp_path, "config.json in .* must be a JSON object")


def test_headers_that_lie(official, tmp_path):
    header, body = official
    first = next(iter(header))
    entry = header[first]
    size = entry["data_offsets"][1]
    bad = [{**header, first: {**entry, key: odd}} for key in entry for odd in ODD]
    bad += [{**header, first: odd} for odd in ODD]
    bad += [{**header, first: {**entry, "shape": [odd, 16]}} for odd in ODD]
    # Shared bytes, a gap, a tensor of nothing that is huge, blocks that are not there.
    bad += [{**header, first: {**entry, "data_offsets": [4, size + 4]}}]
    bad += [{**header, "gap": {**entry, "data_offsets": [len(body) + 4, len(body) + 4 + size]}}]
    empty = {"dtype": "F32", "data_offsets": [0, 0]}
    bad += [{**header, first: {**empty, "shape": shape}} for shape in ([0, 2**62], [2**62, 0])]
    for name in ("99999999999999", "5", "٣", "9" * 5000):
        bad += [{**header, f"backbone.blocks.{name}.norm_mlstm.weight": entry}]
    twice = json.dumps(header).encode()
    bad += [twice[:-1] + b"," + twice[1:], b"", b"{", b"null", b"\xff", b"[" * 200_000]
    for changed in bad:
        write(tmp_path, packed(changed, body))
        refused(tmp_path)
    for length in (2**63, 2**64 - 1, 2**40):
        write(tmp_path, length.to_bytes(8, "little") + packed(header, body)[8:])
        refused(tmp_path, "fewer than its header")


def test_shards_that_lie(official, tmp_path):
    header, body = official
    first = next(iter(header))
    index = tmp_path / "model.safetensors.index.json"
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path, packed(header, body), name=name)
    outside = ["../a.safetensors", "/etc/passwd", "", ".", "..", "a\x00b", "x" * 5000, 3, None]
    maps = [{first: file} for file in outside]
    maps += [[1], None, {}, {first: "a.safetensors", "more": "a.safetensors"}]
    maps += [{first: "config.json"}, {first: "a.safetensors", "more": "b.safetensors"}]
    for weight_map in maps:
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(tmp_path)
    for text in (b"[" * 200_000, b"\xff\xfe", b"[]"):
        index.write_bytes(text)
        refused(tmp_path)


@settings(max_examples=EXAMPLES or 100, deadline=None, derandomize=not EXAMPLES, database=None)
@given(data=st.data())
def test_mutated_bytes(official, data):
    """Bytes changed, put in or taken out: an error or a model, nothing else."""
    whole = bytearray(packed(*official))
    end = 8 + int.from_bytes(whole[:8], "little") + 64  # mostly the header
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        at = data.draw(st.integers(0, end), "at")
        new = data.draw(st.binary(max_size=3), "new")
        whole[at : at + data.draw(st.integers(0, 3), "taken out")] = new
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), bytes(whole))
        with contextlib.suppress(ValueError):
            convert.from_pretrained(folder)


def test_no_pickle_is_read(official, tmp_path):
    write(tmp_path, b"\x80\x04.", name="pytorch_model.bin")
    refused(tmp_path, "Pickled weights are not read")


# ------------------------------------------------------------------------------------- threads


def test_predictions_of_several_threads():
    """On two models at once, each with its own outputs."""
    both = [small(), small(seed=1)]
    x = np.random.default_rng(0).normal(size=(4, 7, 3)).astype("float32")
    want = [model.predict(x, verbose=0) for model in both]
    wrong, failed = [], []

    def work(model, expected):
        try:
            for _ in range(5):
                got = array(model(x))
                if np.abs(got - expected).max() > 1e-5:
                    wrong.append(got)
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(both * 2, want * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not wrong
