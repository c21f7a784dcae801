"""Finds the tiles of the mLSTM's Triton kernels, for backends/kernels/mlstm/tiles.py.

    python benchmarks/tune_torch.py 128 256 [--stages h,dq,dk,dv,states,reverse] [--heads 16]

Candidates compile in parallel processes first, which is not timed; then each runs alone. The table
lists the fastest first, and says of which two calls gave different bits: that is a miscompile. A
tuner has to reach below the public names; nothing else here does.
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "torch"
STAGES = ("h", "dq", "dk", "dv", "states", "reverse")
PROCESSES = max(1, (os.cpu_count() or 2) - 2)


def candidates(stage, K, V, chunk):
    """Tiles as kernels/mlstm/tiles.py gives them, without those that cannot fit."""
    from keras_xlstm.backends.kernels.mlstm.tiles import power

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
        options = itertools.product((64, 128), (16, 32, 64), (32, 64), (2, 3), (4, 8), (None, 168))
        for L, LN, BS, stages, warps, registers in options:
            within = 2 * (L * BX + stages * LN * (BX + BZ))
            fits = L <= chunk and 16 <= L * BZ // (32 * warps) <= 128
            # With the bound three programs of 4 warps fit a processor by registers.
            bound = {"maxnreg": registers} if registers else {}
            if fits and max(within, 2 * stages * BS * (L + BZ)) < (75_000 if bound else 220_000):
                tiles = {"L": L, "LN": LN, "BX": BX, "BZ": BZ, "BS": BS, "ST": stages}
                if warps == 4 or not bound:
                    found.append({**tiles, "num_warps": warps, **bound})
    return [{**tiles, "num_stages": tiles["ST"]} for tiles in found]


class Job:
    """One call's tensors, and a function per stage that launches it alone with given tiles."""

    def __init__(self, B, T, H, K, V, chunk):
        import torch
        from keras_xlstm.backends.torch import launch, mlstm_plan

        torch.manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.launches, self.chunk = mlstm_plan, chunk
        self.buffers, self.bytes = {}, torch.uint8
        q, k, v, dh = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V), random(B, T, H, V)
        i, f, h = random(B, T, H), random(B, T, H) + 3, torch.empty_like(v)
        last = [torch.empty(B, H, *s, device="cuda") for s in ((K, V), (K,), ())]
        # What calls write is kept from one to the next, so that a stage alone finds its inputs.
        launch.Parts.new = lambda parts, like: self.buffer(parts, like)
        self.forward = (q, k, v, i, f, None, None, None, None), (h, *last), 1e-6
        kept = self.buffer(mlstm_plan.kept(q, v, chunk), q)
        given = dh, None, None, q, k, v, i, f, None, h, kept
        self.backward = given, [torch.empty_like(t) for t in (q, k, v, i, f, *last[:2])]

    def buffer(self, parts, like):
        key = parts.size, len(parts.parts)
        if key not in self.buffers:
            self.buffers[key] = like.new_zeros(parts.size, dtype=self.bytes)
        return self.buffers[key]

    def run_all(self):
        self.launches.forward(self.forward[0], False, self.chunk)(None, *self.forward)
        self.launches.backward(self.backward[0], False, self.chunk)(None, *self.backward)

    def stage(self, stage, tiles, alone=None):
        """A function that launches it and returns what it writes; `alone` in place of the call."""
        back = stage in ("dq", "dk", "dv", "reverse")
        arguments = self.backward if back else self.forward
        common = self.launches.plan
        table, common.tiles = common.tiles, _Tiles(stage, tiles)
        kind = self.launches.backward if back else self.launches.forward
        plan = kind(arguments[0], False, self.chunk)
        common.tiles = table
        name = "first" if stage in ("states", "reverse") else stage
        for launch in plan.launches:
            if launch is not getattr(plan, name):
                launch.known, launch.values = (lambda *arguments, stream: None), []
            elif alone:
                launch._first = functools.partial(alone, launch)
        place = {"h": 0, "dq": 0, "dk": 1, "dv": 2}.get(stage)
        written = self.buffer(plan.own if back else plan.kept, arguments[0][0])
        written = written if place is None else arguments[1][place]

        def run():
            plan(None, *arguments)
            return written

        return run


class _Tiles:
    """Stands in for the table: `tiles` for a stage, the table's for others."""

    def __init__(self, stage, tiles):
        from keras_xlstm.backends.kernels.mlstm import tiles as table

        self.table, self.stage, self.tiles = table, stage, tiles

    def intra_chunk(self, role, *sizes, **options):
        return self.tiles if role == self.stage else self.table.intra_chunk(role, *sizes, **options)

    def chunk_states(self, *sizes, **options):
        own = self.stage in ("states", "reverse")
        return self.tiles if own else self.table.chunk_states(*sizes, **options)

    def hopper_intra_chunk(self, *sizes):
        return None  # what is tuned are the kernels for every GPU

    def hopper_fused(self, *sizes):
        return None


def compile_share(share, arguments):
    """Compiles every PROCESSES-th candidate into Triton's cache, on a small batch."""
    job = Job(1, 2 * arguments.chunk, arguments.heads, arguments.K, arguments.V, arguments.chunk)

    def warm(launch, stream, args):
        launch.kernel.warmup(*args, grid=(launch.programs,), **launch.constants)

    everything = [
        (stage, tiles)
        for stage in arguments.stages.split(",")
        for tiles in candidates(stage, arguments.K, arguments.V, arguments.chunk)
    ]
    for stage, tiles in everything[share::PROCESSES]:
        job.stage(stage, tiles, alone=warm)()


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
                run = job.stage(stage, tiles)
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
