"""What the sources of the kernels must not do, as no test without a GPU would show it."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parent.parent / "backends" / "kernels").rglob("*.py"))


def renamed(node):
    """Pairs (a, b) of every a = b among names, or of each in a, c = b, d."""
    for assign in (n for n in ast.walk(node) if isinstance(n, ast.Assign)):
        for target in assign.targets:
            sides = target, assign.value
            if all(isinstance(side, ast.Tuple) for side in sides):
                pairs = zip(*(side.elts for side in sides), strict=False)
            else:
                pairs = [sides]
            for a, b in pairs:
                if isinstance(a, ast.Name) and isinstance(b, ast.Name):
                    yield (a.id, b.id), assign.lineno


def not_carried(source):
    """Triton (3.6 to 3.9) goes through a loop's body once to find what it changes. A name that is
    what it is assigned there, as it was assigned the same before, seems unchanged, and keeps its
    first value (the interpreter runs Python, which does not)."""
    for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
        if not any("jit" in ast.unparse(d) or "_kernel" in ast.unparse(d)
                   for d in function.decorator_list):  # fmt: skip
            continue
        everywhere = list(renamed(function))
        for loop in (n for n in ast.walk(function) if isinstance(n, (ast.For, ast.While))):
            inside = {pair for pair, _ in renamed(loop)}
            for pair, line in everywhere:
                if line < loop.lineno and pair in inside:
                    yield function.name, line, *pair


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_loops_carry_what_they_change(path):
    assert not list(not_carried(path.read_text()))


def test_the_test():
    wrong = """
@triton.jit
def kernel(p):
    new = tl.load(p)
    old, other = new, p
    for t in range(9):
        if t % 3 == 0:
            old = new
            new = tl.load(p + t)
"""
    assert list(not_carried(wrong)) == [("kernel", 5, "old", "new")]
    assert not list(not_carried(wrong.replace("old, other = new, p", "old = tl.cast(0.0, p)")))
