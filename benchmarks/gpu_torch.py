"""The mLSTM's Triton kernels on one NVIDIA GPU beside their peers, in bfloat16; and, with
gpu_slstm.py and gpu_model.py, all of PyTorch's figures.

    python benchmarks/gpu_torch.py [--only errors,mlstm,step,slstm,model] [--peers limit_chunk]

Peers: `mlstm_kernels` (pip install "keras-xlstm[benchmark]") and PyTorch's causal attention through
cuDNN. Each family runs in a process of its own, because some peers' compilers abort; a first pass
compiles everything, the families side by side, and is not timed. Times are medians of
triton.testing.do_bench; a step's are per replay of a CUDA graph of 20 steps, so without launches.
The floor counts what must be read and written once (q, k, v in, h out; backwards those, dh and
three gradients) over the bandwidth of a copy in the same run.
"""

import argparse
import json
import os
import subprocess
import sys

import record

os.environ["KERAS_BACKEND"] = "torch"

# B, heads, T, d_qk, d_v: 65,536 tokens of a model 4096 wide, the heads of a 7B model, small heads.
SHAPES = [
    (32, 16, 2048, 128, 256), (8, 16, 8192, 128, 256), (1, 16, 65536, 128, 256),
    (8, 8, 8192, 256, 512), (16, 4, 2048, 64, 128),
]  # fmt: skip
FAMILIES = ("ours", "limit_chunk", "xl_chunk_siging", "attention")
STEPS = (1, 16, 64)


def bench(f):
    from triton.testing import do_bench

    return do_bench(f, warmup=15, rep=60, return_mode="median")


