"""examples/several_machines.py: two processes have the losses of one; a killed run goes on."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from tools import BACKEND, HERE

ENGINES = {
    "torch": ["ddp", pytest.param("fsdp", marks=pytest.mark.sweep)],
    "jax": [pytest.param("jax", marks=pytest.mark.sweep)],
    "tensorflow": [pytest.param("tensorflow", marks=pytest.mark.sweep)],
}[BACKEND]


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(engine, folder, processes, epochs):
    """The processes of a run, as a scheduler starts them, one on each machine."""
    ports = free_ports(processes)
    command = [sys.executable, str(HERE.parent / "examples" / "several_machines.py")]
    command += ["--engine", engine, "--epochs", str(epochs), "--steps", "2", "--batch-size", "4"]
    command += ["--length", "16", "--checkpoint", str(folder)]
    started = []
    for process in range(processes):
        env = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(ports[0]), "RANK": str(process),
            "LOCAL_RANK": str(process), "WORLD_SIZE": str(processes),
            "XLA_FLAGS": "",  # the other tests' four devices: here each process has one
        }  # fmt: skip
        task = {"type": "worker", "index": process}
        workers = [f"localhost:{port}" for port in ports]
        env["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        given = ["--coordinator", workers[0], "--processes", processes, "--process", process]
        given = map(str, given if engine == "jax" else [])
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *given], env=env, **options))
    return started


def losses(processes):
    """By epoch, as the first process prints them."""
    ended = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return {int(n): float(x) for n, x in re.findall(r"epoch (\d+): loss (\S+)", ended[0][0])}


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_started_again(engine, tmp_path):
    processes = start(engine, tmp_path / "two", 2, epochs=10_000)
    deadline = time.monotonic() + 300
    try:
        while not (tmp_path / "two" / "2").exists():
            assert processes[0].poll() is None, processes[0].communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for process in reversed(processes):  # one is lost; the scheduler ends the others
            process.kill()
            process.communicate()
    done = max(int(path.name) for path in (tmp_path / "two").glob("[0-9]*"))
    two = losses(start(engine, tmp_path / "two", 2, epochs=done + 2))
    one = losses(start(engine, tmp_path / "one", 1, epochs=done + 2))
    assert list(two) == [done + 1, done + 2]  # what was done is not done again
    assert list(one) == list(range(1, done + 3))
    for epoch, loss in two.items():
        assert loss == pytest.approx(one[epoch], rel=2e-5)
    assert one[done + 2] < one[1]
