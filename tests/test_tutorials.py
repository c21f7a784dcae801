"""The tutorials run from their first cell to the last, and carry what they showed."""

import json
import pathlib

import pytest
from tools import BACKEND

ROOT = pathlib.Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
SPEAKS = "print(", "verbose=2", "trained("  # what writes lines; a tutorial's own function, too


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.skipif(BACKEND != "jax", reason="their default backend; one is enough")
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_outputs_are_there(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source, kinds = "".join(cell["source"]), [o["output_type"] for o in cell["outputs"]]
        assert ("stream" in kinds) == any(words in source for words in SPEAKS)
        assert ("display_data" in kinds) == ("plt." in source)
        assert "error" not in kinds


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS] == ["forecasting", "prompt_cache"]
