"""Generation: time and memory of one more token after contexts of growing length.

    KERAS_BACKEND=jax python benchmarks/generation.py --contexts 100 1000 10000 100000

The carried state is all that a step reads of its past: its size is printed, and by how much the
peak memory of the process grows while it makes the tokens.
"""

import argparse
import os
import platform
import resource
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from keras_xlstm.models import xLSTMLanguageModel


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 1000, 10000, 100000])
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    backend = keras.backend.backend()
    print(
        f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, "
        f"keras {keras.__version__} on {backend}"
    )
    model = xLSTMLanguageModel(256, args.units, args.blocks, pattern="1:1")
    rng = np.random.default_rng(0)
    state = sum(4 * np.prod(s.shape) for s in keras.tree.flatten(model.get_initial_state(1)))
    for context in args.contexts:
        prompt = rng.integers(0, 256, context)
        start = time.perf_counter()
        stream = model.stream([prompt], args.steps + 2, temperature=0)
        next(stream)
        reading = time.perf_counter() - start
        next(stream)  # compiles
        times, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(args.steps):
            start = time.perf_counter()
            next(stream)
            times.append((time.perf_counter() - start) * 1e3)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        print(
            f"after {context:7,} tokens (read in {reading:6.1f} s): "
            f"{statistics.median(times):6.2f} ms a token; state {state / 2**20:.2f} MiB; "
            f"peak memory grew by {grown:.1f} MiB over {args.steps} tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
