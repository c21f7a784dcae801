"""Sphinx's settings: `make docs`. Nothing that a page needs is loaded from elsewhere."""

import inspect
import os
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import keras_xlstm

project = "keras-xlstm"
author = "The keras-xlstm authors"
copyright = author
version = release = keras_xlstm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notebook"]  # a record for those who change the code

html_theme = "furo"
html_title = f"keras-xlstm {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
linkcheck_timeout = 10

html_math_renderer = "mathml"  # what browsers draw by themselves

default_role = "literal"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Call arguments", "params_style")]


def from_markdown(app, what, name, obj, options, lines):
    """Docstrings are Markdown with Google's sections; autodoc expects reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(r"\[([^\]]+)\]\((https?:[^)]+)\)", r"`\1 <\2>`__", text)
    text = re.sub(r"(\n\n)(?=    \S)", r"\1::\n\n", text)  # indented: code
    lines[:] = text.split("\n")


def constructor(app, what, name, obj, options, signature, returns):
    """Keras layers take anything in `__new__`, where autodoc looks."""
    if what == "class":
        arguments = list(inspect.signature(obj.__init__).parameters.values())[1:]
        return str(inspect.Signature(arguments)), returns


def inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator, node):
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", constructor)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
