"""Figures stand in benchmarks/results/*.jsonl alone, and the pages show them as they are there."""

import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from tools import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend: on torch")
ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
FILES = sorted((BENCHMARKS / "results").glob("*.jsonl"))
PAGES = [ROOT / "README.md", BENCHMARKS / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = [
    "date", "commit", "device", "versions", "backend", "case", "metric", "unit", "ours", "peer",
]  # fmt: skip
MARKED = re.compile(r"<!-- results: (\w+) -->.*?<!-- end -->", re.DOTALL)


def run(*command, **env):
    env = {**os.environ, "KERAS_BACKEND": BACKEND, **env}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def is_figure(figure):
    if isinstance(figure, list):
        return len(figure) == 2 and figure[0] <= figure[1] and all(map(is_figure, figure))
    return isinstance(figure, float | int) and figure >= 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_are_well_formed(path):
    assert (BENCHMARKS / f"{path.stem}.py").exists()  # a figure goes with its script
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == FIELDS
        assert datetime.date.fromisoformat(row["date"]) <= datetime.date.today()
        assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", row["commit"])
        assert all(row[name] for name in ("device", "backend", "case", "metric"))
        assert isinstance(row["unit"], str)
        assert all(isinstance(version, str) for version in row["versions"].values())
        assert row["ours"]
        assert all(map(is_figure, [*row["ours"].values(), *row["peer"].values()])), row
        assert not row["ours"].keys() & row["peer"].keys()


def test_pages_show_the_data():
    result = run(BENCHMARKS / "render.py", "--check")
    assert result.returncode == 0, f"run `make results`: {result.stdout}{result.stderr}"


@pytest.mark.parametrize("name", ["cpu", "context"])
def test_pictures_show_the_data(name):
    code = f"import plot; print(plot.digest({name!r}))"
    drawn = run("-c", code, PYTHONPATH=str(BENCHMARKS))
    picture = (ROOT / f"docs/_static/{name}.svg").read_text(encoding="utf-8")
    assert drawn.stdout.strip() in picture, f"run `make results`: {drawn.stderr}"
    assert len(picture) < 60_000


def test_a_page_that_differs_is_found(tmp_path):
    for page in PAGES:
        (tmp_path / page.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", dirs_exist_ok=True)
    assert run(tmp_path / "benchmarks/render.py", "--check").returncode == 0
    path = tmp_path / "benchmarks/results/gpu_slstm.jsonl"
    first, *others = path.read_text().splitlines()
    row = json.loads(first)
    row["ours"]["triton"] *= 9  # slower than the peer: short of the goal
    path.write_text("\n".join([first, *others, json.dumps(row)]) + "\n")
    result = run(tmp_path / "benchmarks/render.py", "--check")
    assert result.returncode == 1
    assert "differs: docs/kernels.md" in result.stdout
    assert run(tmp_path / "benchmarks/render.py").returncode == 0
    assert "**0.6x**" in (tmp_path / "benchmarks/RESULTS.md").read_text()


def test_results_are_short():
    assert len((BENCHMARKS / "RESULTS.md").read_text().splitlines()) <= 200


def test_every_table_is_shown():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pages; print(*pages.TABLES)"
    names = set(run("-c", code, BENCHMARKS).stdout.split())
    assert names == {name for page in PAGES for name in MARKED.findall(page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_figure_is_written_by_hand(page):
    """Speeds, but for the misses of RESULTS.md: one line each, with what was tried."""
    text = page.read_text(encoding="utf-8")
    # A comment at the start of a line ends a paragraph.
    assert not re.search(r"^ *<!-- results: \w+ -->[^\n]", text, re.MULTILINE)
    if page.stem in ("RESULTS", "changelog"):
        return
    speed = r"\d[\d.,]*(?:x\b| ?(?:times as fast|tokens a second|tokens/s|ms|us|TB/s)\b)"
    assert not re.findall(speed, MARKED.sub("", text))


def test_every_benchmark_records():
    helpers = {"memory", "record", "render", "pages", "plot", "tune_torch"}  # no figure is kept
    for path in BENCHMARKS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        both = "record.option(" in text and "record.add(" in text
        assert both != (path.stem in helpers), path.name


def test_a_row_is_appended_where_it_is_asked_for(tmp_path):
    code = """
import argparse, pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import record
record.RESULTS = pathlib.Path(sys.argv.pop(1))
parser = argparse.ArgumentParser()
record.option(parser)
parser.parse_args()
figures = {"a": 1.23456789, "refused": "an error", "not run": None}
record.add("somewhere/cpu.py", "a case", "fit", "ms", figures, {"LSTM": 2})
record.add("somewhere/cpu.py", "nothing of ours", "fit", "ms", {"a": None}, {"LSTM": 2})
"""
    assert run("-c", code, BENCHMARKS, tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())
    result = run("-c", code, BENCHMARKS, tmp_path, "--record")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert list(row) == FIELDS
    assert (row["ours"], row["peer"]) == ({"a": 1.23457}, {"LSTM": 2})
    assert row["backend"] == BACKEND
