"""Model files that were tampered with: a model with the outputs of the original, or an error;
nothing written elsewhere, nothing unpickled."""

import io
import json
import pathlib
import pickle
import random
import sys
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest
from tools import BACKEND, EXAMPLES, array

from keras_xlstm import layers, models

# Most of what reads them is the same everywhere; `make fuzz` runs it on every backend.
pytestmark = pytest.mark.skipif(BACKEND != "torch" and not EXAMPLES, reason="runs on torch")

# The file of a stranger may fail anywhere in Keras, but as what a caller can catch.
REFUSED = (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, OverflowError)
WRONG = [
    None, True, -1, 0, 2**62, 2**70, 1.5, float("nan"), "x", "16", "../x", [], [16], {}, [[1]],
    {"class_name": "Nope", "config": {}},
]  # fmt: skip
IDS = np.arange(10).reshape(2, 5)
X = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")


def chain():
    x = inputs = keras.Input((None, 3))
    x = layers.sLSTM(8, num_heads=2, return_sequences=True, name="s")(x)
    x = keras.layers.Bidirectional(layers.mLSTM(4, return_sequences=True, name="m"), name="b")(x)
    x = layers.xLSTMLargeBlock(num_heads=2, name="large")(x)
    x = keras.layers.RNN(layers.sLSTMCell(8, num_heads=2), name="cell")(x)
    return keras.Model(inputs, x), X


def language_model():
    options = {"num_blocks": 2, "num_heads": 2, "pattern": "1:1"}
    return models.xLSTMLanguageModel(11, 8, **options), IDS


@pytest.fixture(scope="module", params=[chain, language_model], ids=lambda f: f.__name__)
def saved(request, tmp_path_factory):
    """Members of the file, the input, its output."""
    keras.utils.set_random_seed(0)
    model, x = request.param()
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    return members, x, array(model(x))


