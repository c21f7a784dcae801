"""What XLA does for the layers on TensorFlow and a CPU, every ratio within one run.

    python benchmarks/tensorflow_xla.py                   # all parts, about 10 minutes on 2 cores
    python benchmarks/tensorflow_xla.py --only lengths --plot lengths.png

Parts:

- `ops`: mLSTM forward and backward, eager, as a graph, with the op compiled, with all compiled, and
  on JAX
- `turns`: the last two again, in processes that take turns
- `fit`: a step beside keras.layers.LSTM
- `compile`: a model of 12 blocks. The first step, then another batch size, then another length, and
  the peak of memory
- `steps`: its steps, and those of two wider blocks, in turn
- `cache`: that first step in three processes that share the compilers' own caches on disk, also on
  JAX
- `lengths`: time and peak memory of the mLSTM over T, a process for every point

Each backend has a process of its own; in `ops` JAX's comes straight after
TensorFlow's.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import record
from cpu import medians
from memory import peak

B, U, H = 16, 256, 4
SHAPES = [(8, 512, 64, 64), (8, 2048, 64, 128), (1, 8192, 64, 64)]  # batch, T, key, value
WIDE = {"units": 256, "num_blocks": 2, "pattern": "1:1"}
LENGTHS = [1024, 4096, 16384, 65536]


def mlstm_arrays(batch, T, K, V):
    import numpy as np

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, T, H, d)).astype("float32") for d in (K, K, V))
    i, f = (rng.normal(size=(batch, T, H)).astype("float32") for _ in "if")
    return q, k, v, i, f + 3


def passes(*shape, only=None):
    """{way: forward and backward of ops.mlstm} on the active backend."""
    import keras

    from keras_xlstm import ops

    arrays = mlstm_arrays(*shape)
    if keras.backend.backend() == "jax":
        import jax

        arrays = [jax.numpy.asarray(x) for x in arrays]
        run = jax.jit(jax.grad(lambda a: ops.mlstm(*a).sum()))
        return {"jax": lambda: jax.block_until_ready(run(arrays))}
    import tensorflow as tf

    arrays = [tf.constant(x) for x in arrays]

    def run(arrays, implementation):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            loss = tf.reduce_sum(ops.mlstm(*arrays, implementation=implementation))
        return tape.gradient(loss, arrays)

    graph = tf.function(run, autograph=False)
    whole = tf.function(run, autograph=False, jit_compile=True)
    ways = {
        "native, eager": lambda: run(arrays, "native"),
        "native, graph": lambda: graph(arrays, "native"),
        "xla, eager": lambda: run(arrays, "xla"),
        "xla, graph": lambda: graph(arrays, "xla"),
        "all compiled": lambda: whole(arrays, "xla"),
    }
    return {name: lambda f=f: f()[-1].numpy() for name, f in ways.items() if only in (None, name)}


def case_of(shape):
    batch, T, K, V = shape
    return f"mLSTM {batch} {H} {T} {K}/{V}"


def ops_part():
    for shape in SHAPES:
        result = medians(passes(*shape), 5, of=min)
        for name, ms in result.items():
            print(f"mLSTM B T d_qk d_v {shape}, {H} heads, {name:14} {ms:8.1f} ms", flush=True)
        record.add(__file__, case_of(shape), "both passes", "ms", result)


def turn():
    """Prints, for every shape, the median and the least of several runs of the fastest way."""
    for shape in SHAPES:
        ((_, run),) = passes(*shape, only="all compiled").items()
        run()
        times = []
        for _ in range(40 if shape[1] < 1024 else 10):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        print(statistics.median(times), min(times), flush=True)


def turns_part(rounds=6):
    """TensorFlow and JAX, processes in turn: one after the other a noisy machine favours either."""
    found = {"tensorflow": [], "jax": []}
    for _ in range(rounds):
        for backend, runs in found.items():
            lines = child("turn", backend).splitlines()
            runs.append([[float(x) for x in line.split()] for line in lines])
    for j, shape in enumerate(SHAPES):
        ours, jax = (
            [statistics.mean(run[j][k] for run in runs) for k in (0, 1)] for runs in found.values()
        )
        print(
            f"mLSTM B T d_qk d_v {shape}, {H} heads, {rounds} processes each in turn, mean of "
            f"medians (minima): all compiled {ours[0]:.1f} ({ours[1]:.1f}) ms, jax {jax[0]:.1f} "
            f"({jax[1]:.1f}), ratio {ours[0] / jax[0]:.2f} ({ours[1] / jax[1]:.2f})",
            flush=True,
        )
        own, peer = {"all compiled": ours[0]}, {"jax": jax[0]}
        record.add(__file__, case_of(shape), "in turn", "ms", own, peer, "tensorflow")


def fit_part():
    import keras
    import numpy as np

    from keras_xlstm.layers import mLSTM, sLSTM

    rng = np.random.default_rng(0)
    steps, T = 4, 256
    x, y = (rng.normal(size=(B * steps, T, U)).astype("float32") for _ in "xy")
    for jit_compile in (False, True):
        functions = {}
        for name, layer in {
            "keras LSTM": keras.layers.LSTM(U, return_sequences=True),
            "sLSTM native": sLSTM(U, num_heads=H, return_sequences=True, use_kernel=False),
            "sLSTM": sLSTM(U, num_heads=H, return_sequences=True),
            "mLSTM native": mLSTM(U, num_heads=H, return_sequences=True, use_kernel=False),
            "mLSTM": mLSTM(U, num_heads=H, return_sequences=True),
        }.items():
            model = keras.Sequential([keras.Input((T, U)), layer])
            model.compile("sgd", "mse", jit_compile=jit_compile)
            functions[name] = lambda m=model: m.fit(x, y, batch_size=B, verbose=0)
        for name, ms in (result := medians(functions, 5, of=min)).items():
            ratio = ms / result["keras LSTM"]
            step = f"{ms / steps:7.1f} ms a fit step, {ratio:5.2f} of keras LSTM"
            print(f"jit_compile={jit_compile!s:5} {name:12} {step}", flush=True)
        own = {name: ms / steps for name, ms in result.items()}
        peer = {"LSTM": own.pop("keras LSTM")}
        case = f"{B} {T} {U} {U}, jit_compile={jit_compile}"
        record.add(__file__, case, "fit step", "ms", own, peer)


def language_model(how, units=128, num_blocks=12, pattern="7:1"):
    """`how`: "jit", what jit_compile=True does; "graph", jit_compile=False; "whole", all of the
    step for XLA, which is what Keras does and was ours until 0.1."""
    import keras

    from keras_xlstm.models import xLSTMLanguageModel

    model = xLSTMLanguageModel(256, units=units, num_blocks=num_blocks, pattern=pattern)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=how == "jit")
    if how == "whole":
        model.jit_compile = True
    # Else TensorFlow finds new variables in its first trace, and traces a second time.
    model.optimizer.build(model.trainable_variables)
    return model


def compile_part(way, only_first):
    """A step's first call minus its second, in wall and in processor seconds."""
    import keras
    import numpy as np

    from keras_xlstm import backends

    implementation, how = way
    model = language_model(how)
    for what, (batch, T) in {
        "first": (8, 256), "another batch size": (6, 256), "another length": (8, 320),
    }.items():  # fmt: skip
        x = np.random.default_rng(0).integers(0, 256, (batch, T))
        spent = []
        with backends.use(implementation):
            for _ in range(2):
                start = time.perf_counter(), time.process_time()
                model.fit(x, x, batch_size=batch, verbose=0)
                spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        wall, processor = (a - b for a, b in zip(*spent, strict=True))
        print(
            f"{keras.backend.backend()}, 12 blocks, {implementation or 'auto'}, "
            f"{how}, {what}: {wall:.1f} s ({processor:.1f} s of processor time), peak "
            f"{peak():.0f} MiB",
            flush=True,
        )
        if not only_first:
            case = f"12 blocks of 128, {what}"
            record.add(__file__, case, "compiling", "s of processor time", {how: processor})
            record.add(__file__, case, "peak memory", "MiB", {how: peak()})
        if only_first:
            break


