"""Batches that worker processes make: the losses are those of batches made here."""

import json
import os
import subprocess
import sys

from tools import BACKEND, HERE

# JAX warns that a fork of its threads may hang, and TensorFlow's documentation forbids one.
METHODS = ["spawn", "fork"] if BACKEND == "torch" else ["spawn"]


def test_data_workers():
    command = [sys.executable, str(HERE / "workers.py"), *METHODS]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for method in METHODS:
        for loader in ("keras", "torch") if BACKEND == "torch" else ("keras",):
            losses, processes = said[f"{loader} {method}"]
            assert processes > 0, (loader, method)
            # With workers Keras begins at the second batch, and ends with the first.
            want, _ = said[{"keras": "keras threads", "torch": "torch none"}[loader]]
            assert losses == want, (loader, method)
