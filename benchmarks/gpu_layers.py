"""Layers as they come on one NVIDIA GPU: a step of `fit` and of `predict` beside keras.layers.LSTM.

    python benchmarks/gpu_layers.py [--backends torch jax] [--policies float32 mixed_bfloat16]
        [--jit-compile auto true] [--shapes 32x128x64x256] [--layers sLSTM mLSTM] [--record]

Each model is Sequential([Input((T, F)), LAYER(units), Dense(1)]), compiled with Adam and the mean
squared error at Keras's defaults; `--jit-compile true` asks for compilation, on PyTorch alone.
"fit, callback" trains with `keras_xlstm.callbacks.CapturedTraining`, LSTM too. LAYER has one head,
or heads of 64 units. Shapes are batch, steps, features, units. Times are wall time a step, the
least of several epochs; the compared layers take turns, epoch by epoch. "GPU": what the kernels of
one step of `fit` take. Each backend and policy runs in a process of its own.
"""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import time

import record

SHAPES = ("32x128x64x256", "64x512x128x512", "16x1024x256x1024", "8x4096x64x256")
LAYERS = ("LSTM", "sLSTM", "sLSTM, heads of 64", "mLSTM", "mLSTM, heads of 64", "stack of 2")
KINDS = ("fit", "fit, callback", "predict")
STEPS, EPOCHS = 8, 4


def layer(name, units):
    import keras

    import keras_xlstm

    kind, _, heads = name.partition(", ")
    options = {"num_heads": units // 64} if heads else {}
    if kind == "LSTM":
        return [keras.layers.LSTM(units)]
    if kind in ("sLSTM", "mLSTM"):
        return [getattr(keras_xlstm.layers, kind)(units, **options)]
    stack = keras_xlstm.models.xLSTMStack(units, 2)
    return [keras.layers.Dense(units), stack, keras.layers.GlobalAveragePooling1D()]


def runs_of(names, shape, jit_compile):
    """{(layer, kind): a function that makes STEPS steps}."""
    import keras
    import numpy as np

    import keras_xlstm

    B, T, F, units = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B * STEPS, T, F)).astype("float32")
    y = rng.normal(size=(B * STEPS, 1)).astype("float32")
    runs = {}
    for name in names:
        model = keras.Sequential([keras.Input((T, F)), *layer(name, units), keras.layers.Dense(1)])
        model.compile("adam", "mse", jit_compile=jit_compile)
        callback = keras_xlstm.callbacks.CapturedTraining()

        def fit(callbacks, model=model):
            model.fit(x, y, batch_size=B, verbose=0, callbacks=callbacks)

        def predict(model=model):
            model.predict(x, batch_size=B, verbose=0)

        runs[name, "fit"] = lambda fit=fit: fit([])
        if keras.backend.backend() == "torch" and jit_compile is not True:
            runs[name, "fit, callback"] = lambda fit=fit, c=callback: fit([c])
        runs[name, "predict"] = predict
    return runs


def on_gpu(run):
    """What a run's kernels take, in ms a step; on PyTorch."""
    import torch

    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return sum(event.self_device_time_total for event in events) / 1e3 / STEPS


def measure(names, shapes, jit_compile):
    """Prints a JSON line a shape: {layer: {kind: ms a step}}."""
    import keras

    for shape in shapes:
        runs = runs_of(names, shape, jit_compile)
        times, failed = {key: [] for key in runs}, {}
        for key, run in runs.items():
            start = time.perf_counter()
            try:
                run()
            except Exception as error:  # noqa: BLE001  a layer that cannot run is a result, too
                failed[key] = f"{type(error).__name__}: {error}"[:300]
            seconds = f"first {time.perf_counter() - start:.1f} s"
            print(shape, *key, failed.get(key, seconds), sep=", ", file=sys.stderr, flush=True)
        runs = {key: run for key, run in runs.items() if key not in failed}
        for _ in range(EPOCHS):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - start)
        found = {name: {} for name in names}
        for (name, kind), seconds in times.items():
            found[name][kind] = min(seconds) / STEPS * 1e3 if seconds else None
        if keras.backend.backend() == "torch":
            for name in names:
                if (name, "fit") in runs:
                    found[name]["GPU"] = on_gpu(runs[name, "fit"])
        print(json.dumps({"shape": shape, "found": found}), flush=True)
        keras.backend.clear_session()


def process(arguments, backend, policy, jit_compile):
    names = "|".join(arguments.layers)
    command = [
        sys.executable, __file__, "--run", policy, jit_compile, names, "--shapes",
        *arguments.shapes,
    ]  # fmt: skip
    environment = {**os.environ, "KERAS_BACKEND": backend}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def table(arguments, backend, policy, jit_compile):
    print(f"\n## {backend}, {policy}, jit_compile={jit_compile}\n")
    print("ms a step, and in brackets over LSTM's; GPU: of `fit`, kernels alone\n")
    for line in process(arguments, backend, policy, jit_compile).stdout:
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        found = row["found"]
        kinds = [kind for kind in (*KINDS, "GPU") if any(kind in t for t in found.values())]
        print(f"| {row['shape']} | {' | '.join(kinds)} |\n|{'---|' * (1 + len(kinds))}")
        for name, times in found.items():
            cells = []
            for kind in kinds:
                ms, peer = times.get(kind), found.get("LSTM", {}).get(kind)
                ratio = f" ({ms / peer:.2f})" if ms and peer else ""
                cells.append(f"{ms:.2f}{ratio}" if ms else "failed")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        for kind in KINDS:
            ours = {name: t[kind] for name, t in found.items() if name != "LSTM" and t.get(kind)}
            peer = {"LSTM": found.get("LSTM", {}).get(kind)}
            case = f"{policy}, jit_compile={jit_compile}, B T F units {row['shape']}"
            record.add(__file__, case, kind, "ms", ours, peer, backend=backend)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"])
    parser.add_argument("--policies", nargs="+", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--jit-compile", nargs="+", default=["auto", "true"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    record.option(parser)
    arguments = parser.parse_args()
    if arguments.run:
        policy, jit_compile, names = arguments.run
        import keras

        logging.basicConfig(format="%(message)s")  # which steps are recorded, and why others not
        logging.getLogger("keras_xlstm").setLevel("INFO")
        keras.config.set_dtype_policy(policy)
        jit_compile = True if jit_compile == "true" else "auto"
        return measure(names.split("|"), arguments.shapes, jit_compile)
    cases = [
        case
        for case in itertools.product(arguments.backends, arguments.policies, arguments.jit_compile)
        if case[0] == "torch" or case[2] == "auto"
    ]
    from gpu_torch import environment

    environment()
    for case in cases:
        table(arguments, *case)


if __name__ == "__main__":
    main()
