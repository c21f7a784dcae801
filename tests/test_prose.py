"""The form of what people read: lengths of lines and sentences, words, links."""

import ast
import functools
import io
import pathlib
import re
import tokenize

import pytest
from tools import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend")
ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGE = sorted(p for folder in ("keras_xlstm", "backends") for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(p for folder in ("examples", "benchmarks") for p in (ROOT / folder).glob("*.py"))

WORDS_OF_A_SENTENCE = 30
CHARACTERS_OF_A_LINE = 100
WORDS_OF_THE_README = 900
# Words that say little to somebody who has not written the package. What to write is on the right.
IDIOMS = {
    "alike": "equal, the same",
    "anew": "again",
    "as it comes": "by default",
    "by heart": "memorise",
    "for good": "for ever, or leave it out",
    "for its part": "leave it out",
    "gives? way": "name what happens",
    "holds? fast": "fixes, keeps",
    "made one by one": "separately",
    "said": "written, stated",
    "such an?": "name the thing",
    "the host decides": "the time of Python on the CPU limits it",
    "without a word": "silently",
    "what of": "name the thing",
}


def of_page(path):
    """The paragraphs and points of a page; no code, tables, headings or directives."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    text = re.sub(r"^\$\$.*?\$\$$", "", text, flags=re.S | re.M)
    text = re.sub(r"^([ ]*)(?:[-*]|\d+\.) ", r"\n\1", text, flags=re.M)
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        lines = [line for line in lines if not line.startswith(("|", "#", ":", "!["))]
        yield " ".join(lines)


def of_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if not block.startswith(("    ", ">>>")):  # an example
                    block = re.sub(r"\n\s*(\*{0,2}\w+)(:|  ) ", r". \1: ", block)  # a parameter
                    lines = [line.strip() for line in block.splitlines()]
                    yield " ".join(line for line in lines if "   " not in line)  # no tables


def of_comments(text):
    lines, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            if last is not None and not (alone and token.start[0] == last + 1):
                yield " ".join(lines)
                lines = []
            lines.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(lines)


def of_errors(tree):
    """What `raise` says, with … for what it puts in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.JoinedStr):
                    said = (getattr(value, "value", "…") for value in part.values)
                    yield "".join(v if isinstance(v, str) else "…" for v in said)
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


@functools.cache
def prose(path):
    if path.suffix == ".md":
        return [text for text in of_page(path) if text]
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return [*of_docstrings(tree), *of_comments(text), *of_errors(tree)]


def sentences(text):
    """Parts between full stops, colons and semicolons; a code span or a link counts as a word."""
    text = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    return re.split(r"(?<=[.!?:;])[)\"*]*\s+", re.sub(r"\$[^$]*\$", "math", text))


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*PAGES, *PACKAGE, *SCRIPTS], ids=name)
def test_sentences_are_short(path):
    long = [
        s for text in prose(path) for s in sentences(text) if len(s.split()) > WORDS_OF_A_SENTENCE
    ]
    assert not long, f"more than {WORDS_OF_A_SENTENCE} words"


@pytest.mark.parametrize("path", [*PAGES, *PACKAGE, *SCRIPTS], ids=name)
def test_words_are_common(path):
    text = "\n".join(prose(path))
    found = {
        f"{words!r}: write {instead!r}": re.findall(rf"[^\n]{{0,40}}\b{words}\b[^\n]{{0,30}}", text)
        for words, instead in IDIOMS.items()
    }
    assert not {what: where for what, where in found.items() if where}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "![", "$$"))]
    assert not [line for line in lines if len(line) > CHARACTERS_OF_A_LINE]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """Of the repository's own files; `make links` asks the network for the others."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    here = [link for link in links if not re.match(r"\w+:", link)]
    assert not [link for link in here if not (page.parent / link).exists()]


def test_the_readme_is_read_in_two_minutes():
    text = re.sub(r"[|`#*]|^```.*?^```", " ", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    assert len(text.split()) <= WORDS_OF_THE_README
