"""A million tokens through mLSTM and sLSTM with the state carried on: float32 against a float64
recurrence, time and memory along the way.

    KERAS_BACKEND=jax python benchmarks/long_stream.py [--tokens 1000000] [--plot stream.png]

In chunks of 10,000 tokens, and all of them once more one by one: a quarter of an hour on torch and
on TensorFlow. Prints the environment and a table: the relative error of the last outputs of
a chunk, milliseconds, resident memory.
"""

import argparse
import os
import platform
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np
import record
from memory import resident

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


def relative(h, want):
    h = keras.ops.convert_to_numpy(h)[0, -1]
    return np.sqrt(np.mean((h - want) ** 2) / np.mean(want**2))


def one_by_one(run, x, state):
    """The last h, the state, the median microseconds of a step."""
    times = []
    for t in range(CHUNK):
        start = time.perf_counter()
        h, state = run([a[:, t : t + 1] for a in x], state)
        h = keras.ops.convert_to_numpy(h)  # waits for it
        times.append(time.perf_counter() - start)
    return h, state, 1e6 * np.median(times)


def stream(op, tokens):
    """(tokens, error in chunks, error one by one, ms of a chunk, us of a step, MiB), on the way."""
    run, rows = function(op), []
    state = step_state = tuple(keras.ops.convert_to_tensor(s[None]) for s in zeros(op, "float32"))
    exact = zeros(op, "float64")
    exact[-1] -= 1e30  # nothing is remembered
    run(inputs(op, 0), state)
    for index in range(tokens // CHUNK):
        x = inputs(op, index)
        start = time.perf_counter()
        h, state = run(x, state)
        h = keras.ops.convert_to_numpy(h)
        ms = (time.perf_counter() - start) * 1e3
        step_h, step_state, us = one_by_one(run, x, step_state)
        want, exact = reference(op, x, exact)
        errors = relative(h, want), relative(step_h, want)
        rows.append(((index + 1) * CHUNK, *errors, ms, us, resident()))
        done = f"{op}: {rows[-1][0]:,} of {tokens:,} tokens, errors {errors[0]:.1e} {errors[1]:.1e}"
        print(done, end="\r", file=sys.stderr, flush=True)
    return rows


def plot(found, path):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(11, 6), layout="constrained").subplots(2, 3).ravel()
    labels = (
        "relative error, in chunks", "relative error, one by one", "ms for 10,000 tokens at once",
        "us a token, one by one", "resident MiB",
    )  # fmt: skip
    for column, (axis, label) in enumerate(zip(axes, labels, strict=False), start=1):
        for op, rows in found.items():
            axis.plot([row[0] for row in rows], [row[column] for row in rows], label=op)
        highest = max(row[column] for rows in found.values() for row in rows)
        axis.set(xlabel="tokens", ylabel=label, ylim=(0, 1.1 * highest))
    axes[0].legend()
    axes[-1].set_axis_off()
    axes[0].figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--plot", help="a file for the picture")
    record.option(parser)
    arguments = parser.parse_args()
    if arguments.tokens < CHUNK:
        parser.error(f"--tokens is {CHUNK:,} or more")
    print(f"keras {keras.__version__} on {keras.backend.backend()}, {platform.platform()}")
    found = {op: stream(op, arguments.tokens) for op in ("mlstm", "slstm")}
    print(
        "\n| | tokens | error in chunks, worst | one by one, worst | ms a chunk | us a step | MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for op, rows in found.items():
        tenth = max(1, len(rows) // 10)
        table = np.array(rows)
        errors = [f"{table[-1, n]:.1e}, {table[:, n].max():.1e}" for n in (1, 2)]
        times = [np.median(part, 0)[3:5] for part in (table[:tenth], table[-tenth:])]
        ms, us = (f"{first:.1f}, {last:.1f}" for first, last in zip(*times, strict=True))
        begin = rows[min(1, len(rows) - 1)][5]
        memory = f"{begin:.0f} to {rows[-1][5]:.0f}"
        print(f"| {op} | {rows[-1][0]:,} | {' | '.join(errors)} | {ms} | {us} | {memory} |")
        case = f"{op}, {rows[-1][0]:,} tokens"
        for n, metric in ((1, "error in chunks"), (2, "error one by one")):
            figures = {"last": table[-1, n], "worst": table[:, n].max()}
            record.add(__file__, case, metric, "relative RMS", figures)
        for n, metric, unit in ((0, "a chunk of 10,000", "ms"), (1, "a step", "us")):
            figures = {"first tenth": times[0][n], "last tenth": times[1][n]}
            record.add(__file__, case, metric, unit, figures)
        figures = {"begin": begin, "end": rows[-1][5]}
        record.add(__file__, case, "resident memory", "MiB", figures)
    if arguments.plot:
        plot(found, arguments.plot)
