"""A million tokens through mLSTM and sLSTM with the state carried on: float32 against a float64
recurrence, time and memory along the way.

    KERAS_BACKEND=jax python benchmarks/long_stream.py [--tokens 1000000] [--plot stream.png]

In chunks of 10,000 tokens, and the first --steps tokens once more one by one. Prints the
environment and a table: the relative error of the last outputs of a chunk, milliseconds, resident
memory.
"""

import argparse
import os
import platform
import resource
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np

from keras_xlstm import ops

H, D, CHUNK = 2, 16, 10_000


def inputs(op, index):
    """A chunk of random inputs."""
    rng = np.random.default_rng(index)
    if op == "slstm":
        x = rng.normal(size=(1, CHUNK, 4, H, D))
        x[:, :, 1] += 3.0
        return [x.astype("float32")]
    q, k, v = rng.normal(size=(3, 1, CHUNK, H, D))
    i, f = rng.normal(size=(2, 1, CHUNK, H))
    return [x.astype("float32") for x in (q, k, v, i, f + 4.0)]


R = (np.random.default_rng(0).normal(size=(H, D, 4, D)) / D**0.5).astype("float32")


def function(op):
    """(arrays, state) to (h, state), compiled where the backend compiles."""

    def run(x, state):
        if op == "slstm":
            return ops.slstm(x[0], R, initial_state=state, return_state=True)
        return ops.mlstm(*x, state, return_state=True)

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(run)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(run, jit_compile=True)
    import torch

    def without_gradients(x, state):
        with torch.no_grad():
            return run([torch.as_tensor(a) for a in x], state)

    return without_gradients


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def reference(op, x, state):
    """The same chunk in float64, one step after another: its last h, and the state."""
    x = [a[0].astype("float64") for a in x]
    for t in range(CHUNK):
        if op == "slstm":
            h, c, n, m = state
            i, f, z, o = x[0][t] + np.einsum("hd,hdge->ghe", h, R)
            new = np.maximum(log_sigmoid(f) + m, i)
            i, f = np.exp(i - new), np.exp(log_sigmoid(f) + m - new)
            c, n = f * c + i * np.tanh(z), f * n + i
            state = h, c, n, m = c / n / (1.0 + np.exp(-o)), c, n, new
        else:
            C, n, m = state
            q, k, v, i, f = (a[t] for a in x)
            new = np.maximum(log_sigmoid(f) + m, i)
            i, f = np.exp(i - new)[:, None], np.exp(log_sigmoid(f) + m - new)[:, None]
            C = f[..., None] * C + i[..., None] * k[:, :, None] * v[:, None, :]
            n, m, q = f * n + i * k, new, q / D**0.5
            below = np.maximum(abs(np.sum(q * n, -1)), np.exp(-m)) + 1e-6
            h, state = np.einsum("hk,hkv->hv", q, C) / below[:, None], (C, n, m)
    return h, state


def zeros(op, dtype):
    shapes = [(H, D, D), (H, D), (H,)] if op == "mlstm" else [(H, D)] * 4
    return [np.zeros(s, dtype) for s in shapes]


def resident():
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # the most so far


def stream(op, tokens):
    """(tokens, error, ms of a chunk, MiB) along the way."""
    run, rows = function(op), []
    state = tuple(keras.ops.convert_to_tensor(s[None]) for s in zeros(op, "float32"))
    exact = zeros(op, "float64")
    exact[-1] -= 1e30  # nothing is remembered
    run(inputs(op, 0), state)
    for index in range(tokens // CHUNK):
        x = inputs(op, index)
        start = time.perf_counter()
        h, state = run(x, state)
        h = keras.ops.convert_to_numpy(h)[0, -1]
        ms = (time.perf_counter() - start) * 1e3
        want, exact = reference(op, x, exact)
        error = np.sqrt(np.mean((h - want) ** 2) / np.mean(want**2))
        rows.append(((index + 1) * CHUNK, error, ms, resident()))
        done = f"{op}: {rows[-1][0]:,} of {tokens:,} tokens, error {error:.1e}"
        print(done, end="\r", file=sys.stderr, flush=True)
    return rows


def steps(op, count):
    """Microseconds of a single step, the median of the first and of the last tenth; the error of
    the last output to that of whole chunks."""
    run, times = function(op), []
    state = fresh = tuple(keras.ops.convert_to_tensor(s[None]) for s in zeros(op, "float32"))
    for index in range(count // CHUNK):
        x = inputs(op, index)
        for t in range(CHUNK):
            start = time.perf_counter()
            h, state = run([a[:, t : t + 1] for a in x], state)
            h = keras.ops.convert_to_numpy(h)  # waits for it
            times.append(time.perf_counter() - start)
    for index in range(count // CHUNK):
        whole, fresh = run(inputs(op, index), fresh)
    h, whole = h[0, -1], keras.ops.convert_to_numpy(whole)[0, -1]
    error = np.sqrt(np.mean((h - whole) ** 2) / np.mean(whole**2))
    tenth = len(times) // 10
    return [1e6 * np.median(part) for part in (times[:tenth], times[-tenth:])], error


def plot(found, path):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(11, 3.2), layout="constrained").subplots(1, 3)
    labels = ("relative error", "ms for 10,000 tokens", "resident MiB")
    for column, (axis, label) in enumerate(zip(axes, labels, strict=True), start=1):
        for op, rows in found.items():
            axis.plot([row[0] for row in rows], [row[column] for row in rows], label=op)
        axis.set(xlabel="tokens", ylabel=label, ylim=(0, None))
    axes[0].legend()
    axes[0].figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20_000, help="one by one")
    parser.add_argument("--plot", help="a file for the picture")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.steps) < CHUNK:
        parser.error(f"--tokens and --steps are {CHUNK:,} or more")
    print(f"keras {keras.__version__} on {keras.backend.backend()}, {platform.platform()}")
    found = {op: stream(op, arguments.tokens) for op in ("mlstm", "slstm")}
    print("\n| | tokens | error | worst error | ms a chunk, first and last tenth | MiB |")
    print("|---|---|---|---|---|---|")
    for op, rows in found.items():
        tenth = max(1, len(rows) // 10)
        first, last = (np.median([r[2] for r in part]) for part in (rows[:tenth], rows[-tenth:]))
        memory = f"{rows[min(1, len(rows) - 1)][3]:.0f} to {rows[-1][3]:.0f}"
        worst = max(row[1] for row in rows)
        cells = f"{rows[-1][1]:.1e} | {worst:.1e} | {first:.1f}, {last:.1f} | {memory}"
        print(f"| {op} | {rows[-1][0]:,} | {cells} |")
        (first, last), error = steps(op, arguments.steps)
        print(f"| {op}, step by step | {arguments.steps:,} | {error:.1e} to chunks | | "
              f"{first:.0f}, {last:.0f} us a step | |")  # fmt: skip
    if arguments.plot:
        plot(found, arguments.plot)
