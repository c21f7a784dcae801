"""Our kernels under JAX on one NVIDIA GPU, in bfloat16: Triton's and Pallas's, beside plain XLA and
beside the Triton kernels on PyTorch; and training a whole model.

    python benchmarks/gpu_jax.py [--only mlstm,slstm,step,model]

Each family runs in a process of its own. Times on JAX are of compiled functions, called several
times before the device is waited for (so without the host, where it keeps ahead), the median of
five rounds; those on PyTorch are gpu_torch.py's. "plain XLA": `mlstm_kernels`' native_autograd for
JAX; "native": our own form without kernels.
"""

import argparse
import json
import os
import statistics
import sys
import time
import types

import gpu_slstm
import gpu_torch
import record
from gpu_torch import SHAPES, STEPS, cell, figures, run

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
FAMILIES = ("triton", "pallas", "native", "xla")


def bench(f, *arguments, calls=10):
    import jax

    jax.block_until_ready(f(*arguments))
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def inputs(B, H, T, K, V, heads_first=False):
    import jax

    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    keys = jax.random.split(jax.random.key(0), 5)
    tensors = [jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, shapes, strict=True)]
    tensors[4] += 3
    return [jax.numpy.moveaxis(t, 1, 2).copy() for t in tensors] if heads_first else tensors


def function(family):
    """(a function of q, k, v, i, f; whether it wants heads first)."""
    family, *chunk = family.split()
    if family == "xla":
        # The package imports its Triton wrappers along, which need this and do not run here.
        sys.modules.setdefault("jax_triton", types.ModuleType("jax_triton"))
        from mlstm_kernels.jax.chunkwise.native import mlstm_chunkwise__native_autograd

        # It unrolls its loop over chunks: at 65,536 steps larger ones ("xla 512") compile sooner.
        chunk_size = int(chunk[0]) if chunk else 64
        return lambda *a: mlstm_chunkwise__native_autograd(*a, chunk_size=chunk_size), True
    from keras_xlstm.ops import mlstm

    return lambda *a: mlstm(*a, implementation=family), False


def slstm_inputs(B, T, H, D):
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    x = 0.5 * jax.random.normal(keys[0], (B, T, 4, H, D), "bfloat16")
    R = D**-0.5 * jax.random.normal(keys[1], (H, D, 4, D), "bfloat16")
    return [x, R, jax.random.normal(keys[2], (4, H, D), "bfloat16")]


def measure(family, only=None):
    """[shape index, "forward" or "both", ms] a line, for one family in this process."""
    import jax

    if family.startswith("slstm "):
        from keras_xlstm.ops import slstm

        family = family.removeprefix("slstm ")
        shapes = gpu_slstm.SHAPES

        def f(*tensors):
            return slstm(*tensors, implementation=family)

        def make(shape):
            x = slstm_inputs(*shape)
            return x, jax.numpy.ones_like(x[0][:, :, 0])
    else:
        shapes = SHAPES
        f, heads_first = function(family)

        def make(shape):
            tensors = inputs(*shape, heads_first)
            return tensors, tensors[2]

    def both(gradient, *tensors):
        _, gradients = jax.vjp(f, *tensors)
        return gradients(gradient)

    for n, shape in enumerate(shapes):
        if only and str(n) not in only.split(","):
            continue
        tensors, gradient = make(shape)
        calls = {"forward": (f, tensors), "both": (both, (gradient, *tensors))}
        for name, (call, arguments) in calls.items():
            try:
                result = bench(jax.jit(call), *arguments)
            except Exception as e:  # noqa: BLE001  a peer that cannot run is a result, too
                result = f"{type(e).__name__}: {e}"[:150]
            print(json.dumps([n, name, result]), flush=True)
            print(f"  {family} {shape} {name}: {result}", file=sys.stderr, flush=True)


def measure_steps(family):
    """A step in a compiled loop of 50, whose state is updated in place."""
    import jax

    from keras_xlstm.ops import mlstm

    for B in STEPS:
        x = inputs(B, 8, 1, 256, 512)
        state = [jax.numpy.ones(s) for s in ((B, 8, 256, 512), (B, 8, 256), (B, 8))]

        def several(state, x=x):
            def step(_, state):
                return mlstm(*x, state, return_state=True, implementation=family)[1]

            return jax.lax.fori_loop(0, 50, step, tuple(state))

        run, held = jax.jit(several, donate_argnums=0), [tuple(state)]

        def again(run=run, held=held):  # in place: nothing of the state is copied
            held[0] = run(held[0])
            return held[0]

        print(json.dumps([B, "step", bench(again) / 50]), flush=True)


