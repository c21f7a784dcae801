"""Runs the test suite on each backend, two processes at a time, and prints what each one said.

python tests/run.py jax torch tensorflow
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
# Runs of about the same length: whole backends would leave a core idle at the end.
FILES = {
    "blocks, models": ["test_blocks.py", "test_models.py"],
    "kernels": [
        "test_triton.py", "test_triton_slstm.py", "test_triton_slstm_lanes.py",
        "test_jax_triton.py", "test_jax_triton_slstm.py", "test_pallas.py", "test_pallas_slstm.py",
    ],
    "files, devices": [
        "test_export.py", "test_devices.py", "test_examples.py", "test_tensorflow.py",
    ],
    "users": [
        "test_user_ways.py", "test_keras_io.py", "test_layer_contract.py", "test_keras_export.py",
    ],
}  # fmt: skip
PARTS = {name: [str(HERE / file) for file in files] for name, files in FILES.items()}
PARTS["the rest"] = [str(HERE), *(f"--ignore={file}" for files in PARTS.values() for file in files)]

# The longest first, so that the last to start is short.
ORDER = [
    ("torch", "kernels"),
    ("tensorflow", "the rest"),
    ("jax", "the rest"),
    ("tensorflow", "users"),
    ("tensorflow", "files, devices"),
    ("tensorflow", "blocks, models"),
    ("jax", "files, devices"),
    ("jax", "users"),
    ("torch", "the rest"),
    ("torch", "files, devices"),
    ("jax", "blocks, models"),
    ("torch", "users"),
    ("jax", "kernels"),
    ("torch", "blocks, models"),
]


def main(backends):
    parts = [(backend, part) for backend in backends for part in PARTS]
    parts = [p for p in parts if p != ("tensorflow", "kernels")]
    parts.sort(key=ORDER.index)
    with tempfile.TemporaryDirectory() as shared:
        return run(parts, shared)


def run(waiting, shared):
    running, failed, lines = {}, [], []
    while waiting or running:
        while waiting and len(running) < 2:
            backend, part = waiting.pop(0)
            name = f"{backend}, {part}"
            log = tempfile.TemporaryFile("w+")
            # One thread pool per process would fight over the cores.
            env = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "TESTS_SHARED": shared}
            command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *PARTS[part]]
            process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT
            )
            running[process] = name, log, time.monotonic()
            print(f"{name}: started", flush=True)
        for process in [p for p in running if p.poll() is not None]:
            name, log, start = running.pop(process)
            log.seek(0)
            text = log.read()
            print(f"\n===== {name}: {time.monotonic() - start:.0f} s\n{text}", flush=True)
            said = text.strip().splitlines()
            # Of a crash, the place: its last lines are lists of modules.
            for n, line in enumerate(said):
                if "Fatal Python error" in line or line.startswith("Current thread"):
                    lines += [f"{name}: {said_then}" for said_then in said[n : n + 30]]
            lines.append(f"{name}: {said[-1][:300]}")
            # 5: nothing to run, as for the kernels where triton is not installed.
            failed += [] if process.returncode in (0, 5) else [name]
        time.sleep(0.2)
    print("\n".join(lines))
    if failed:
        print(f"failed on {'; '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["jax", "tensorflow", "torch"]))
