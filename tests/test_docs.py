"""Every Python block of the pages in docs/ runs, a page in one namespace; the site builds."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
from tools import BACKEND, run_blocks

from keras_xlstm import export

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def test_most_pages_have_code():
    assert len(WITH_CODE) >= 9


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    if page.stem == "export":
        pytest.importorskip(export._CONVERTER[BACKEND], reason=f"the extra export-{BACKEND}")
    if page.stem == "text":
        pytest.importorskip("tokenizers", reason="the extra tokenizers")
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


@pytest.mark.skipif(BACKEND != "jax", reason="the same on every backend: built on jax")
@pytest.mark.skipif(not importlib.util.find_spec("sphinx"), reason="needs the extra `docs`")
def test_site(tmp_path):
    """-W: a link or reference to nothing, within the site, is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += [str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {page.stem for page in PAGES} <= {page.stem for page in tmp_path.glob("*.html")}
    api = (tmp_path / "api.html").read_text()
    assert 'id="keras_xlstm.layers.mLSTM"' in api
    assert "*args" not in api  # signatures are the constructors'
    for page in tmp_path.glob("*.html"):  # nothing is loaded from elsewhere
        loaded = re.findall(
            r'(?:src=|<link[^>]*rel="(?:stylesheet|preload|preconnect)"[^>]*href=)"(\w+:)?//',
            page.read_text(),
        )
        assert not loaded, page
