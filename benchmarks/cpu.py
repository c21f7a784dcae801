"""CPU speed, each backend in a process of its own, every figure beside its peer in the same run.

    python benchmarks/cpu.py                    # jax, tensorflow, torch, then the official code
    python benchmarks/cpu.py --only torch --shapes tutorials
    python benchmarks/cpu.py --only jax --shapes 64x60x12x48 32x200x64x64

Keras part: one `fit` step, one `predict` step and the first step's compilation of
Sequential([Input((T, F)), LAYER(units), Dense(1)]) at Keras's defaults. LAYER is keras.layers.LSTM,
sLSTM and mLSTM of one head and of four, and an xLSTMStack of 2 blocks. Times are process time (both
cores' work), as ratios to LSTM. Shapes are batch, steps, features, units: of public tutorials,
and sweeps over units, steps and batch. `--sequences`: with `return_sequences`; `--unknown`: models
that do not know their length. Official part: the
functional ops on torch beside `xlstm` (sLSTM cell, vanilla) and `mlstm_kernels` (native), which
`pip install "keras-xlstm[benchmark]"` brings. Repetitions of the compared things alternate, so
that a slow moment of the machine meets all of them; the least of each.
"""

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time

import record

H = 4
SHAPES = {
    "tutorials": {
        "weather forecast": (256, 120, 7, 32),
        "sentiment": (32, 200, 128, 64),
        "characters": (128, 40, 56, 128),
        "video features": (8, 20, 1024, 16),
        "sequence pairs": (64, 16, 70, 256),
        "sensors": (64, 500, 1, 64),
        "small table": (64, 60, 12, 48),
        "tokens": (32, 200, 64, 64),
        "wide": (16, 256, 256, 256),
    },
    "sweeps": {
        **{f"{units} units": (32, 100, 16, units) for units in (8, 16, 32, 64, 128, 256, 512)},
        **{f"{steps} steps": (32, steps, 16, 64) for steps in (20, 100, 300, 1000)},
        **{f"batch {batch}": (batch, 100, 16, 64) for batch in (1, 8, 32, 128, 256)},
    },
}


def medians(functions, repeats, of=statistics.median, clock=time.perf_counter):
    """{name: median ms} (or another figure `of` them), the functions taking turns."""
    for f in functions.values():
        f()
        f()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = clock()
            f()
            times[name].append((clock() - start) * 1e3)
    return {name: of(t) for name, t in times.items()}


def environment():
    from importlib.metadata import version

    names = ("keras", os.environ["KERAS_BACKEND"], "numpy", "keras-xlstm")
    names = [("tensorflow-cpu" if n == "tensorflow" else n) for n in names]
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except ModuleNotFoundError:
            versions.append(f"{name} (checkout)")
    machine = f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"
    return f"{machine}, {', '.join(versions)}"


def layers_of(units, sequences):
    import keras

    from keras_xlstm.layers import mLSTM, sLSTM
    from keras_xlstm.models import xLSTMStack

    options = {"return_sequences": sequences}

    def stack():
        parts = [keras.layers.Dense(units), xLSTMStack(units, 2)]
        return parts if sequences else [*parts, keras.layers.GlobalAveragePooling1D()]

    made = {
        "LSTM": lambda: [keras.layers.LSTM(units, **options)],
        "sLSTM": lambda: [sLSTM(units, **options)],
        "sLSTM, 4 heads": lambda: [sLSTM(units, num_heads=H, **options)],
        "mLSTM": lambda: [mLSTM(units, **options)],
        "mLSTM, 4 heads": lambda: [mLSTM(units, num_heads=H, **options)],
        "stack of 2": stack,
    }
    return made


def measured(shape, names, jit_compile, sequences, unknown, steps=6, repeats=5):
    """{(layer, what): process time in ms}; `what` is fit, predict or first (step)."""
    import keras
    import numpy as np

    B, T, F, units = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B * steps, T, F)).astype("float32")
    y = rng.normal(size=(B * steps, T, 1) if sequences else (B * steps, 1)).astype("float32")
    runs, first = {}, {}
    for name, make in layers_of(units, sequences).items():
        if name not in names:
            continue
        inputs = keras.Input((None if unknown else T, F))
        model = keras.Sequential([inputs, *make(), keras.layers.Dense(1)])
        model.compile("adam", "mse", jit_compile=jit_compile)
        runs[name, "fit"] = lambda m=model: m.fit(x, y, batch_size=B, verbose=0)
        runs[name, "predict"] = lambda m=model: m.predict(x, batch_size=B, verbose=0)
        start = time.process_time()
        model.fit(x[:B], y[:B], batch_size=B, verbose=0)
        first[name, "first"] = (time.process_time() - start) * 1e3
    times = medians(runs, repeats, of=min, clock=time.process_time)
    return {key: ms / steps for key, ms in times.items()} | first


