"""Language models at equal parameters and tokens: LSTM, xLSTM, a Transformer, and xLSTM with parts
taken out. Bits per byte on held-out text, and far beyond the length trained on.

python examples/compare_language_models.py                    # Python's own source code, minutes
python examples/compare_language_models.py --text sotu/ --vocabulary 4096 --seeds 3
python examples/compare_language_models.py --text tfds:tiny_shakespeare --rates 1e-3 3e-3 1e-2
python examples/compare_language_models.py --models 1:0 no-convolution sigmoid-gate no-input-gate

The figure has every run with the same settings in --out: also those of other processes.
"""

import argparse
import csv
import itertools
import os
import pathlib
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--text", help="a file, a folder of .txt, or tfds:NAME; a tenth is held out")
parser.add_argument("--models", nargs="+", default=["lstm", "0:1", "1:0", "7:1", "transformer"])
parser.add_argument("--vocabulary", type=int, default=256, help="256: bytes; more: pieces (BPE)")
parser.add_argument("--parameters", type=int, default=492_000, help="of every model, nearly")
parser.add_argument("--blocks", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--far", type=int, default=2048, help="the length to read at the end")
parser.add_argument("--windows", type=int, default=128, help="of --length, to evaluate on")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--rates", type=float, nargs="+", default=[3e-3], help="seed 0 finds the best")
parser.add_argument("--dtype", default="float32", help="or mixed_bfloat16")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/compare"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import common
import keras
import numpy as np
from keras import layers
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.models import exclude_from_weight_decay, xLSTMLanguageModel

FREE = "backend", "models", "seeds", "rates", "out"  # may differ between runs of one figure
SETTINGS = ", ".join(f"{k} {v}" for k, v in vars(args).items() if k not in FREE)
EDGES = np.unique(np.geomspace(1, args.far, 14).astype(int)) - 1
PARTS = [(0, args.far), *itertools.pairwise(EDGES)]
PARTS_OUT = {"no-convolution": {"conv_kernel_size": 0}, "no-input-gate": {}}
PARTS_OUT["sigmoid-gate"] = {"input_gate": "sigmoid"}


def build(name, width):
    if name not in ("lstm", "transformer"):
        options = {"mlstm_options": PARTS_OUT[name]} if name in PARTS_OUT else {"pattern": name}
        model = xLSTMLanguageModel(args.vocabulary, width, args.blocks, num_heads=4, **options)
        for block in model.blocks if name == "no-input-gate" else []:
            block.input_gate.set_weights([np.zeros(w.shape) for w in block.input_gate.weights])
            block.input_gate.trainable = False  # exp(0) = 1
        return model
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(args.vocabulary, width)(inputs)
    if name == "transformer":
        x = common.transformer(common.Positions()(x), args.blocks, heads=4)
    else:
        for _ in range(args.blocks):  # in float32 always: cuDNN under JAX takes no bfloat16
            lstm = layers.LSTM(width, return_sequences=True, dtype="float32")
            x += lstm(layers.LayerNormalization()(x))
        x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(args.vocabulary, dtype="float32")(x))


def train(name, width, seed, rate):
    keras.config.set_dtype_policy(args.dtype)
    keras.utils.set_random_seed(seed)
    model = build(name, width)
    rate = CosineDecay(0.0, args.steps, 0.1, warmup_target=rate, warmup_steps=args.steps // 10)
    optimizer = keras.optimizers.AdamW(rate, 0.1, beta_2=0.95, clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(exclude_from_weight_decay(optimizer, model), loss)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(ids) - args.length, args.steps * args.batch)
    model.fit(*common.windows(ids, starts, args.length), batch_size=args.batch)
    return model


def bits_per_byte(model, length, count, parts):
    """Of each part, from one token to another, of windows all over the held-out text."""
    starts, losses = np.linspace(0, len(held_out) - length - 1, count), []
    x, y = common.windows(held_out, starts, length)
    for j in range(0, count, batch := max(1, 8192 // length)):
        logits = model.predict_on_batch(x[j : j + batch]).astype("float32")
        loss = keras.ops.sparse_categorical_crossentropy(y[j : j + batch], logits, True)
        losses.append(keras.ops.convert_to_numpy(loss))
    bits, size = np.concatenate(losses) / np.log(2), sizes[y]
    return [bits[:, a:b].sum() / size[:, a:b].sum() for a, b in parts]


def run(name, width, seed, rate):
    """Trains and evaluates, and writes that down; returns the bits per byte."""
    print(f"{name}, learning rate {rate}, seed {seed}", flush=True)
    start, model = time.time(), train(name, width, seed, rate)
    found = bits_per_byte(model, args.length, args.windows, [(0, args.length)])
    found += bits_per_byte(model, args.far, 16, PARTS)
    print(f"held out: {found[0]:.3f} bits per byte; {found[1]:.3f} over {args.far}")
    row = [name, model.count_params(), rate, seed, round(time.time() - start), SETTINGS]
    with open(args.out / "results.csv", "a", newline="") as file:
        csv.writer(file).writerow([*row, *(round(float(x), 4) for x in found)])
    return found[0]


def draw():
    """Each model at its best rate, as a mean over seeds."""
    runs, best = {}, {}
    with open(args.out / "results.csv", newline="") as file:
        for name, parameters, rate, seed, _, settings, *found in csv.reader(file):
            if settings == SETTINGS:
                label = f"{name}, {int(parameters):,}, rate {rate}"
                runs.setdefault((name, label), {})[seed] = [float(x) for x in found]
    for (name, label), seeds in runs.items():
        (near, far, *curve), (spread, *_) = (f([*seeds.values()], 0) for f in (np.mean, np.std))
        label += f": {near:.3f}" + f" ± {spread:.3f}" * (len(seeds) > 1) + f", seeds: {len(seeds)}"
        print(f"{label}; {far:.3f} over {args.far}")
        best[name] = min(best.get(name, (0,)), (-len(seeds), near, label, curve))
    axis = Figure(figsize=(7, 5), layout="constrained").subplots()
    for _, _, label, curve in best.values():
        axis.plot(EDGES[1:], curve, marker=".", label=label)
    axis.axvline(args.length, color="gray", linestyle=":")
    axis.set(xscale="log", xlabel="tokens read (dotted: trained on)", ylabel="bits per byte")
    axis.set_title(SETTINGS, fontsize="x-small", wrap=True)
    axis.legend(fontsize="small")
    axis.figure.savefig(args.out / "position.png", dpi=150)


args.out.mkdir(parents=True, exist_ok=True)
text = common.read_text(args.text, args.out / "data")
ids, held_out, sizes = common.tokenized(*text, args.vocabulary)
print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out")
if len(held_out) <= args.far:
    parser.error("--far must be shorter than the held-out text")
widths = {name: common.nearest_width(build, name, args.parameters) for name in args.models}
for name, width in widths.items():
    found = {rate: run(name, width, 0, rate) for rate in args.rates}
    for seed in range(1, args.seeds):
        run(name, width, seed, min(found, key=found.get))
draw()
print(f"wrote results.csv and position.png to {args.out}")
