"""The sLSTM's Triton kernels on one NVIDIA GPU beside their peers, in bfloat16.

    python benchmarks/gpu_slstm.py [--record]

Peers: `flashrnn` (pip install flashrnn) and cuDNN's LSTM of the same width, `torch.nn.LSTM`, whose
time includes its input product. FlashRNN's Triton kernel is taken where it runs, elsewhere its CUDA
kernel, which calls cuBLAS at every step. Each family runs in a process of its own. Times are
medians of triton.testing.do_bench.
"""

import argparse
import json
import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import record
from gpu_torch import bench, cell, environment, figures, run

# B, T, heads, units of a head.
SHAPES = [
    (16, 1024, 12, 64), (64, 512, 4, 64), (16, 1024, 4, 192), (16, 256, 4, 256),
    (16, 1024, 1, 768),
]  # fmt: skip
FAMILIES = ("ours", "triton_fused", "cuda", "cudnn")
ALL = "0,1,2,3,4"
CUDA = (2, 3, 4)  # what flashrnn's Triton kernel cannot run


def function(family, B, T, H, D):
    """(a function, its inputs)."""
    import torch

    torch.manual_seed(0)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, device="cuda") * scale
        return x.to(torch.bfloat16).requires_grad_()

    if family == "cudnn":
        lstm = torch.nn.LSTM(H * D, H * D, batch_first=True, device="cuda", dtype=torch.bfloat16)
        return lambda x, *weights: lstm(x)[0], [random(B, T, H * D), *lstm.parameters()]
    x, bias = random(B, T, 4, H, D, scale=0.5), random(4, H, D)
    if family == "ours":
        from keras_xlstm.ops import slstm

        return lambda *a: slstm(*a, implementation="triton"), [
            x, random(H, D, 4, D, scale=D**-0.5), bias,
        ]  # fmt: skip
    from flashrnn import flashrnn

    def peer(x, R, bias):
        return flashrnn(x, R, bias, function="slstm", backend=family, dtype="bfloat16")[0][0]

    return peer, [x, random(4, H, D, D, scale=D**-0.5), bias]


def measure(family, shapes, warm):
    """[shape index, "forward" or "both", ms] a line, for one family in this process."""
    import torch

    for n in shapes:
        B, T, H, D = SHAPES[n]
        try:
            f, inputs = function(family, B, 4 if warm else T, H, D)

            def forward(f=f, inputs=inputs):
                with torch.no_grad():
                    return f(*inputs)

            gradient = torch.randn_like(forward())

            def both(f=f, inputs=inputs, gradient=gradient):
                torch.autograd.grad(f(*inputs), inputs, gradient)

            for name, timed in (("forward", forward), ("both", both)):
                if warm:
                    timed()
                    continue
                print(json.dumps([n, name, bench(timed)]), flush=True)
        except Exception as e:  # noqa: BLE001  a peer that cannot run is a result, too
            for name in ("forward", "both"):
                print(json.dumps([n, name, f"{type(e).__name__}: {e}"[:80]]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.option(parser)
    parser.add_argument("family", nargs="*", help=argparse.SUPPRESS)  # one, its shapes, "warm"
    one = parser.parse_args().family
    if one:
        family, shapes, *warm = one
        measure(family, [int(n) for n in shapes.split(",")], bool(warm))
        sys.exit()
    # First everything is compiled, side by side; flashrnn's CUDA takes a minute a head size.
    warming = [run(__file__, "cuda", str(n), "warm") for n in CUDA]
    warming.append(run(__file__, "ours", ALL, "warm"))
    for process in warming:
        process.communicate()
    environment()
    shapes = {"triton_fused": "0,1", "cuda": ",".join(map(str, CUDA))}
    results = {f: figures(run(__file__, f, shapes.get(f, ALL))) for f in FAMILIES}
    print("\nms (us a step); in brackets how many times ours is faster\n")
    print("| B T heads x units | | ours | flashrnn triton_fused | flashrnn cuda | nn.LSTM |")
    print("|---|---|---|---|---|---|")
    for n, (B, T, H, D) in enumerate(SHAPES):
        for name, words in (("forward", "fw"), ("both", "fw+bw")):
            ours = results["ours"].get((n, name))
            step = f"{ours:.3f} ({ours / T * 1e3:.2f} us)" if isinstance(ours, float) else ours
            peers = [cell(results[p].get((n, name)), ours) for p in FAMILIES[1:]]
            print("| " + " | ".join([f"{B} {T} {H}x{D}", words, str(step), *peers]) + " |")
            peer = {p: results[p].get((n, name)) for p in FAMILIES[1:]}
            record.add(__file__, f"sLSTM {B} {T} {H}x{D}", words, "ms", {"triton": ours}, peer)