def inputs(B, H, T, K, V, heads_first):
    import torch

    torch.manual_seed(0)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    tensors = [torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    tensors[4] += 3
    return [t.transpose(1, 2).contiguous() for t in tensors] if heads_first else tensors


def function(family):
    """(a function of q, k, v, i, f; whether it wants heads first)."""
    if family == "ours":
        from keras_xlstm.ops import mlstm

        return lambda *a: mlstm(*a, implementation="triton"), False
    if family == "attention":
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention(q, k, v, *gates):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attention, True
    from mlstm_kernels.torch import get_mlstm_kernel

    chunk_size = 64 if family == "limit_chunk" else 128
    kernel = get_mlstm_kernel(f"chunkwise--triton_{family}")
    return lambda *a: kernel(*a, chunk_size=chunk_size), True


def replayed(run):
    """The same as a CUDA graph, without the host's time."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(family, warm, only=None):
    """[shape index, "forward" or "both", ms] a line, for one family in this process."""
    import torch

    f, heads_first = function(family)
    for n, (B, H, T, K, V) in enumerate(SHAPES):
        if only and str(n) not in only.split(","):
            continue
        if family == "attention":  # the width in heads of 128, as a Transformer has them
            if n > 2:
                continue
            H, K, V = 32, 128, 128
        tensors = inputs(1 if warm else B, H, T, K, V, heads_first)
        leaves = [t.requires_grad_() for t in tensors[: 3 if family == "attention" else 5]]
        gradient = torch.randn_like(leaves[2])

        def forward(tensors=tensors):
            with torch.no_grad():
                return f(*tensors)

        def both(tensors=tensors, leaves=leaves, gradient=gradient):
            torch.autograd.grad(f(*tensors), leaves, gradient)

        small = B * H * T * (K + V) < 1 << 26  # then an eager call takes the host's time
        runs = [("forward", forward), ("both", both)]
        runs += [(f"{name} replayed", run) for name, run in runs if small]
        for name, run in runs:
            try:
                if name.endswith("replayed"):
                    run = replayed(run)
                run()
                if not warm:
                    print(json.dumps([n, name, bench(run)]), flush=True)
            except Exception as e:  # noqa: BLE001  a peer that cannot run is a result, too
                print(json.dumps([n, name, f"{type(e).__name__}: {e}"[:150]]), flush=True)
        del tensors, leaves, gradient
        torch.cuda.empty_cache()


def measure_steps(family, warm):
    import torch

    H, K, V = 8, 256, 512
    for B in STEPS:
        q, k, v, i, f = (t[:, 0] for t in inputs(B, H, 1, K, V, False))
        C, n = torch.randn(B, H, K, V, device="cuda"), torch.randn(B, H, K, device="cuda")
        m = torch.zeros(B, H, device="cuda")
        if family == "ours":
            from keras_xlstm.ops import mlstm

            def step(state, x=tuple(t[:, None] for t in (q, k, v, i, f))):
                return mlstm(*x, state, return_state=True, implementation="triton")[1]
        else:
            from mlstm_kernels.torch import get_mlstm_step_kernel

            kernel = get_mlstm_step_kernel("triton")

            def step(state, q=q, k=k, v=v, i=i, f=f, kernel=kernel):
                C, n, m = state
                one = {"q": q, "k": k, "v": v, "i": i[..., None], "f": f[..., None]}
                return kernel(**one, c=C, n=n, m=m)[1]

            m = m[..., None]
        state = (C, n, m)
        with torch.no_grad():
            for _ in range(3):
                step(state)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    step(state)
            if not warm:
                ms = bench(graph.replay) / 20
                print(json.dumps([B, "step", ms]), flush=True)


def measure_errors():
    """Relative RMS errors of ours and of the native form in bfloat16, against float64."""
    import torch

    from keras_xlstm.ops import mlstm

    # Few heads and many: the kernels differ.
    sizes = ((4, 64, 128), (2, 128, 256), (1, 256, 512), (128, 64, 128), (64, 128, 256))
    for H, K, V in (*sizes, (32, 256, 512)):
        tensors = inputs(1, H, 1024, K, V, False)
        gradient = torch.randn_like(tensors[2])
        results = {}
        for name, dtype in (("triton", None), ("native", None), ("exact", torch.float64)):
            leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
            implementation = "native" if name == "exact" else name
            h = mlstm(*leaves, eps=0.0, implementation=implementation)
            results[name] = [h, *torch.autograd.grad(h, leaves, gradient.to(h.dtype))]
        found = {}
        for name in ("triton", "native"):
            errors = [
                ((a.double() - b).norm() / b.norm()).item()
                for a, b in zip(results[name], results["exact"], strict=True)
            ]
            said = " ".join(
                f"{n} {e:.1e}" for n, e in zip("h dq dk dv di df".split(), errors, strict=True)
            )
            print(f"{H} heads of {K}/{V} {name}: {said}", flush=True)
            found[name] = errors
        for n, result in enumerate("h dq dk dv di df".split()):
            figures = {name: errors[n] for name, errors in found.items()}
            case = f"{H} heads of {K}/{V}, 1,024 steps"
            record.add(__file__, case, f"error of {result}", "relative RMS", figures)


def environment():
    from importlib.metadata import PackageNotFoundError, version

    import torch

    names = []
    for name in ("torch", "triton", "keras", "mlstm_kernels", "flashrnn", "xlstm"):
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            names.append(f"{name} absent")
    a = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
    b = torch.empty_like(a)
    bandwidth = 4 * a.numel() / bench(lambda: b.copy_(a)) / 1e9
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / bench(lambda: x @ x) / 1e9
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {bandwidth:.2f} TB/s, matmul {rate:.0f} TFLOP/s; {', '.join(names)}")
    return bandwidth


def run(script, *arguments, errors=subprocess.DEVNULL):
    """One family in a process of its own: the peers' compilers can abort theirs."""
    command = [sys.executable, script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


def run_family(family, warm=False, steps=False):
    return run(__file__, "--family", family, *["--warm"] * warm, *["--steps"] * steps)


def figures(process):
    out, _ = process.communicate()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    found = {(n, name): value for n, name, value in lines}
    if process.returncode:
        found["died"] = process.returncode
    return found


def cell(value, ours):
    if not isinstance(value, float):
        return "-" if value is None else str(value)[:60]
    return f"{value:.3f} ({value / ours:.2f}x)" if isinstance(ours, float) else f"{value:.3f}"


def table(bandwidth, families):
    results = {}
    for family in families:  # each at once: what is measured is not lost if the rest is cut off
        results[family] = found = figures(run_family(family))
        ms = [f"{' '.join(map(str, k))} {v:.3f}" for k, v in found.items() if isinstance(v, float)]
        if "died" in found:
            ms.append(f"the process died ({found['died']}): see what it prints with --family")
        print(f"{family}, ms by shape: {', '.join(ms)}", flush=True)
    print("\nms; in brackets how many times ours is faster\n")
    print("| B heads T d_qk/d_v | | ours | floor | " + " | ".join(families[1:]) + " |")
    print("|---|---|---|---|" + "---|" * len(families[1:]))
    for n, (B, H, T, K, V) in enumerate(SHAPES):
        rows = [("forward", "fw", 2), ("both", "fw+bw", 6)]
        rows += [(f"{name} replayed", f"{words}, as a CUDA graph", c) for name, words, c in rows]
        for name, words, tensors in rows:
            ours = results["ours"].get((n, name))
            if ours is None and name.endswith("replayed"):
                continue
            floor = B * H * T * (K + V) * 2 * tensors / bandwidth / 1e9
            peers = [cell(results[p].get((n, name)), ours) for p in families[1:]]
            share = f"{floor:.2f}" + (f" ({floor / ours:.0%})" if isinstance(ours, float) else "")
            row = [f"{B} {H} {T} {K}/{V}", words, cell(ours, None), share, *peers]
            print("| " + " | ".join(row) + " |", flush=True)
            peer = {p: results[p].get((n, name)) for p in families[1:]} | {"floor": floor}
            metric, *way = words.split(", ")
            case = ", ".join([f"mLSTM {B} {H} {T} {K}/{V}", *way])
            record.add(__file__, case, metric, "ms", {"triton": ours}, peer)


def copying(B, bandwidth):
    """ms to read and write the step's state once."""
    return 2 * 4 * B * 8 * 256 * 512 / 1e9 / bandwidth


def step_table(bandwidth):
    ours, theirs = (figures(run_family(f, steps=True)) for f in ("ours", "theirs"))
    print("\n| step, state 8x256x512, ms | ours | of the copy's bandwidth | mlstm_kernels |")
    print("|---|---|---|---|")
    for B in STEPS:
        ms = ours.get((B, "step"))
        share = "-"
        if isinstance(ms, float):
            share = f"{copying(B, bandwidth) / ms:.0%}"
        row = cell(ms, None), share, cell(theirs.get((B, "step")), ms)
        print(f"| B {B} | {' | '.join(row)} |", flush=True)
        peer = {"mlstm_kernels": theirs.get((B, "step")), "copy": copying(B, bandwidth)}
        record.add(__file__, f"mLSTM step, B {B}", "step", "ms", {"triton": ms}, peer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="errors,mlstm,step,slstm,model", help="parts, with commas"
    )
    parser.add_argument("--peers", default=",".join(FAMILIES[1:]), help="of the mLSTM, with commas")
    record.option(parser)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.family:
        if arguments.steps:
            measure_steps(arguments.family, arguments.warm)
        else:
            measure(arguments.family, arguments.warm, arguments.shapes)
        sys.exit()
    parts = arguments.only.split(",")
    families = ["ours", *arguments.peers.split(",")]
    warming = [run_family(f, warm=True) for f in families] if "mlstm" in parts else []
    if "step" in parts:
        warming += [run_family(f, warm=True, steps=True) for f in ("ours", "theirs")]
    if "errors" in parts:
        measure_errors()
    for process in warming:
        process.communicate()
    bandwidth = environment()
    if "mlstm" in parts:
        table(bandwidth, families)
    if "step" in parts:
        step_table(bandwidth)
    for part in ("slstm", "model"):  # each has a file of its own
        if part in parts:
            script = os.path.join(os.path.dirname(__file__), f"gpu_{part}.py")
            subprocess.run([sys.executable, script], check=False)
