"""Finds the tiles of the mLSTM's Triton kernels, for backends/kernels/mlstm/tiles.py.

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
    """One call's memory, and a function per stage that launches it alone with given tiles."""

    def __init__(self, B, T, H, K, V, chunk):
        import torch
        from keras_xlstm.backends.kernels.mlstm import plan
        from keras_xlstm.backends.torch import device

        torch.manual_seed(0)
        self.plans = plan
        where = torch.device("cuda", torch.cuda.current_device())
        self.device = device.of(where, torch.bfloat16)._replace(hopper=False)
        gates = "bfloat16", "bfloat16"
        self.call = plan.Call(B, T, H, K, V, "bfloat16", gates, False, False, chunk, 1e-6)
        # What steps write is kept from one to the next, so that a stage alone finds its inputs.
        self.memory = {}
        for back in (False, True):
            for buffer in self.plan(back).buffers:
                if buffer.name not in self.memory:
                    dtype = getattr(torch, buffer.dtype)
                    self.memory[buffer.name] = torch.randn(*buffer.shape, device=where).to(dtype)
        self.memory["f"] += 3

    def plan(self, back):
        if back:
            return self.plans.backward(self.device, self.call, False, True)
        return self.plans.forward(self.device, self.call, False, True, True)

    def bound(self, plan, steps):
        """A function that launches these steps of a plan in this memory."""
        from keras_xlstm.backends.kernels.plan import Plan
        from keras_xlstm.backends.torch import launch

        inputs = tuple(plan.buffers)
        run = launch.Bound(lambda aligned: Plan(inputs, (), (), (), tuple(steps)))
        tensors = [self.memory[b.name] for b in inputs]
        return lambda: run(*tensors)

    def run_all(self):
        for back in (False, True):
            plan = self.plan(back)
            self.bound(plan, plan.steps)()

    def stage(self, stage, tiles):
        """Its step with these tiles, its plan, and the tensor that it writes."""
        table, self.plans.tiles = self.plans.tiles, _Tiles(stage, tiles)
        try:
            plan = self.plan(stage in ("dq", "dk", "dv", "reverse"))
        finally:
            self.plans.tiles = table
        if stage in ("states", "reverse"):
            step = next(s for s in plan.steps if s.kernel.fn.__name__ == "chunk_states")
            return step, plan, self.memory[step.arguments["s_p"].name]
        step = next(s for s in plan.steps if s.constants.get("ROLE") == stage)
        return step, plan, self.memory[step.arguments["out_p"].name]


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

    from keras_xlstm.backends.torch import launch

    everything = [
        (stage, tiles)
        for stage in arguments.stages.split(",")
        for tiles in candidates(stage, arguments.K, arguments.V, arguments.chunk)
    ]
    for stage, tiles in everything[share::PROCESSES]:
        step, *_ = job.stage(stage, tiles)
        launch.compiled(step, lambda buffer: launch.StandIn(buffer, 16))


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
                step, plan, written = job.stage(stage, tiles)
                run = job.bound(plan, [step])
                found = []
                for _ in range(6):
                    run()
                    found.append(written.clone())
                same = all(torch.equal(x, found[0]) for x in found)
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