def steps_part():
    import numpy as np

    for sizes, (batch, T) in (({}, (8, 256)), (WIDE, (16, 512))):
        models = {how: language_model(how, **sizes) for how in ("whole", "jit", "graph")}
        x = np.random.default_rng(0).integers(0, 256, (2 * batch, T))
        options = {"batch_size": batch, "verbose": 0}
        for what in ("fit", "predict"):
            data = (x, x) if what == "fit" else (x,)
            functions = {
                how: functools.partial(getattr(model, what), *data, **options)
                for how, model in models.items()
            }
            result = medians(functions, 9, of=lambda ms: (min(ms) / 2, statistics.median(ms) / 2))
            for how, (least, median) in result.items():
                ratios = least / result["whole"][0], median / result["whole"][1]
                print(
                    f"{sizes or '12 blocks of 128'}, batch {batch}, T {T}, {what}, {how:5}: "
                    f"{median:.0f} ms a step ({least:.0f} at least), "
                    f"{ratios[1]:.2f} ({ratios[0]:.2f}) of whole",
                    flush=True,
                )
            own = {how: median for how, (_, median) in result.items()}
            case = f"{'2 blocks of 256' if sizes else '12 blocks of 128'}, {batch} {T}"
            record.add(__file__, case, f"{what} step", "ms", own)


