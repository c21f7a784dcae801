"""State tracking: parity, and arithmetic modulo 5 without brackets, read far beyond the lengths
trained on. Labels are the answers so far, at every symbol.

python examples/state_tracking.py                             # parity, 5 models, minutes
python examples/state_tracking.py --task modular --steps 16000 --batch 256 --forget-bias -2
"""

import argparse
import csv
import itertools
import os
import pathlib
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--task", choices=["parity", "modular"], default="parity")
parser.add_argument("--models", nargs="+", help="some of slstm mlstm xlstm lstm transformer")
for option, value in (("--steps", 1500), ("--batch", 128), ("--seeds", 1)):
    parser.add_argument(option, type=int, default=value)
parser.add_argument("--rates", type=float, nargs="+", default=[3e-3], help="learning rates, swept")
parser.add_argument("--forget-bias", type=float, help="of sLSTMs at first, for the power law")
parser.add_argument("--long", type=int, default=2048, help="the longest strings")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/state_tracking"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import common
import keras
import numpy as np
import tensorflow_datasets as tfds
from keras import layers
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.models import xLSTMStack

TASKS = {"parity": (2, 2, 20_000), "modular": (8, 5, 100_000)}  # symbols, answers, strings
SYMBOLS, CLASSES, STRINGS = TASKS[args.task]
STRINGS = min(STRINGS, args.steps * args.batch)


def generate(task, length, rng):
    """Symbols (modular: 0 to 4, then + - *), and after each the answer so far (-1: none)."""
    if task == "parity":
        symbols = rng.integers(0, 2, length)
        return symbols, symbols.cumsum() % 2
    symbols = rng.integers(0, 5, length)
    symbols[1::2] = rng.integers(5, 8, length // 2)
    answers, total, product = np.full(length, -1), 0, symbols[0]
    for j in range(0, length, 2):  # products bind closer: the last one is still open
        if j and symbols[j - 1] == 7:
            product = product * symbols[j] % 5
        elif j:
            total, product = total + product, symbols[j] * (-1 if symbols[j - 1] == 6 else 1)
        answers[j] = (total + product) % 5
    return symbols, answers


class Languages(tfds.core.GeneratorBasedBuilder):
    """Strings with the answers along them, to train on, and longer ones to test."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in TASKS]  # noqa: RUF012

    def _info(self):
        sequence = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = tfds.features.FeaturesDict({"symbols": sequence, "answers": sequence})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        sizes = {"train": (STRINGS, 3, 40), "test": (1_000, 40, 256), "long": (100, 2048, 2048)}
        return {name: self._generate_examples(*size) for name, size in sizes.items()}

    def _generate_examples(self, count, shortest, longest):
        rng, task = np.random.default_rng(longest), self.builder_config.name
        for key in range(count):
            length = rng.integers(shortest, longest + 1)
            length -= length % 2 == 0 and task == "modular"  # it ends in a number
            symbols, answers = (x.astype("int32") for x in generate(task, length, rng))
            yield key, {"symbols": symbols, "answers": answers}


def read(split, longest):
    folder = args.out / "data" / str(STRINGS)
    builder = Languages(config=args.task, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    source, pad = builder.as_data_source(split), keras.utils.pad_sequences
    x = pad([e["symbols"][:longest] for e in source], longest, padding="post")
    return x, pad([e["answers"][:longest] for e in source], longest, padding="post", value=-1)


bias = "power_law" if args.forget_bias is None else keras.initializers.Constant(args.forget_bias)
PLAIN = {"slstm_options": {"conv_kernel_size": 0, "forget_gate_bias_initializer": bias}}
MODELS = {  # 31,500 to 35,800 parameters each; sLSTMs without the convolution, as in the paper
    "slstm": (44, lambda x: xLSTMStack(44, 2, 2, pattern="0:1", **PLAIN)(x)),
    "mlstm": (36, lambda x: xLSTMStack(36, 2, 2, pattern="1:0")(x)),
    "xlstm": (38, lambda x: xLSTMStack(38, 2, 2, pattern="1:1", **PLAIN)(x)),
    "lstm": (44, common.lstm), "transformer": (36, lambda x: common.transformer(x, 2, 2)),
}  # fmt: skip


def train(name, seed, rate, x, y):
    keras.utils.set_random_seed(seed)
    (width, body), inputs = MODELS[name], keras.Input((None,), dtype="int32")
    h = body(layers.Embedding(SYMBOLS, width)(inputs))
    model = keras.Model(inputs, layers.Dense(CLASSES)(h))
    rate = CosineDecay(0.0, args.steps, warmup_target=rate, warmup_steps=args.steps // 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model.compile(keras.optimizers.AdamW(rate, 0.1, beta_2=0.99, clipnorm=1.0), loss)
    epochs = -(-args.steps * args.batch // len(x))
    model.fit(x, y, args.batch, epochs, steps_per_epoch=args.steps // epochs)
    return model


def scaled(right):
    """(accuracy - chance) / (1 - chance), leaving out what has no answer."""
    return (np.nanmean(right) * CLASSES - 1) / (CLASSES - 1)


def evaluate(model, x, y):
    """Whether each answer is right (NaN: there is none); scaled accuracy of the last answers."""
    right = np.where(y < 0, np.nan, model.predict(x, batch_size=50, verbose=0).argmax(-1) == y)
    return right, scaled([row[row >= 0][-1] for row in right])


data = {split: read(split, n) for split, n in (("train", 40), ("test", 256), ("long", args.long))}
axis = Figure(figsize=(7, 4), layout="constrained").subplots()
edges = np.unique(np.geomspace(2, args.long, 20).astype(int) // 2 * 2)
for name, rate in itertools.product(args.models or MODELS, args.rates):
    curves = []
    for seed in range(args.seeds):
        print(f"{name}, learning rate {rate}, seed {seed}", flush=True)
        start, model = time.time(), train(name, seed, rate, *data["train"])
        _, test = evaluate(model, *data["test"])
        right, long = evaluate(model, *data["long"])
        curves.append([scaled(right[:, a:b]) for a, b in itertools.pairwise(edges)])
        print(f"scaled accuracy: {test:.3f} at 40 to 256, {long:.3f} at {args.long}")
        row = [args.task, name, model.count_params(), rate, seed, round(test, 4), round(long, 4)]
        row += [args.steps, keras.backend.backend(), round(time.time() - start)]
        with open(args.out / "results.csv", "a", newline="") as file:
            csv.writer(file).writerow(row)
    axis.plot(edges[1:], np.mean(curves, 0), marker=".", label=f"{name}, rate {rate}")
axis.axvline(40, color="gray", linestyle=":")
axis.set(xscale="log", xlabel="symbols read (trained on 3 to 40)", ylabel="scaled accuracy")
axis.set(title=f"{args.task}: answers along strings of {args.long} symbols", ylim=(-0.1, 1.05))
axis.legend()
axis.figure.savefig(args.out / f"{args.task}.png", dpi=150)
print(f"wrote results.csv and {args.task}.png to {args.out}")
