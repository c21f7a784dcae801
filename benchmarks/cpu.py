"""CPU speed, each backend in a process of its own, every figure beside its peer in the same run.

    python benchmarks/cpu.py                    # jax, tensorflow, torch, then the official code
    python benchmarks/cpu.py --only torch

Keras part: one `fit` step of sLSTM(256, num_heads=4) and mLSTM(256, num_heads=4) beside
keras.layers.LSTM(256): batch 16, 256 steps, 256 features, return_sequences. Official part: the
functional ops on torch beside `xlstm` (sLSTM cell, vanilla) and `mlstm_kernels` (native), which
`pip install "keras-xlstm[benchmark]"` brings. Repetitions of the compared things alternate, so
that a slow moment of the machine meets all of them; medians.
"""

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time

B, T, U, H = 16, 256, 256, 4


def medians(functions, repeats, of=statistics.median):
    """{name: median ms} (or another figure `of` them), the functions taking turns."""
    for f in functions.values():
        f()
        f()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append((time.perf_counter() - start) * 1e3)
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


def keras_part(jit_compile):
    import keras
    import numpy as np

    from keras_xlstm.layers import mLSTM, sLSTM

    print(f"## {keras.backend.backend()}, jit_compile={jit_compile}: {environment()}", flush=True)
    rng = np.random.default_rng(0)
    steps = 4
    x, y = (rng.normal(size=(B * steps, T, U)).astype("float32") for _ in "xy")
    functions = {}
    layers = {
        "keras LSTM": keras.layers.LSTM(U, return_sequences=True),
        "sLSTM": sLSTM(U, num_heads=H, return_sequences=True),
        "mLSTM": mLSTM(U, num_heads=H, return_sequences=True),
    }
    for name, layer in layers.items():
        model = keras.Sequential([keras.Input((T, U)), layer])
        model.compile("sgd", "mse", jit_compile=jit_compile)
        functions[name] = lambda m=model: m.fit(x, y, batch_size=B, verbose=0)
    for name, ms in (result := medians(functions, 7)).items():
        ratio = ms / result["keras LSTM"]
        print(f"{name:11} fit step {ms / steps:7.1f} ms   {ratio:5.2f} of keras LSTM", flush=True)


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
    args = parser.parse_args()
    if args.here == "official":
        official_part()
    elif args.here:
        keras_part({"tensorflow": False, "tensorflow-jit": True}.get(args.here, "auto"))
    for part in () if args.here else args.only or parts:
        backend = {"official": "torch", "tensorflow-jit": "tensorflow"}.get(part, part)
        env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__, "--here", part], env=env, check=True)


if __name__ == "__main__":
    main()
