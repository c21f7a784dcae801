"""Finds the tiles of the mLSTM's Triton kernels, for backends/mlstm_tiles.py.

    python benchmarks/tune_torch.py 128 256 [--stages h,dq,dk,dv,states,reverse] [--heads 16]

Candidates compile in parallel processes first, which is not timed; then each runs alone. The table
lists the fastest first, and says of which two calls gave different bits: that is a miscompile. A
tuner has to reach below the public names; nothing else here does.
"""

import argparse
import itertools
import os
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "torch"
STAGES = ("h", "dq", "dk", "dv", "states", "reverse")
PROCESSES = max(1, (os.cpu_count() or 2) - 2)


def candidates(stage, K, V, chunk):
    """Tiles as mlstm_tiles.py gives them, without those that cannot fit."""
    from keras_xlstm.backends.mlstm_tiles import power

    K, V = power(K), power(V)
    found = []
    if stage in ("states", "reverse"):
        options = itertools.product((64, 128), (64, 128, 256), (32, 64), (2, 3, 4), (4, 8))
        for BX, BZ, L, stages, warps in options:
            fits = BX <= K and BZ <= V and 32 <= BX * BZ // (32 * warps) <= 128
            if fits and 2 * stages * L * (BX + BZ) < 220_000:
                found.append({"BX": BX, "BZ": BZ, "L": L, "ST": stages, "num_warps": warps})
    else:
        DX, BZ = (K, min(V, 256)) if stage in ("h", "dv") else (V, K)
        BX = min(DX, 256)
        options = itertools.product((64, 128), (32, 64), (32, 64), (2, 3), (4, 8))
        for L, LN, BS, stages, warps in options:
            within = 2 * (L * BX + stages * LN * (BX + BZ))
            fits = L <= chunk and 16 <= L * BZ // (32 * warps) <= 128
            if fits and max(within, 2 * stages * BS * (L + BZ)) < 220_000:
                tiles = {"L": L, "LN": LN, "BX": BX, "BZ": BZ, "BS": BS, "ST": stages}
                found.append({**tiles, "num_warps": warps})
    return [{**tiles, "num_stages": tiles["ST"]} for tiles in found]


class Job:
    """One call's tensors, and a function per stage that launches it with given tiles."""

    def __init__(self, B, T, H, K, V, chunk):
        import torch
        from keras_xlstm.backends.torch import mlstm

        torch.manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.mlstm = mlstm
        self.q, self.k = random(B, T, H, K), random(B, T, H, K)
        self.v, self.dh = random(B, T, H, V), random(B, T, H, V)
        self.i, self.f = random(B, T, H), random(B, T, H) + 3
        self.sizes = mlstm._Sizes(self.q, self.v, chunk, None)
        self.buffers = mlstm._outputs(self.q, self.v, chunk, True)
        self.other = torch.randn(3, *self.buffers[4].shape[1:], device="cuda") * 0.01
        s = self.sizes
        self.dS = random(s.BH, s.NC, K, V) * 0.1
        self.dn = torch.randn(s.BH, s.NC, K, device="cuda")
        self.inner = torch.empty(s.BH, s.NC, 4096, device="cuda")
        self.chunk = chunk

    def run_all(self):
        arguments = (self.q, self.k, self.v, self.i, self.f, None, None, None, None)
        self.buffers = self.mlstm._forward(*arguments, False, 1e-6, self.chunk, True)

    def launch(self, stage, tiles):
        q, k, v, dh, s = self.q, self.k, self.v, self.dh, self.sizes
        h, C, n, _, vectors, chunks, m, through, S, N = self.buffers
        u, u_rest, row, row_rest, sign = vectors
        rho, *_ = other = self.other
        rows, cols, common = (row, row_rest), (u, u_rest), (None, m, chunks)
        reverse = (None, None, rho, *common, cols, rows)
        self.mlstm.tiles.attend = lambda *_: tiles
        if stage == "h":
            s.attend(
                "h", q, k, v, S, N, h, None, None, None, sign, None, *common, rows, cols, other
            )
            return h
        if stage == "dq":
            s.attend("dq", dh, v, k, S, N, dq := torch_like(q), q, rho, h, sign, rho, *common,
                     rows, cols)  # fmt: skip
            return dq
        if stage == "dk":
            s.attend("dk", v, dh, q, self.dS, self.dn, dk := torch_like(k), k, rho, *reverse)
            return dk
        if stage == "dv":
            s.attend("dv", k, q, dh, self.dS, self.dn, dv := torch_like(v), None, None, *reverse)
            return dv
        s.state_tiles = tiles
        s.parts = -(-s.K // tiles["BX"]) * -(-s.V // tiles["BZ"])
        s.serial = True
        common = (None, chunks, m, through)
        if stage == "states":
            s.states(False, k, v, u, u_rest, None, *common, S, N, (None, None), (C, n))
            return S
        last = (torch_like(C), torch_like(n))
        new = (self.dS, self.dn, (None, None), last, (S, N), self.inner)
        s.states(True, q, dh, row, row_rest, rho, *common, *new)
        return self.dS


def torch_like(x):
    import torch

    return torch.empty_like(x)


def compile_share(share, arguments):
    """Compiles every PROCESSES-th candidate into Triton's cache, on a small batch."""
    job = Job(1, 2 * arguments.chunk, arguments.heads, arguments.K, arguments.V, arguments.chunk)

    def warm(kernel, programs, *args, **constants):
        kernel.warmup(*args, grid=(programs,), **constants)

    job.mlstm.launch = warm
    everything = [
        (stage, tiles)
        for stage in arguments.stages.split(",")
        for tiles in candidates(stage, arguments.K, arguments.V, arguments.chunk)
    ]
    for stage, tiles in everything[share::PROCESSES]:
        job.launch(stage, tiles)


def main(arguments):
    import torch
    from triton.testing import do_bench

    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--share", str(n)], stderr=subprocess.DEVNULL
        )
        for n in range(PROCESSES)
    ]
    for worker in workers:
        worker.wait()
    sizes = (arguments.batch, arguments.length, arguments.heads, arguments.K, arguments.V)
    job = Job(*sizes, arguments.chunk)
    job.run_all()
    for stage in arguments.stages.split(","):
        times = []
        for tiles in candidates(stage, arguments.K, arguments.V, arguments.chunk):
            try:

                def run(stage=stage, tiles=tiles):
                    return job.launch(stage, tiles)

                first = run().clone()
                same = all(torch.equal(run(), first) for _ in range(5))
                ms = do_bench(run, warmup=3, rep=10, return_mode="median")
                times.append((ms, tiles if same else f"other bits at every call: {tiles}"))
            except Exception as e:  # noqa: BLE001  tiles that do not fit are part of the search
                times.append((float("inf"), f"{type(e).__name__} {tiles}"))
        print(f"{stage}, {arguments.K}/{arguments.V}, chunk {arguments.chunk}")
        for ms, tiles in sorted(times, key=lambda t: t[0]):
            print(f"  {ms:8.3f} ms  {tiles}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("K", type=int, help="query and key dimensions of a head")
    parser.add_argument("V", type=int, help="value dimensions of a head")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is None:
        main(arguments)
    else:
        compile_share(arguments.share, arguments)