def cache_part():
    for backend in ("tensorflow", "jax"):
        with tempfile.TemporaryDirectory() as folder:
            env = {
                "TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={folder} "
                "--tf_xla_persistent_cache_device_types=CPU",
                "JAX_COMPILATION_CACHE_DIR": folder,
            }
            for _ in range(3):
                child("compile", backend, "auto", "jit", "first", capture=False, **env)


def length_point(T, way):
    """Prints one point of the curve: ms and the peak of resident memory above the start."""
    import keras  # noqa: F401  its memory is not the op's

    ((_, small),) = passes(1, 128, 64, 64, only=way).items()
    small()  # the compiler's own memory
    before = peak()
    ((_, run),) = passes(1, T, 64, 64, only=way).items()
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    print(json.dumps({"T": T, "way": way, "ms": min(times), "MiB": peak() - before}), flush=True)


def lengths_part(plot):
    points = []
    for way, backend in (("xla, graph", "tensorflow"), ("native, graph", "tensorflow")):
        for T in LENGTHS:
            point = json.loads(child("point", backend, str(T), way))
            points.append(point)
            case = f"mLSTM 1 {H} {T} 64/64"
            for metric in ("ms", "MiB"):
                figures = {way: point[metric]}
                record.add(__file__, case, f"length, {metric}", metric, figures, None, backend)
            per_step = point["ms"] * 1e3 / T
            print(
                f"mLSTM B 1, {H} heads 64/64, T {T:6}, {way}: {point['ms']:8.1f} ms "
                f"({per_step:.1f} us a step), peak {point['MiB']:7.0f} MiB "
                f"({point['MiB'] * 1024 / T:.1f} KiB a step)",
                flush=True,
            )
    if plot:
        draw(points, plot)


def draw(points, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in zip(axes, ("ms", "MiB"), ("ms", "peak memory, MiB"), strict=True):
        for way in dict.fromkeys(p["way"] for p in points):
            mine = [p for p in points if p["way"] == way]
            axis.loglog([p["T"] for p in mine], [p[key] for p in mine], marker="o", label=way)
        axis.set(xlabel="T", ylabel=label, title="mLSTM, forward and backward")
        axis.legend()
    plt.savefig(path, dpi=150)


def child(part, backend, *arguments, capture=True, **env):
    """Runs a part of this script in a process of its own."""
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **env}
    root = str(pathlib.Path(__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--here", part, *arguments]
    output = subprocess.PIPE if capture else None
    done = subprocess.run(command, env=env, check=True, stdout=output, text=True)
    return done.stdout


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("ops", "turns", "fit", "compile", "steps", "cache", "lengths")
    parser.add_argument("--only", choices=parts, action="append", help="may be given again")
    parser.add_argument("--plot", help="where to draw the part `lengths`, a .png")
    record.option(parser)
    parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        part, *rest = args.here
        simple = {"ops": ops_part, "fit": fit_part, "turn": turn, "steps": steps_part}
        simple.get(part, lambda: None)()
        if part == "point":
            length_point(int(rest[0]), rest[1])
        if part == "compile":
            way = (rest[0] if rest[0] != "auto" else None, rest[1])
            compile_part(way, only_first="first" in rest)
        return
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""  # not on Windows
    print(f"{os.cpu_count()} cores{load}, Python {sys.version.split()[0]}")
    names = ("keras", "tensorflow-cpu", "jax", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in names), flush=True)
    for part in args.only or parts:
        if part == "turns":
            turns_part()
        elif part == "lengths":
            lengths_part(args.plot)
        elif part == "cache":
            cache_part()
        elif part == "compile":
            for way in (("auto", "whole"), ("auto", "jit"), ("auto", "graph")):
                child("compile", "tensorflow", *way, capture=False)
        else:
            child(part, "tensorflow", capture=False)
            if part == "ops":
                child(part, "jax", capture=False)


if __name__ == "__main__":
    main()
