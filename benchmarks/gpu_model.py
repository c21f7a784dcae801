"""Training xLSTM-Large (24 blocks, 1024 wide, 407M parameters) on one NVIDIA GPU, in bfloat16:
`model.fit` on PyTorch beside the official model under torch.compile.

    python benchmarks/gpu_model.py [ours-compiled ours official-compiled ...] [--record]

8 sequences of 2048 tokens a step, AdamW. "ours" is compiled as Keras does by default, "compiled"
with jit_compile=True, "plain" with False, "captured" with False and `callbacks.CapturedTraining`.
The official model (`xlstm`, `mlstm_kernels`) trains in
PyTorch's own loop, under autocast, with a fused AdamW. Each family runs in a process of its own;
the time is that of whole epochs of 20 steps, the best of three, after one that compiles.
"""

import argparse
import json
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import record
from gpu_torch import environment, run

B, T, VOCABULARY, STEPS = 8, 2048, 50304, 20
UNITS, BLOCKS = 1024, 24
CASE = "407M parameters, B 8, T 2048"
METRICS = {"tokens": "training", "peak": "peak memory", "first": "first epoch"}
FAMILIES = (
    "ours-compiled", "ours", "ours-captured", "ours-plain", "official-compiled", "official"
)  # fmt: skip
WAYS = {"": "auto", "compiled": True, "captured": False, "plain": False}


def ids(batch):
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch * STEPS, T + 1), dtype="int32")


def fitting(jit_compile="auto", batch=B, remat=False, captured=False):
    """An epoch of our model's `fit` on Keras's backend, and the number of parameters."""
    import keras

    import keras_xlstm

    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras_xlstm.models.xLSTMLanguageModel(
        VOCABULARY, UNITS, BLOCKS, num_heads=4, architecture="large", logit_soft_cap=30.0,
        remat=remat,
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-4), loss, jit_compile=jit_compile)
    data = ids(batch)
    callbacks = [keras_xlstm.callbacks.CapturedTraining()] if captured else []

    def epoch():
        x, y = data[:, :-1], data[:, 1:]
        model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=callbacks)

    return epoch, model.count_params()


def ours(way):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    return fitting(WAYS[way], captured=way == "captured")


def official(compiled):
    import torch
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    config = xLSTMLargeConfig(
        embedding_dim=1024, num_heads=4, num_blocks=24, vocab_size=VOCABULARY, mode="train",
        chunkwise_kernel="chunkwise--triton_limit_chunk", chunk_size=64, return_last_states=True,
        autocast_kernel_dtype="bfloat16",
    )  # fmt: skip
    model = xLSTMLarge(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model
    data = torch.tensor(ids(B), device="cuda", dtype=torch.long).split(B)

    def epoch():
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = call(batch[:, :-1])
                logits = logits[0] if isinstance(logits, tuple) else logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), batch[:, 1:].flatten()
                )
            loss.backward()
            optimizer.step()

    return epoch, sum(p.numel() for p in model.parameters())


def timed(f):
    import torch

    start = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(family):
    import torch

    kind, _, compiled = family.partition("-")
    epoch, parameters = {"ours": ours, "official": official}[kind](compiled)
    first = timed(epoch)
    torch.cuda.reset_peak_memory_stats()
    seconds = min(timed(epoch) for _ in range(3))
    result = {
        "tokens": B * T * STEPS / seconds, "first": first, "parameters": parameters,
        # Reserved: what a CUDA graph keeps is not allocated between its runs.
        "peak": torch.cuda.max_memory_reserved() / 2**30,
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    if os.environ.get("PROFILE"):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            epoch()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
        print(table, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {FAMILIES}; all if left out")
    parser.add_argument("--family", help=argparse.SUPPRESS)
    record.option(parser)
    arguments = parser.parse_args()
    if arguments.family:
        measure(arguments.family)
        sys.exit()
    environment()
    print("\n| | tokens/s | ours is faster | peak GiB | first epoch s | parameters |")
    print("|---|---|---|---|---|---|")
    best, found = None, {}
    for family in arguments.families or FAMILIES:
        out, _ = run(__file__, "--family", family, errors=None).communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if not lines:
            print(f"| {family} | died | | | | |", flush=True)
            continue
        r = found[family] = lines[0]
        best = best or r["tokens"]
        cells = f"{r['tokens']:,.0f} | {best / r['tokens']:.2f}x | {r['peak']:.1f}"
        print(f"| {family} | {cells} | {r['first']:.0f} | {r['parameters']:,} |", flush=True)
    units = {"tokens": "tokens/s", "peak": "GiB", "first": "s"}
    for key, unit in units.items():
        own, peer = (
            {f: r[key] for f, r in found.items() if f.startswith(kind)}
            for kind in ("ours", "official")
        )
        record.add(__file__, CASE, METRICS[key], unit, own, peer)