def keras_part(jit_compile, shapes, names, sequences, unknown):
    import keras

    engine = keras.backend.backend() + ", jit_compile=True" * (jit_compile is True)
    kind = ", return_sequences" * sequences + ", length unknown to the model" * unknown
    print(f"## {keras.backend.backend()}, jit_compile={jit_compile}{kind}: {environment()}\n")
    print("LSTM's time in ms; the others as ratios to it: fit, predict, first step.\n")
    others = [name for name in names if name != "LSTM"]
    print(f"| | B T F units | LSTM | {' | '.join(others)} |")
    print(f"|{'---|' * (3 + len(others))}", flush=True)
    for label, shape in shapes.items():
        ms = measured(shape, names, jit_compile, sequences, unknown)
        kinds = ("fit", "predict", "first")
        cells = [", ".join(f"{ms['LSTM', what]:.1f}" for what in kinds)]
        for name in others:
            ratios = (ms[name, what] / ms["LSTM", what] for what in kinds)
            cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        print(f"| {label} | {' '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
        for what in kinds:
            ours = {name: ms[name, what] for name in others}
            case = f"{label}: {' '.join(map(str, shape))}{kind}"
            kept = {"LSTM": ms["LSTM", what]}
            record.add(__file__, case, f"{what} step", "ms", ours, kept, engine)


def official_part():
    import torch
    from mlstm_kernels.torch import get_mlstm_kernel
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    import keras_xlstm

    print(f"## the official torch code: {environment()}", flush=True)

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    def backward(f):
        return lambda: f().sum().backward()

    def without_gradient(f):
        def run():
            with torch.no_grad():
                f()

        return run

    def table(title, functions):
        for kind, wrap in (("forward", without_gradient), ("forward+backward", backward)):
            result = medians({n: wrap(f) for n, f in functions.items()}, 7)
            ours = result.pop("ours")
            peers = ", ".join(f"{n} {ms:.1f} ms = {ms / ours:.2f}x" for n, ms in result.items())
            print(f"{title}, {kind}: ours {ours:.1f} ms; {peers}", flush=True)
            record.add(__file__, title, kind, "ms", {"ops": ours}, result)

    for batch, time_steps in ((16, 256), (8, 512)):
        D = 64
        cell = sLSTMCell(sLSTMCellConfig(hidden_size=H * D, num_heads=H, backend="vanilla"))
        theirs = leaf(batch, time_steps, 4 * H * D)
        x, R, bias = leaf(batch, time_steps, 4, H, D), leaf(H, D, 4, D), leaf(4, H, D)
        table(f"sLSTM B{batch} T{time_steps} {H}x{D}", {
            "ours": lambda x=x, R=R, b=bias: keras_xlstm.ops.slstm(x, R, b),
            "xlstm vanilla": lambda c=cell, x=theirs: c(x)[0],
        })  # fmt: skip
    for batch, time_steps, K, V in ((4, 1024, 64, 128), (8, 512, 64, 64)):
        q, k, v = (leaf(batch, time_steps, H, d) for d in (K, K, V))
        i, f = leaf(batch, time_steps, H), leaf(batch, time_steps, H)
        heads_first = [
            a.detach().transpose(1, 2).contiguous().requires_grad_() for a in (q, k, v, i, f)
        ]
        functions = {"ours": lambda a=(q, k, v, i, f): keras_xlstm.ops.mlstm(*a)}
        for name in ("native_autograd", "native_custbw"):
            kernel = functools.partial(
                get_mlstm_kernel(f"chunkwise--{name}"),
                chunk_size=64,
                autocast_kernel_dtype=torch.float32,
            )
            functions[name] = lambda kernel=kernel, a=heads_first: kernel(*a)
            # From and to (B, T, H, D), where a layer's projections leave their results.
            functions[f"{name}, our layout"] = lambda kernel=kernel, a=(q, k, v, i, f): kernel(
                *(x.transpose(1, 2) for x in a)
            ).transpose(1, 2)
        table(f"mLSTM B{batch} H{H} T{time_steps} {K}/{V}", functions)
    print("(native_custbw's gradient leaves the normaliser's term out: it is not the exact one.)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("jax", "tensorflow", "tensorflow-jit", "torch", "official")
    parser.add_argument("--only", choices=parts, action="append", help="may be given again")
    parser.add_argument("--here", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument(
        "--shapes", nargs="+", default=["tutorials"], help=f"of {list(SHAPES)}, or as 64x60x12x48"
    )
    parser.add_argument("--layers", nargs="+", help="of those compared, beside LSTM")
    parser.add_argument("--sequences", action="store_true", help="with return_sequences")
    parser.add_argument("--unknown", action="store_true", help="models of any length")
    record.option(parser)
    args = parser.parse_args()
    if args.here == "official":
        return official_part()
    if args.here:
        shapes = {}
        for name in args.shapes:
            if name in SHAPES:
                shapes |= SHAPES[name]
                continue
            shape = tuple(map(int, name.split("x")))
            labels = (label for of in SHAPES.values() for label, s in of.items() if s == shape)
            shapes[next(labels, name)] = shape
        names = list(layers_of(1, False))
        names = ["LSTM", *(n for n in names if n in args.layers)] if args.layers else names
        jit_compile = {"tensorflow": False, "tensorflow-jit": True}.get(args.here, "auto")
        return keras_part(jit_compile, shapes, names, args.sequences, args.unknown)
    for part in args.only or parts:
        backend = {"official": "torch", "tensorflow-jit": "tensorflow"}.get(part, part)
        env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, *sys.argv[1:], "--here", part]
        subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
    main()
