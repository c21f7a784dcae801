"""Runs the test suite on each backend, two processes at a time, and prints what each one said, and
what it took: seconds of the processor, and memory.

python tests/run.py [--all] jax torch tensorflow    # --all: the sweeps as well
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
MEMORY = 4.0  # GiB that a process should not exceed; one that does is named
# Parts of a few minutes at most: what XLA compiled on TensorFlow stays in a process's memory.
FILES = {
    "ops": ["native", "fuzz", "choices_of_sizes", "poison", "products", "oracle", "backends"],
    "layers": ["layers", "layer_contract"],
    "swaps": ["keras_io", "tensorflow"],
    "users": ["user_ways", "examples", "docs", "readme", "workers"],
    "blocks": ["blocks"],
    "models": ["models", "generation"],
    "directions": ["directions", "second_derivatives"],
    "forecasts": ["forecaster", "windows", "stretches"],
    "regions": ["tensorflow_regions"],
    "training": ["training", "replay", "torch"],
    "kernels": ["triton", "triton_slstm", "jax_triton", "pallas", "gpu", "inference_kernels"],
    "files": ["export", "keras_export"],
    "interpreted": ["triton", "triton_slstm", "fuzz", "inference_kernels"],
}
PARTS = {name: [str(HERE / f"test_{f}.py") for f in files] for name, files in FILES.items()}
PARTS["the rest"] = [str(HERE), *(f"--ignore={file}" for files in PARTS.values() for file in files)]
# Triton's interpreter is one from the first import on; test_triton.py would start it by itself.
OPTIONS = {("torch", "kernels"): ["--deselect", "tests/test_triton.py::test_interpreted"]}
ENVIRONMENT = {"interpreted": {"TRITON_INTERPRET": "1"}}

# The longest first, so that the last to start is short. Joined where memory allows: a process takes
# seconds to import its framework. Training's files are torch's alone.
ORDER = [
    ("torch", "kernels"), ("tensorflow", "ops"), ("tensorflow", "swaps"), ("torch", "interpreted"),
    ("torch", "files"), ("jax", "kernels"), ("torch", "the rest"), ("tensorflow", "regions"), ("jax", "users"),
    ("tensorflow", "models"), ("tensorflow", "the rest"), ("jax", "the rest"), ("tensorflow", "files"),
    ("jax", "files"), ("tensorflow", "users"), ("torch", "training"), ("jax", "layers"),
    ("tensorflow", "forecasts + directions"), ("torch", "users"), ("jax", "swaps + blocks"),
    ("jax", "directions + forecasts"), ("jax", "ops"), ("tensorflow", "layers"), ("jax", "models"),
    ("torch", "layers + swaps + models + blocks + forecasts + directions + ops"),
    ("tensorflow", "blocks"),
]  # fmt: skip


def main(arguments):
    everything = "--all" in arguments
    backends = [a for a in arguments if a != "--all"] or ["jax", "tensorflow", "torch"]
    with tempfile.TemporaryDirectory() as shared:
        return run([part for part in ORDER if part[0] in backends], everything, shared)


def start(backend, part, everything, log, shared):
    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "OMP_NUM_THREADS": "1",  # one thread pool per process would fight over the cores
        "TESTS_SHARED": shared,
        **ENVIRONMENT.get(part, {}),
    }
    paths = [path for name in part.split(" + ") for path in PARTS[name]]
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *paths]
    command += OPTIONS.get((backend, part), [])
    if everything:
        env["EXPORT_CELLS"] = "all"
    else:
        command += ["-m", "not sweep"]
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def ended(process):
    """What the system says of it and its children, or None."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
        process.returncode = os.waitstatus_to_exitcode(status)
    return usage if pid else None


def run(waiting, everything, shared):
    running, failed, lines = {}, [], []
    while waiting or running:
        while waiting and len(running) < 2:
            backend, part = waiting.pop(0)
            log = tempfile.TemporaryFile("w+")
            process = start(backend, part, everything, log, shared)
            running[process] = f"{backend}, {part}", log, time.monotonic()
            print(f"{backend}, {part}: started", flush=True)
        for process in list(running):
            usage = ended(process)
            if usage is None:
                continue
            name, log, since = running.pop(process)
            log.seek(0)
            text = log.read()
            print(f"\n===== {name}: {time.monotonic() - since:.0f} s\n{text}", flush=True)
            took = usage.ru_utime + usage.ru_stime
            memory = usage.ru_maxrss / 2**20
            lines += summary(name, text, f"{took:.0f} s of a core, {memory:.1f} GiB")
            # 5: nothing to run, as for the kernels where triton is not installed.
            if process.returncode not in (0, 5):
                failed.append(name)
            if memory > MEMORY and not everything:
                lines.append(f"{name}: more than {MEMORY:.0f} GiB")
        time.sleep(0.2)
    print("\n".join(lines))
    if failed:
        print(f"failed on {'; '.join(failed)}")
    return bool(failed)


def summary(name, text, took):
    said = text.strip().splitlines()
    # Of a crash, the place: its last lines are lists of modules.
    for n, line in enumerate(said):
        if "Fatal Python error" in line or line.startswith("Current thread"):
            yield from (f"{name}: {said_then}" for said_then in said[n : n + 30])
    yield f"{name}: {said[-1][:300]} ({took})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
