"""Training tokens a second, and memory, against context length, on one NVIDIA GPU in bfloat16.

    python benchmarks/gpu_context.py [torch jax llama] [--lengths 2048 8192] [--record]

`model.fit` of xLSTM-Large (24 blocks, 1024 wide, 407M parameters) at Keras's defaults, beside a
Transformer of as many parameters. That has RoPE, SwiGLU, RMSNorm and PyTorch's flash attention, and
trains under torch.compile with a fused AdamW. A step has one sequence, or as many as make 16,384
tokens. Each family and length runs in a process of its own: the rate of the best of two epochs
after the first, of 8 steps or fewer.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import record

FAMILIES = ("torch", "jax", "llama")
LENGTHS = (2048, 8192, 32768, 65536, 131072)
TOKENS, VOCABULARY, UNITS, BLOCKS, HEADS, HIDDEN = 16384, 50304, 1024, 24, 16, 2752


def ids(batch, length, steps):
    shape = batch * steps, length + 1
    return np.random.default_rng(0).integers(0, VOCABULARY, shape, dtype="int32")


def ours(batch, length, steps):
    import keras

    import keras_xlstm

    if keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = True
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras_xlstm.models.xLSTMLanguageModel(
        VOCABULARY, UNITS, BLOCKS, num_heads=4, architecture="large", logit_soft_cap=30.0
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-4), loss)
    data = ids(batch, length, steps)

    def epoch():
        model.fit(data[:, :-1], data[:, 1:], batch_size=batch, shuffle=False, verbose=0)

    return epoch, model.count_params()


def llama(batch, length, steps):
    import torch
    from torch import nn
    from torch.nn import functional

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(UNITS))

        def forward(self, x):
            return functional.rms_norm(x, (UNITS,), self.weight.to(x.dtype))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Norm(), Norm()
            self.qkv = nn.Linear(UNITS, 3 * UNITS, bias=False)
            self.out = nn.Linear(UNITS, UNITS, bias=False)
            self.up = nn.Linear(UNITS, 2 * HIDDEN, bias=False)
            self.down = nn.Linear(HIDDEN, UNITS, bias=False)

        def forward(self, x, cos, sin):
            shape = *x.shape[:2], 3, HEADS, UNITS // HEADS
            q, k, v = self.qkv(self.first(x)).view(shape).permute(2, 0, 3, 1, 4)

            def turned(a):
                a, b = a.chunk(2, -1)
                return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

            y = functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            up, gate = self.up(self.second(x)).chunk(2, -1)
            return x + self.down(functional.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, UNITS)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm, self.head = Norm(), nn.Linear(UNITS, VOCABULARY, bias=False)
            size = UNITS // HEADS
            rates = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
            angles = torch.outer(torch.arange(length).float(), rates)
            self.register_buffer("cos", angles.cos().bfloat16())
            self.register_buffer("sin", angles.sin().bfloat16())

        def forward(self, x, y):
            x = self.embedding(x).bfloat16()
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits = self.head(self.norm(x)).flatten(0, 1).float()
            return functional.cross_entropy(logits, y.flatten())

    torch.backends.cuda.matmul.allow_tf32 = True
    model = Llama().cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = torch.tensor(ids(batch, length, steps), device="cuda").long().split(batch)

    def epoch():
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(batch[:, :-1], batch[:, 1:])
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()

    return epoch, sum(p.numel() for p in model.parameters())


def peak():
    """GiB."""
    if "jax" in sys.modules and os.environ["KERAS_BACKEND"] == "jax":
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    import torch

    return torch.cuda.max_memory_reserved() / 2**30


def measure(family, length):
    batch = max(1, TOKENS // length)
    steps = max(4, 8 * TOKENS // (batch * length))
    epoch, parameters = (llama if family == "llama" else ours)(batch, length, steps)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - start)
    tokens = batch * length * steps / min(times[1:])
    result = {"tokens": tokens, "peak": peak(), "first": times[0], "parameters": parameters}
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {FAMILIES}; all if left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    record.option(parser)
    arguments = parser.parse_args()
    if arguments.family:
        return measure(arguments.family, *arguments.lengths)
    from gpu_torch import environment, run

    environment()
    print("\n| length | | tokens/s | peak GiB | first epoch s | parameters |")
    print("|---|---|---|---|---|---|")
    for length in arguments.lengths:
        found = {}
        for family in arguments.families or FAMILIES:
            os.environ["KERAS_BACKEND"] = "jax" if family == "jax" else "torch"
            options = "--family", family, "--lengths", str(length)
            out, _ = run(__file__, *options, errors=None).communicate()
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            if not lines:
                print(f"| {length:,} | {family} | died | | | |", flush=True)
                continue
            r = found[family] = lines[0]
            cells = f"{r['tokens']:,.0f} | {r['peak']:.1f} | {r['first']:.0f}"
            print(f"| {length:,} | {family} | {cells} | {r['parameters']:,} |", flush=True)
        for key, metric, unit in (
            ("tokens", "training", "tokens/s"), ("peak", "peak memory", "GiB")
        ):  # fmt: skip
            figures = {family: r[key] for family, r in found.items()}
            peer = {f: figures.pop(f) for f in ("llama",) if f in figures}
            case = f"407M parameters, contexts of {length}"
            record.add(__file__, case, metric, unit, figures, peer, backend="both")


if __name__ == "__main__":
    main()