def write(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items() if isinstance(members, dict) else members:
            file.writestr(name, data)
    return path


def check(path, x, want, model=None):
    """True where it loads, which is then the original."""
    there, start = sorted(path.parent.parent.rglob("*")), time.monotonic()
    try:
        if path.suffix == ".keras":
            model = keras.models.load_model(path)
        else:
            model.load_weights(path)
        got = array(model(x))
    except REFUSED:
        got = None
    assert time.monotonic() - start < 60
    assert sorted(path.parent.parent.rglob("*")) == there
    if sys.platform == "linux":  # which counts kB; others count in other units, or do not
        import resource

        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6
    if got is not None:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return got is not None


def places(config, inside=False, path=()):
    """Where the settings of our classes stand, and what they are."""
    if isinstance(config, dict):
        ours = str(config.get("registered_name", "")).startswith("keras_xlstm>")
        for key, value in config.items():
            if inside:
                yield (*path, key), value
            yield from places(value, inside or (ours and key == "config"), (*path, key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from places(value, inside, (*path, index))


def changed(config, path, value):
    config = json.loads(json.dumps(config))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(config).encode()


def fits(name, old, new):
    """Whether it may be another model's, and no mistake."""
    if old is None:  # caps, sizes, clips, seeds, initializers
        return new is None or isinstance(new, (int, float, str, dict))
    numbers = isinstance(old, (int, float)) and not isinstance(old, bool)
    return (type(new) is type(old)) or (numbers and isinstance(new, float)) or new is None


def test_settings_of_the_wrong_type(saved, tmp_path):
    members, x, want = saved
    config = json.loads(members["config.json"])
    rng = random.Random(None if EXAMPLES else 0)
    found = [
        (p, old, new) for p, old in places(config) for new in WRONG if not fits(p[-1], old, new)
    ]
    for path, _, new in rng.sample(found, min(len(found), EXAMPLES or 40)):
        where = write(tmp_path / "m.keras", {**members, "config.json": changed(config, path, new)})
        check(where, x, want)


class Touch:
    """What leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_members_that_should_not_be_there(saved, tmp_path):
    """They are read by nobody, and put nowhere."""
    members, x, want = saved
    path = tmp_path / "folder" / "m.keras"
    path.parent.mkdir()
    bad = pickle.dumps(Touch(tmp_path / "unpickled"))
    names = ["../climbed", "../../climbed", str(tmp_path / "absolute"), "assets/../../climbed"]
    names += ["a\\b", "assets/x/../../../y", "x.pkl", "model.weights.npz", "variables.h5", "c:x"]
    for name in names:
        assert check(write(path, {**members, name: bad}), x, want), name
    assert check(write(path, {**members, **dict.fromkeys(names, bad)}), x, want)
    for name, data in members.items():  # twice: the later one counts, as everywhere
        with pytest.warns(UserWarning, match="Duplicate name"):
            write(path, [*members.items(), (name, data)])
        assert check(path, x, want)
    assert not (tmp_path / "unpickled").exists()


def test_members_that_are_something_else(saved, tmp_path):
    members, x, want = saved
    path = tmp_path / "folder" / "m.keras"
    path.parent.mkdir()
    bad = pickle.dumps(Touch(tmp_path / "unpickled"))
    stored = io.BytesIO()
    np.savez(stored, x=np.array([Touch(tmp_path / "unpickled")], object))
    for name in ("config.json", "model.weights.h5"):
        for data in (bad, b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, stored.getvalue()):
            assert not check(write(path, {**members, name: data}), x, want), (name, data[:20])
        others = {key: data for key, data in members.items() if key != name}
        assert not check(write(path, others), x, want)
        assert not check(write(path, {**others, "model.weights.npz": stored.getvalue()}), x, want)
    code = {"module": "pathlib", "class_name": "Path", "config": {}, "registered_name": None}
    call = {"module": "builtins", "class_name": "function", "config": "exec"}
    function = {"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}}
    for new in (code, call, function):
        data = json.dumps(new).encode()
        assert not check(write(path, {**members, "config.json": data}), x, want), new
    assert not (tmp_path / "unpickled").exists()


def damages(file, name):
    """Ways to spoil the dataset of that name, as functions without arguments."""
    value = file[name][()]
    parent = name.rpartition("/")[0]

    def instead(new):
        del file[name]
        file[name] = new

    def huge():
        del file[name]
        file.create_dataset(name, (2**40, *value.shape[1:]), "f4", chunks=True, fillvalue=0.0)

    yield False, lambda: file.pop(name)
    yield False, lambda: file.pop(parent)
    yield False, lambda: file.create_dataset(f"{parent}/{len(file[parent])}", data=value)
    for new in (value[..., None], value[:-1], np.zeros(0), np.float32(1)):
        yield False, lambda new=new: instead(new)
    yield False, lambda: instead(np.full(value.shape, b"x"))
    yield False, lambda: instead(np.full(value.shape, np.array((1, 2.0), "i4,f4")))
    yield False, lambda: instead(h5py.SoftLink("/elsewhere"))
    yield False, lambda: instead(h5py.ExternalLink("other.h5", name))
    yield False, huge
    yield False, lambda: (file.pop(parent), file.create_dataset(parent, data=value))
    yield True, lambda: instead(value.astype("f8"))
    yield True, lambda: file.create_dataset("surplus/vars/0", data=value)
    yield True, lambda: file[name].attrs.update(scale=np.nan, name="../x")
    yield True, lambda: file[parent].attrs.update(name=np.nan)


@pytest.mark.parametrize("layer", ["large", "s_lstm_block", "s", "cell/cell"])
def test_a_weight_too_many(layer, tmp_path):
    """It was left out without a word."""
    path = tmp_path / "m.weights.h5"
    model, _ = language_model() if layer == "s_lstm_block" else chain()
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        groups = []
        file.visit(groups.append)
        name = {"large": "x_lstm_large_block", "s": "s_lstm", "cell/cell": "rnn/cell"}.get(
            layer, layer
        )
        group = next(g for g in groups if g.endswith(f"{name}/vars"))
        file.create_dataset(f"{group}/surplus", data=np.zeros(3, "f4"))
    with pytest.raises(ValueError, match=r"must hold .* Received: .*'surplus'"):
        model.load_weights(path)


@pytest.mark.parametrize("file_name", ["m.keras", "m.weights.h5"])
def test_weights_of_another_kind(saved, file_name, tmp_path):
    members, x, want = saved
    path, model = tmp_path / file_name, None
    if file_name == "m.weights.h5":
        model = keras.models.load_model(write(tmp_path / "other.keras", members))
    rng = random.Random(None if EXAMPLES else 0)
    names = []
    with h5py.File(io.BytesIO(members["model.weights.h5"])) as file:
        file.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
        kinds = len(list(damages(file, names[0])))
    for kind in range(kinds):
        for name in rng.sample(names, min(len(names), EXAMPLES or 1)):
            stored = io.BytesIO(members["model.weights.h5"])
            with h5py.File(stored, "r+") as file:
                loads, damage = list(damages(file, name))[kind]
                damage()
            if model is None:
                write(path, {**members, "model.weights.h5": stored.getvalue()})
            else:
                path.write_bytes(stored.getvalue())
            assert check(path, x, want, model) == loads, (name, kind)
