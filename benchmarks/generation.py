"""Generation: time and memory of one more token after contexts of growing length; long texts.

    KERAS_BACKEND=jax python benchmarks/generation.py --contexts 100 1000 10000 100000
    KERAS_BACKEND=torch python benchmarks/generation.py --contexts 100 --jit-compile false true
    KERAS_BACKEND=jax python benchmarks/generation.py --contexts --tokens 100000

The carried state is all that a step reads of its past: its size is printed, and by how much the
peak memory of the process grows while it makes the tokens. Several ways of compiling take turns,
token by token, and are compared in what they say.
"""

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import record
from memory import peak, resident

from keras_xlstm.models import xLSTMLanguageModel

COMPILED = {"auto": "auto", "true": True, "false": False}


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def size(model):
    return f"{len(model.blocks)} blocks of {model.get_layer('embedding').embeddings.shape[-1]}"


def one_more_token(model, context, steps, ways):
    prompt = np.random.default_rng(0).integers(0, 256, context)
    streams, texts, times = {}, {}, {way: [] for way in ways}
    for way in ways:
        streams[way] = model.stream([prompt], steps + 4, 0, jit_compile=COMPILED[way])
        token, reading = timed(lambda way=way: next(streams[way]))
        first = [timed(lambda way=way: next(streams[way])) for _ in range(3)]
        texts[way] = [token, *(token for token, _ in first)]
        compiling = sum(seconds for _, seconds in first)
        print(
            f"{context:7,} tokens, {way:5}: read in {reading:6.1f} s, compiled in {compiling:.1f}"
        )
    before = peak()
    for _ in range(steps):
        for way in ways:
            token, seconds = timed(lambda way=way: next(streams[way]))
            texts[way].append(token)
            times[way].append(seconds * 1e3)
    grown = peak() - before
    case = f"{size(model)}, after {context:,} tokens"
    medians = {way: statistics.median(ms) for way, ms in times.items()}
    record.add(__file__, case, "one more token", "ms", medians)
    record.add(__file__, case, "memory grown", "MiB", {way: grown for way in ways[:1]})
    for way in ways:
        same = np.array_equal(texts[way], texts[ways[0]])
        print(
            f"{context:7,} tokens, {way:5}: {statistics.median(times[way]):6.2f} ms a token "
            f"(least {min(times[way]):.2f}); the same tokens: {same}"
        )
    print(f"{context:7,} tokens: peak memory grew by {grown:.1f} MiB in {steps} tokens", flush=True)


def long_text(model, count, to_stream):
    """A text of `to_stream` tokens by `stream`, and of `count` by `generate`: in flat memory, the
    same as far as both go."""
    streamed, start, part = [], time.perf_counter(), max(1, to_stream // 10)
    for index, token in enumerate(model.stream([[1, 2, 3]], to_stream, seed=0), 1):
        streamed.append(int(token[0]))
        if index % part == 0:
            seconds, start = time.perf_counter() - start, time.perf_counter()
            print(f"stream: {index:8,} tokens, {seconds:6.1f} s, {resident():7.1f} MiB", flush=True)
    for part in (count // 10, count):
        (text,), seconds = timed(lambda part=part: model.generate([[1, 2, 3]], part, seed=0))
        common = min(part, to_stream)
        same = text[3:][:common].tolist() == streamed[:common]
        print(
            f"generate: {part:6,} tokens, {seconds:6.1f} s, {resident():7.1f} MiB, at most "
            f"{peak():.1f}; the first {common:,} as streamed: {same}",
            flush=True,
        )
        case = f"{size(model)}, a text of {part:,} tokens"
        record.add(__file__, case, "resident memory", "MiB", {"generate": resident()})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="*", default=[100, 1000, 10000, 100000])
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jit-compile", choices=COMPILED, nargs="+", default=["auto"])
    parser.add_argument("--tokens", type=int, default=0, help="length of one long text")
    parser.add_argument("--streamed", type=int, help="of it, by stream too; all if left out")
    record.option(parser)
    args = parser.parse_args()
    backend = keras.backend.backend()
    print(
        f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, "
        f"keras {keras.__version__} on {backend}"
    )
    keras.utils.set_random_seed(0)
    model = xLSTMLanguageModel(256, args.units, args.blocks, pattern="1:1")
    state = sum(4 * np.prod(s.shape) for s in keras.tree.flatten(model.get_initial_state(1)))
    print(f"{model.count_params():,} parameters; a state of {state / 2**20:.2f} MiB")
    for context in args.contexts:
        one_more_token(model, context, args.steps, args.jit_compile)
    if args.tokens:
        long_text(model, args.tokens, args.tokens if args.streamed is None else args.streamed)


if __name__ == "__main__":
    main()
