"""Runs the test suite once per backend, two backends at a time, and prints what each one said.

python tests/run.py jax torch tensorflow
"""

import os
import subprocess
import sys
import tempfile
import time


def main(backends):
    waiting, running, failed, lines = list(backends), {}, [], []
    while waiting or running:
        while waiting and len(running) < 2:
            backend = waiting.pop(0)
            log = tempfile.TemporaryFile("w+")
            # One thread pool per process would fight over the cores.
            env = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "pytest", "-q", "--durations=5"]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            running[process] = backend, log, time.monotonic()
            print(f"{backend}: started", flush=True)
        for process in [p for p in running if p.poll() is not None]:
            backend, log, start = running.pop(process)
            log.seek(0)
            text = log.read()
            print(f"\n===== {backend}: {time.monotonic() - start:.0f} s\n{text}", flush=True)
            said = text.strip().splitlines()
            # Of a crash, the place: its last lines are lists of modules.
            for n, line in enumerate(said):
                if "Fatal Python error" in line or line.startswith("Current thread"):
                    lines += [f"{backend}: {said_then}" for said_then in said[n : n + 30]]
            lines.append(f"{backend}: {said[-1][:300]}")
            failed += [backend] if process.returncode else []
        time.sleep(0.2)
    print("\n".join(lines))
    if failed:
        print(f"failed on {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["jax", "torch", "tensorflow"]))
