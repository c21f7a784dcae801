"""Each example runs, at a size of seconds, on the backend of this run."""

import csv
import importlib
import importlib.util
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from tools import BACKEND

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
_ONNX = {"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnxscript"}


def run(name, *arguments, cwd):
    """Its standard output, from a process of its own."""
    env = {**os.environ, "KERAS_BACKEND": BACKEND}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """As `run`, in this process, which has imported the frameworks already."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("KERAS_BACKEND", BACKEND)
        monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend: run on torch")
@pytest.mark.parametrize(
    "path", sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "common.py"}), ids=lambda p: p.stem
)
def test_help(path, tmp_path):
    assert "--" in run(path.name, "--help", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_forecasting(tmp_path, here):
    # Two noisy daily waves, a gap in one: 2,200 hours leave 345 windows to test.
    hours = np.arange(2200)
    waves = np.stack([np.sin(hours / 24 * 2 * np.pi), np.cos(hours / 12 * 2 * np.pi)], axis=1)
    waves += 0.1 * np.random.default_rng(0).normal(size=waves.shape)
    rows = [f"day,{x:.3f},{y:.3f}" for x, y in waves]
    rows[100] = rows[2000] = "day,,0.5"
    (tmp_path / "waves.csv").write_text("\n".join(["date,a,b", *rows]))
    options = ("--columns", 1, 2, "--epochs", 2, "--out", "out")
    said = here("forecasting.py", "--csv", "waves.csv", *options).splitlines()[-3:]
    error = {line.split(":")[0]: float(line.split()[2][:-1]) for line in said[:2]}
    assert error["xlstm"] < 0.5 * error["repeat-last"]
    assert 0.5 < float(said[2].split()[-1]) < 1
    assert (tmp_path / "out/forecast.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/forecaster.keras").stat().st_size > 10_000


@pytest.mark.parametrize("layer", ["lstm", "xlstm"])
def test_first_forecast(layer, tmp_path, here):
    # Quiet Sundays, of 60 weeks.
    hours = np.arange(60 * 7 * 24)
    waves = np.sin(hours / 24 * 2 * np.pi) * (hours // 24 % 7 > 0)
    waves += 0.1 * np.random.default_rng(0).normal(size=waves.shape)
    (tmp_path / "waves.csv").write_text("\n".join(["traffic", *(f"{x:.3f}" for x in waves)]))
    options = ("--column", 0, "--epochs", 3, "--layer", layer)
    said = here("first_forecast.py", "--csv", "waves.csv", *options).splitlines()[-2:]
    assert [line.rsplit(" ", 1)[0] for line in said] == [
        f"mean squared error of {name}:" for name in ("the day a week before", layer)
    ]
    assert float(said[1].split()[-1]) < 0.5


ENGINES = {"jax": ["model-parallel"], "torch": ["ddp", "fsdp"], "tensorflow": ["mirrored"]}


@pytest.mark.parametrize("engine", ENGINES[BACKEND])
def test_distributed(engine, tmp_path):
    options = ("--epochs", 2, "--steps", 3, "--length", 32, "--engine", engine)
    said = run("distributed.py", *options, cwd=tmp_path)
    first, last = (float(line.split()[3][:-1]) for line in said.splitlines() if "tokens/s" in line)
    assert last < first
    assert (tmp_path / "model.keras").stat().st_size > 100_000


@pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None,
    reason="the data are in a package: pip install --no-deps aeon==1.6.0",
)
def test_classification(tmp_path, here):
    said = here("classification.py", "--epochs", 2, "--layer", "bidirectional", "--out", "out")
    assert float(said.split()[-1]) > 2 / 9
    [row] = (tmp_path / "out/results.csv").read_text().splitlines()
    assert row.startswith("bidirectional,16009,0,2,")
    assert (tmp_path / "out/bidirectional.png").read_bytes().startswith(b"\x89PNG")


def test_tagging(here):
    said = here("tagging.py", "--files", 3, "--epochs", 1, "--model", "both")
    line = said.splitlines()[-1]
    assert line.startswith("both: ")
    assert "parameters, seed 0, right: " in line
    assert float(line.split("right: ")[1].split()[0]) > 0.4  # most tags stand for a seventh


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnxruntime", _ONNX[BACKEND])),
    reason=f"the extra export-{BACKEND}",
)
def test_streaming(tmp_path, here):
    said = here("streaming.py", "--units", 8, "--epochs", 1, "--out", "files")
    rows = [line.split() for line in said.splitlines()[-3:]]
    assert sorted(row[0] for row in rows) == ["lstm", "mlstm", "slstm"]
    for _, median, slow, usual_error, *_ in rows:
        assert float(slow) >= float(median) > 0
        assert float(usual_error) < 1e-4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="run on tensorflow alone: one is enough")
def test_state_tracking(tmp_path, here):
    options = ("--models", "slstm", "transformer", "--steps", 20, "--long", 64, "--out", "out")
    said = here("state_tracking.py", "--task", "modular", *options)
    assert said.count("scaled accuracy") == 2
    rows = (tmp_path / "out/results.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [
        ["modular", "slstm"],
        ["modular", "transformer"],
    ]
    assert (tmp_path / "out/modular.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(BACKEND != "torch", reason="run on torch alone: one is enough")
def test_associative_recall(tmp_path, here):
    options = ("--models", "mlstm", "transformer", "--pairs", 2, 4, "--steps", 10, "--length", 16)
    assert here("associative_recall.py", *options, "--out", "out").count("accuracy") == 4
    assert len((tmp_path / "out/results.csv").read_text().splitlines()) == 4


@pytest.mark.skipif(BACKEND != "torch", reason="run on torch alone: one is enough")
def test_compare_language_models(tmp_path, here):
    (tmp_path / "text").write_text("the cat sat on the mat, and so on and on.\n" * 400)
    models = ("1:1", "no-input-gate", "lstm", "transformer")
    options = ("--models", *models, "--blocks", 2, "--parameters", 60_000, "--steps", 8)
    options += ("--length", 32, "--far", 64, "--windows", 9, "--text", "text", "--out", "out")
    here("compare_language_models.py", *options)
    said = here("compare_language_models.py", *options[:2], "--rates", 1e-2, 3e-3, *options[5:])
    with open(tmp_path / "out/results.csv") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == [*models, "1:1", "1:1"]
    assert all(0 < float(bits) < 9 for row in rows for bits in row[6:])
    assert said.count(", seeds: 1;") == 5  # with those of the run before; one is there twice
    assert (tmp_path / "out/position.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("common")


@pytest.mark.skipif(BACKEND != "jax", reason="run on jax alone: one is enough")
class TestTexts:
    def test_a_tenth_is_held_out(self, common, tmp_path):
        (tmp_path / "a").write_bytes(bytes(range(100)))
        assert common.read_text(str(tmp_path / "a"), None)[1] == bytes(range(90, 100))
        for n in range(11):
            (tmp_path / f"{n:02}.txt").write_bytes(b"%d" % n)
        train, held_out = common.read_text(str(tmp_path), None)
        assert train.split() == [b"%d" % n for n in range(11) if n % 10]
        assert held_out.split() == [b"0", b"10"]

    def test_what_is_missing_is_named(self, common, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow", None)
        with pytest.raises(SystemExit, match="pip install tensorflow .*--text a file"):
            common.read_text("tfds:tiny_shakespeare", None)

    def test_every_byte_belongs_to_a_piece(self, common):
        pytest.importorskip("tokenizers")
        train, held_out = ("Straße, naïve\n\n cafés 🙂 " * 99).encode(), "Öl 🙃\xff".encode()
        *texts, sizes = common.tokenized(train, held_out, 300)
        assert [sizes[ids].sum() for ids in texts] == [len(train), len(held_out)]
        assert len(texts[0]) < len(train) / 4
        *texts, sizes = common.tokenized(train, held_out, 256)
        assert [sizes[ids].sum() for ids in texts] == [len(train), len(held_out)]

    def test_the_tokenizer_is_trained_on_the_training_text_alone(self, common):
        pytest.importorskip("tokenizers")
        text = b"the cat sat. " * 99
        ids, _, sizes = common.tokenized(text, b"mat mat mat " * 99, 300)
        others, _, other_sizes = common.tokenized(text, b"dog dog dog " * 99, 300)
        np.testing.assert_array_equal(ids, others)
        np.testing.assert_array_equal(sizes, other_sizes)


@pytest.mark.skipif(BACKEND != "jax", reason="run on jax alone: one is enough")
def test_language_model(tmp_path, here):
    options = ("--steps", 4, "--epochs", 2, "--units", 16, "--length", 32, "--held-out-bytes", 2048)
    said = here("language_model.py", *options, "--out", "out")
    assert "order-2 entropy" in said
    for name in ("model.keras", "sample.txt", "loss.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
