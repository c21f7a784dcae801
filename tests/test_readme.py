"""Every Python block of the README runs, in order, in one namespace; docstring examples too."""

import doctest
import pathlib
import re

import keras
import numpy as np
import pytest
from tools import run_blocks

import keras_xlstm
from keras_xlstm import backends, models

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(README)
    assert [len(text) for text in namespace["texts"]] == [22, 21]
    assert (tmp_path / "model.keras").exists()


NAMES = "convert distribution export initializers layers losses models ops windows"
MODULES = [getattr(keras_xlstm, name) for name in NAMES.split()]
PUBLIC = [getattr(m, name) for m in MODULES for name in m.__all__]
PUBLIC += [models.xLSTMLanguageModel.generate, models.xLSTMLanguageModel.stream]
PUBLIC = [p for p in PUBLIC if ">>>" in (p.__doc__ or "")] + [backends.available]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: t.__name__)
def test_docstring(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"np": np, "keras": keras, "keras_xlstm": keras_xlstm}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, globs=names, name=thing.__name__)
    for example in test.examples:
        # torch.Size([2, 16]) is (2, 16).
        example.source = re.sub(r"^(.*)\.shape$", r"tuple(\1.shape)", example.source.strip()) + "\n"
    results = runner.run(test)
    assert results.attempted
    assert not results.failed


def test_public_things_are_documented():
    for module in [*MODULES, backends]:
        for name in module.__all__:
            assert getattr(module, name).__doc__, name
