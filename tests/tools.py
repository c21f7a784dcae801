"""What the tests share: gradients on the active backend, inputs, comparisons."""

import contextlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch

    GPU = torch.cuda.is_available()
elif BACKEND == "jax":
    import jax

    GPU = jax.default_backend() == "gpu"
else:
    GPU = False
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels, on torch
# JAX 0.4.30 has no way to the kernels.
HAS_PALLAS = BACKEND == "jax" and importlib.util.find_spec("jax.experimental.pallas.triton")
# How many random cases of each fuzz test `make fuzz` asks for.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
# Relative RMS error against the float64 oracle, by dtype of the inputs.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}


def some(few, all_of):
    """Values of a test's arguments: `few` in every run, the others of `all_of` in `make test-all`."""
    others = (pytest.param(*v, marks=pytest.mark.sweep) for v in all_of if v not in few)
    return [*(pytest.param(*v) for v in few), *others]


def array(x):
    return keras.ops.convert_to_numpy(x)


def tensor(x, dtype="float32"):
    return keras.ops.convert_to_tensor(np.asarray(x), dtype=dtype)


def error(got, want, least=0.0):
    """RMS error relative to `want`, or to `least` where all of `want` is smaller.

    NaN and inf never pass.
    """
    got, want = np.asarray(array(got), np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    if not np.isfinite(got).all():
        return np.inf
    scale = max(np.sqrt(np.mean(want**2)), least)
    return np.sqrt(np.mean((got - want) ** 2)) / (scale if scale > 0 else 1.0)


def assert_close(got, want, tolerance, name="", least=0.0):
    e = error(got, want, least)
    assert e <= tolerance, f"{name}: relative error {e:.2e} > {tolerance:.0e}"


def call(layer, x, **options):
    """layer(x, **options); on JAX as one compiled function: op by op it would compile each."""
    if BACKEND != "jax":
        return layer(x, **options)
    import jax

    return jax.jit(lambda x, options: layer(x, **options))(x, options)


def perturbed(layer, rng, scale=0.3):
    """Every weight moved, so that zero initial values hide nothing."""
    for v in layer.trainable_weights:
        v.assign(array(v) + scale * rng.normal(size=v.shape))
    return layer


def fit(model, x, y, jit_compile=True, **options):
    model.compile("adam", "mse", jit_compile=jit_compile)
    # Not B: a batch that is never short has a size that TensorFlow knows beforehand.
    return model.fit(x, y, batch_size=len(x) + 1, verbose=0, **options).history["loss"][-1]


def jit(xla=False):
    """torch.compile needs a C++ compiler and minutes, and has a test of its own; XLA on TensorFlow
    takes ten times as long as a plain graph, and runs where it is asked for."""
    return BACKEND == "jax" or (xla and BACKEND == "tensorflow")


def vjp(function, arguments, cotangents, compiled=True, xla=True, given=()):
    """Outputs of function(*arguments, *given), a flat tuple, and the gradients of `arguments`.

    A cotangent of None stands for an output that nothing depends on. On TensorFlow `xla=False`
    leaves it at a graph, which is made faster.
    """
    if BACKEND == "jax":
        import jax

        def loss(*arguments):  # and given
            outputs = function(*arguments)
            return _inner(outputs, cotangents), outputs

        indices = tuple(range(len(arguments)))
        run = jax.value_and_grad(loss, argnums=indices, has_aux=True)
        (_, outputs), gradients = (jax.jit(run) if compiled else run)(*arguments, *given)
        return outputs, gradients
    if BACKEND == "torch":
        import torch

        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        outputs = function(*leaves, *given)
        gradients = torch.autograd.grad(_inner(outputs, cotangents), leaves, allow_unused=True)
        outputs = [o.detach() for o in outputs]
        return outputs, [
            torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True)
        ]
    import tensorflow as tf

    def run(arguments, given):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(*arguments, *given)
            loss = _inner(outputs, cotangents)
        return outputs, tape.gradient(
            loss, arguments, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    run = tf.function(run, jit_compile=xla) if compiled else run
    return run(list(arguments), list(given))


def made(name, script, tmp_path_factory, **env):
    """The folder that `script` fills, in a process of its own; once for all runs of tests/run.py."""
    shared = os.environ.get("TESTS_SHARED")
    root = pathlib.Path(shared) if shared else tmp_path_factory.mktemp("made")
    folder, busy = root / name, root / f"{name}.busy"
    deadline = time.monotonic() + 300
    while not folder.exists():
        try:
            busy.mkdir()
        except FileExistsError:  # another run makes it
            assert time.monotonic() < deadline, f"{busy} is still there"
            time.sleep(0.2)
            continue
        try:
            if not folder.exists():
                (partial := root / f"{name}.partial").mkdir()
                command = [sys.executable, str(HERE / script), str(partial)]
                env = {**os.environ, "PYTHONPATH": str(HERE.parent), **env}
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                partial.rename(folder)
        finally:
            busy.rmdir()
    return folder


def _inner(outputs, cotangents):
    ops = keras.ops
    terms = [
        ops.sum(ops.cast(o, c.dtype) * c)
        for o, c in zip(outputs, cotangents, strict=True)
        if c is not None
    ]
    return sum(terms[1:], terms[0])


def run_blocks(page):
    """Runs the Python blocks of a Markdown file in order and returns their names."""
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") > 0
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


def stand_in_for_cuda(monkeypatch, module):
    """Lets `module` of backends/torch make CUDA graphs without a GPU, which record nothing."""
    import torch

    stream = [SimpleNamespace(cuda_stream=0, device_index=0)]
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    monkeypatch.setattr(module, "can_capture", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", stream.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=len(stream)))
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: contextlib.nullcontext())


class RefusedGraph:
    """As torch.cuda.graph where a step waits for the device: fails at its end, on its own stream."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        import torch

        torch.cuda.set_stream(torch.cuda.Stream())

    def __exit__(self, *error):
        raise RuntimeError("operation not permitted when stream is capturing")
