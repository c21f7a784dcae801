"""Figures as data: with `--record` a benchmark appends its rows to results/<script>.jsonl.

A script gives its parser `option` and calls `add` where it prints a figure. `make results` renders
the rows into the pages. One row holds what was measured in one run, so that its ratios hold:

    date, commit   of the run; null where an old figure does not say its commit
    device         the GPU's name, or the CPU's cores
    versions       {package: version}
    backend        Keras's
    case           the problem: shapes in the order that the script's docstring names
    metric, unit   what was measured
    ours, peer     {name: figure}; a list holds the least and the most of several runs
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

RESULTS = pathlib.Path(__file__).parent / "results"
SWITCH = "KERAS_XLSTM_RECORD"  # in the environment, so that processes of a script inherit it
PACKAGES = (
    "keras", "jax", "torch", "tensorflow-cpu", "tensorflow", "triton", "xlstm", "mlstm_kernels",
    "flashrnn",
)  # fmt: skip


class _Record(argparse.Action):
    def __call__(self, *_):
        os.environ[SWITCH] = "1"


def option(parser):
    help = "append the figures to benchmarks/results/, for `make results`"
    parser.add_argument("--record", action=_Record, nargs=0, help=help)


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device():
    """Of this process: only a framework that is imported already is asked."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if jax and jax.default_backend() == "gpu":
        return jax.devices()[0].device_kind
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def commit():
    """The checkout's, with + where its files differ, but for the rows themselves."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None  # no checkout
    paths = [":/", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths]).returncode
    return head.stdout.strip() + "+" * bool(changed)


def keras_backend():
    keras = sys.modules.get("keras")
    return keras.backend.backend() if keras else os.environ.get("KERAS_BACKEND", "none")


def numbers(figures):
    """Without a peer's error message and what was not run."""
    kept = {name: x for name, x in figures.items() if isinstance(x, int | float)}
    return {name: float(f"{x:.6g}") for name, x in kept.items()}


def add(script, case, metric, unit, ours, peer=None, backend=None):
    """Appends a row, if the script was called with `--record` and there is a figure of ours."""
    ours = numbers(ours)
    if not os.environ.get(SWITCH) or not ours:
        return
    row = {
        "date": datetime.date.today().isoformat(), "commit": commit(), "device": device(),
        "versions": versions(), "backend": backend or keras_backend(), "case": case,
        "metric": metric, "unit": unit, "ours": ours, "peer": numbers(peer or {}),
    }  # fmt: skip
    with open(RESULTS / f"{pathlib.Path(script).stem}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
