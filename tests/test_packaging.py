"""What gets installed, what gets imported, and who may import whom."""

import ast
import inspect
import operator
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools import BACKEND, made

import keras_xlstm

ROOT = pathlib.Path(__file__).parent.parent
FRAMEWORKS = {"torch", "jax", "tensorflow"}


def run(code, cwd, python=sys.executable, **env):
    env = {**os.environ, "KERAS_BACKEND": BACKEND, **env}
    result = subprocess.run([python, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


# torch, whose run is the shortest.
once = pytest.mark.skipif(BACKEND != "torch", reason="the same on every backend: run on torch")


def test_package_list_is_the_disk():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        p.parent.relative_to(ROOT)
        for top in ("keras_xlstm", "backends")
        for p in (ROOT / top).rglob("*.py")
    }
    names = {".".join(f.parts).replace("backends", "keras_xlstm.backends", 1) for f in folders}
    assert set(listed) == names


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel, which is installed in its `site`."""
    return made("wheel", "wheel.py", tmp_path_factory)


def test_wheel_holds_the_package_and_nothing_else(installed):
    (wheel,) = installed.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"keras_xlstm"}
    on_disk = {p.relative_to(ROOT).as_posix() for p in (ROOT / "keras_xlstm").rglob("*.py")}
    on_disk |= {
        f"keras_xlstm/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "backends").rglob("*.py")
    }
    inside = {name for name in names if name.startswith("keras_xlstm/")}
    assert inside == on_disk | {"keras_xlstm/py.typed"}
    metadata = next(installed.glob("site/*.dist-info/METADATA")).read_text()
    core = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert sorted(line.split()[1].split(">")[0] for line in core) == ["keras", "numpy"]


@pytest.fixture(scope="module")
def bare(installed, tmp_path_factory):
    """A new environment with the wheel, Keras, the backend, what these require, and nothing else:
    what is installed here is linked there, so that no network is needed."""
    folder, waiting, seen = tmp_path_factory.mktemp("bare"), ["keras", "numpy", BACKEND], set()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            assert name == "tensorflow"  # its CPU build has another name
            waiting.append("tensorflow-cpu")
            continue
        waiting += found.requires or []
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    for part in (installed / "site").iterdir():
        (site / part.name).symlink_to(part)
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder)})
    return pathlib.Path(scripts, "python.exe" if os.name == "nt" else "python"), site


def test_wheel_runs_and_imports_the_active_framework_alone(bare, tmp_path):
    python, site = bare
    code = (
        "import importlib.util, sys\n"
        "assert not any(map(importlib.util.find_spec, ('pytest', 'matplotlib', 'onnx')))\n"
        "import keras, numpy; before = set(sys.modules); import keras_xlstm\n"
        "new = set(sys.modules) - before\n"
        "h = keras_xlstm.layers.mLSTM(8)(numpy.zeros((1, 5, 3), 'float32'))\n"
        "print(sorted({m.split('.')[0] for m in new} & {'torch', 'jax', 'tensorflow', 'triton'}),\n"
        "      'jax.experimental.pallas' in new, tuple(h.shape), keras_xlstm.__file__)"
    )
    # Keras has imported its own backend before; the package adds none.
    said = run(code, tmp_path, python, PYTHONPATH="")
    assert said.startswith(f"[] False (1, 8) {site}")


@once
@pytest.mark.parametrize(
    "name", ["layers.sLSTM", "layers.mLSTM", "layers.sLSTMCell", "ops.mlstm", "ops.slstm"]
)
def test_types_are_said(name):
    """py.typed promises them: without, a checker takes every argument and calls under --strict
    fail."""
    thing = operator.attrgetter(name)(keras_xlstm)
    signature = inspect.signature(thing.__init__ if isinstance(thing, type) else thing)
    said = [p.annotation for n, p in signature.parameters.items() if n != "self"]
    assert inspect.Signature.empty not in [*said, signature.return_annotation]


@once
def test_citation_has_the_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert keras_xlstm.__version__ == cited.group(1)


@once
def test_changelog_has_the_version():
    """The newest version of the changelog is this one; kinds of changes are in one order."""
    text = (ROOT / "CHANGELOG.md").read_text()
    newest, *_ = re.findall(r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", text, re.MULTILINE)
    released = re.search(r"^date-released: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M).group(
        1
    )
    assert newest == (keras_xlstm.__version__, released)
    kinds = re.findall(r"^### (.*)$", text.partition(f"## {newest[0]}")[2], re.MULTILINE)
    assert kinds[:3] == ["Fixed", "Added", "Changed"]


@once
def test_a_bare_checkout_imports(tmp_path):
    code = "import keras_xlstm; print(keras_xlstm.backends.available()['slstm']['native'])"
    assert run(code, tmp_path, PYTHONPATH=str(ROOT)) == "True"
    assert run(code, ROOT) == "True"
    with pytest.raises(AssertionError, match=r"import keras_xlstm\.backends, not"):
        run("import backends", ROOT)


def imports(path):
    """Names of the modules that a file imports, a string's too; of a string that is worked out, ""."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) else ""


# The active framework is imported by its name.
BY_NAME = {"backends/framework.py"}


def test_who_imports_whom():
    files = [p for top in ("keras_xlstm", "backends") for p in (ROOT / top).rglob("*.py")]
    worked_out = {p.relative_to(ROOT).as_posix() for p in files if "" in imports(p)}
    assert worked_out == BY_NAME
    for path in files:
        of_backends, *folders = path.relative_to(ROOT).parts[:-1]
        of_backends = of_backends == "backends"
        home = {*folders} & FRAMEWORKS if of_backends else set()
        for name in imports(path):
            assert name.split(".")[0] not in FRAMEWORKS - home, path
            assert not name.startswith("keras.src"), path
            if of_backends:
                assert not name.startswith(("keras_xlstm.layers", "keras_xlstm.ops")), path
                others = tuple(f"keras_xlstm.backends.{f}" for f in FRAMEWORKS - home)
                assert not (folders and name.startswith(others)), (path, name)
            else:
                assert not name.startswith("keras_xlstm.backends."), path


def test_kernels_belong_to_no_framework():
    for path in (ROOT / "backends" / "kernels").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in {*sys.stdlib_module_names, "triton", "keras_xlstm"} - {"importlib"}, path
            ours = top == "keras_xlstm"
            assert not ours or name.startswith("keras_xlstm.backends.kernels"), (path, name)


@once
def test_tiles_need_no_triton():
    """Pallas reads them."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from keras_xlstm.backends.kernels.mlstm import tiles; print(tiles.power(17))"
    )
    assert run(code, ROOT) == "32"


def test_no_test_imports_a_test():
    """Nor a benchmark: what tests share is in modules that are none."""
    others = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in (name.split(".")[0] for name in names):
                assert not name.startswith("test_"), path.name
                assert name not in others, path.name
