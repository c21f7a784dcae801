"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs of keys and values, then the keys
again in any order at any place, each to be answered with its value. What a memory can hold.

python examples/associative_recall.py                       # 4, 8, 16 pairs, small: minutes
python examples/associative_recall.py --vocabulary 8192 --length 256 --pairs 16 --steps 12500 \\
    --batch 512 --seeds 3 --rates 1e-2 2e-3 5e-4            # the paper's third task
"""

import argparse
import csv
import itertools
import os
import pathlib
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--models", nargs="+", help="some of mlstm xlstm slstm lstm transformer")
parser.add_argument("--vocabulary", type=int, default=64)
parser.add_argument("--length", type=int, default=48, help="symbols of a string")
parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16], help="one run for each")
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--rates", type=float, nargs="+", default=[1e-2], help="learning rates, swept")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/associative_recall"))
args = parser.parse_args()
if 3 * max(args.pairs) > args.length or max(args.pairs) >= args.vocabulary // 2:
    parser.error("--pairs must be at most a third of --length, and less than half of --vocabulary")
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import common
import keras
import numpy as np
from keras import layers
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.models import xLSTMStack


def distinct(low, high, shape, rng):
    """Numbers all different within each row: what came up before in its row is drawn again."""
    found = rng.integers(low, high, shape)
    while True:
        order = found.argsort(1, kind="stable")
        same, again = np.diff(np.take_along_axis(found, order, 1)) == 0, np.zeros(shape, bool)
        np.put_along_axis(again, order[:, 1:], same, 1)
        if not again.any():
            return found
        found[again] = rng.integers(low, high, again.sum())


def generate(count, pairs, rng):
    """Strings, the places where a key is asked for, and the values to answer with."""
    half, length = args.vocabulary // 2, args.length
    keys = distinct(1, half, (count, pairs), rng)
    values = rng.integers(half, args.vocabulary, (count, pairs))
    x = np.zeros((count, length), "int32")
    x[:, 0 : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2] = keys, values
    places = rng.permuted(np.tile(np.arange(2 * pairs, length), (count, 1)), axis=1)[:, :pairs]
    np.put_along_axis(x, places, keys, 1)
    return (x, places.astype("int32")), values


class Strings(keras.utils.PyDataset):
    """Fresh strings for every step: a model cannot memorise them."""

    def __init__(self, pairs, seed):
        super().__init__()
        self.pairs, self.seed = pairs, seed

    def __len__(self):
        return args.steps

    def __getitem__(self, index):
        return generate(args.batch, self.pairs, np.random.default_rng((self.seed, index)))


def stack(pattern):
    return lambda x: xLSTMStack(x.shape[-1], 2, 2, pattern=pattern)(x)


def transformer(x):
    places = keras.ops.cumsum(keras.ops.ones_like(x[:, :, 0], dtype="int32"), axis=1) - 1
    x += layers.Embedding(args.length, x.shape[-1])(places)
    return common.transformer(x, blocks=2, heads=2)


MODELS = {  # and how wide beside --width, for parameters about equal
    "mlstm": (1, stack("1:0")), "xlstm": (1, stack("1:1")), "slstm": (1.25, stack("0:1")),
    "lstm": (1.25, common.lstm), "transformer": (1, transformer),
}  # fmt: skip


def train(name, pairs, seed, rate):
    keras.utils.set_random_seed(seed)
    factor, body = MODELS[name]
    width = round(args.width * factor / 4) * 4
    inputs = keras.Input((args.length,), dtype="int32")
    places = keras.Input((pairs,), dtype="int32")
    h = body(layers.Embedding(args.vocabulary, width)(inputs))
    h = keras.ops.take_along_axis(h, places[:, :, None], axis=1)  # all else is not asked for
    model = keras.Model((inputs, places), layers.Dense(args.vocabulary)(h), name=name)
    rate = CosineDecay(0.0, args.steps, warmup_target=rate, warmup_steps=args.steps // 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, 0.1, clipnorm=1.0), loss)
    model.fit(Strings(pairs, seed))
    x, y = generate(1000, pairs, np.random.default_rng(10**9))
    found = model.predict(x, batch_size=100, verbose=0).argmax(-1)
    return model.count_params(), np.mean(found == y)


args.out.mkdir(parents=True, exist_ok=True)
axis = Figure(figsize=(7, 4), layout="constrained").subplots()
for name, rate in itertools.product(args.models or MODELS, args.rates):
    curve = []
    for pairs in args.pairs:
        right = []
        for seed in range(args.seeds):
            start = time.time()
            print(f"{name}, {pairs} pairs, learning rate {rate}, seed {seed}", flush=True)
            parameters, accuracy = train(name, pairs, seed, rate)
            print(f"accuracy {accuracy:.3f}")
            right.append(accuracy)
            row = [name, parameters, args.vocabulary, args.length, pairs, rate, seed]
            with open(args.out / "results.csv", "a", newline="") as file:
                row += [round(accuracy, 4), args.steps, keras.backend.backend()]
                csv.writer(file).writerow([*row, round(time.time() - start)])
        curve.append(np.mean(right))
    label = f"{name}, {parameters:,} parameters, rate {rate}"
    axis.plot(args.pairs, curve, marker="o", label=label)
axis.set(xscale="log", xticks=args.pairs, xticklabels=args.pairs, ylim=(0, 1.05))
axis.set(xlabel=f"pairs in {args.length} symbols, {args.vocabulary} kinds", ylabel="accuracy")
axis.minorticks_off()
axis.legend()
axis.figure.savefig(args.out / f"recall_{args.vocabulary}_{args.length}.png", dpi=150)
print(f"wrote results.csv and the plot to {args.out}")