def model_speed(devices=1, context=False):
    """`model.fit` of the model of gpu_model.py, its batch on each of so many devices, or with
    `context` its sequences over all of them: tokens/s, GiB of the first device at most, seconds of
    the first epoch."""
    import gpu_model

    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    import keras_xlstm

    if devices > 1:
        names = keras.distribution.list_devices()[:devices]
        distribution = keras.distribution.DataParallel(devices=names)
        if context:
            mesh = keras.distribution.DeviceMesh((1, devices), ("batch", "time"), names)
            distribution = keras_xlstm.distribution.ContextParallel(mesh)
        keras.distribution.set_distribution(distribution)
    batch = gpu_model.B * (1 if context else devices)
    run_epoch, _ = gpu_model.fitting(batch=batch, remat=context)

    def epoch():
        start = time.perf_counter()
        run_epoch()
        return time.perf_counter() - start

    first = epoch()
    seconds = min(epoch() for _ in range(3))
    # A CPU counts nothing.
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return batch * gpu_model.T * gpu_model.STEPS / seconds, peak, first


def measure_model():
    import gpu_model

    tokens, peak, first = model_speed()
    print(
        f"407M, B8 T2048, model.fit on jax: {tokens:,.0f} tokens/s, peak {peak:.1f} GiB, "
        f"first epoch of 20 steps {first:.0f} s",
        flush=True,
    )
    figures = {"training": (tokens, "tokens/s"), "peak memory": (peak, "GiB")}
    for metric, (figure, unit) in figures.items():
        record.add(__file__, gpu_model.CASE, metric, unit, {"ours-compiled": figure})


def table():
    results = {f: figures(run(__file__, "--family", f, errors=None)) for f in FAMILIES}
    results["torch"] = figures(gpu_torch.run_family("ours"))
    print("\nms; in brackets how many times triton is faster\n")
    print("| B heads T d_qk/d_v | | triton | pallas | plain XLA | native | triton on torch |")
    print("|---|---|---|---|---|---|---|")
    for n, (B, H, T, K, V) in enumerate(SHAPES):
        rows(n, f"mLSTM {B} {H} {T} {K}/{V}", results, ("pallas", "xla", "native", "torch"))


def slstm_table():
    families = ("triton", "pallas", "native")
    results = {f: figures(run(__file__, "--family", f"slstm {f}", errors=None)) for f in families}
    results["torch"] = figures(run(gpu_slstm.__file__, "ours", gpu_slstm.ALL))
    print("\n| sLSTM, B T heads x units | | triton | pallas | native | triton on torch |")
    print("|---|---|---|---|---|---|")
    for n, (B, T, H, D) in enumerate(gpu_slstm.SHAPES):
        rows(n, f"sLSTM {B} {T} {H}x{D}", results, ("pallas", "native", "torch"))


def rows(n, shape, results, peers):
    for name, words in (("forward", "fw"), ("both", "fw+bw")):
        ours = results["triton"].get((n, name))
        others = [cell(results[p].get((n, name)), ours) for p in peers]
        print(f"| {shape} | {words} | {cell(ours, None)} | {' | '.join(others)} |", flush=True)
        peer = {p: results[p].get((n, name)) for p in peers}
        record.add(__file__, shape, words, "ms", {"triton": ours}, peer, "jax")


def step_table(bandwidth):
    ours, native = (figures(run(__file__, "--steps", family)) for family in ("pallas", "native"))
    print("\n| step, float32 state 8x256x512, ms | pallas | of the copy's bandwidth | native |")
    print("|---|---|---|---|")
    for B in STEPS:
        ms = ours.get((B, "step"))
        copy = gpu_torch.copying(B, bandwidth)
        share = f"{copy / ms:.0%}" if isinstance(ms, float) else "-"
        print(f"| B {B} | {cell(ms, None)} | {share} | {cell(native.get((B, 'step')), ms)} |")
        peer = {"native": native.get((B, "step")), "copy": copy}
        record.add(__file__, f"mLSTM step, B {B}", "step", "ms", {"pallas": ms}, peer, "jax")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="mlstm,slstm,step,model", help="parts, with commas")
    record.option(parser)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", help=argparse.SUPPRESS)
    parser.add_argument("--steps", help=argparse.SUPPRESS)
    parser.add_argument("--model", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.family or arguments.steps or arguments.model:
        if arguments.family:
            measure(arguments.family, arguments.shapes)
        elif arguments.steps:
            measure_steps(arguments.steps)
        else:
            measure_model()
        sys.exit()
    parts = arguments.only.split(",")
    from importlib.metadata import version

    print(f"jax {version('jax')}; ", end="")
    bandwidth = gpu_torch.environment()
    if "mlstm" in parts:
        table()
    if "slstm" in parts:
        slstm_table()
    if "step" in parts:
        step_table(bandwidth)
    if "model" in parts:
        print("\n" + run(__file__, "--model", errors=None).communicate()[0], end="")
