"""Language models at equal parameters and tokens: LSTM, xLSTM, a Transformer, and xLSTM with parts
taken out. Bits per byte on held-out text, and far beyond the length trained on.

python examples/compare_language_models.py                    # Python's own source code, minutes
python examples/compare_language_models.py --text sotu/ --vocabulary 4096 --seeds 3
python examples/compare_language_models.py --models 1:0 no-convolution sigmoid-gate no-input-gate
"""

import argparse
import csv
import itertools
import os
import pathlib
import sysconfig
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--text", help="a file, or a folder of .txt; every tenth is held out")
parser.add_argument("--models", nargs="+", default=["lstm", "0:1", "1:0", "7:1", "transformer"])
parser.add_argument("--vocabulary", type=int, default=256, help="256: bytes; more: pieces (BPE)")
parser.add_argument("--parameters", type=int, default=500_000, help="of every model, about")
parser.add_argument("--blocks", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--far", type=int, default=2048, help="the length to read at the end")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--rates", type=float, nargs="+", default=[3e-3], help="learning rates, swept")
parser.add_argument("--dtype", default="float32", help="or mixed_bfloat16")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/compare"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.models import exclude_from_weight_decay, xLSTMLanguageModel

FUSED = "auto" if args.dtype == "float32" else False  # cuDNN under JAX takes no bfloat16
PARTS_OUT = {
    "no-convolution": {"conv_kernel_size": 0}, "sigmoid-gate": {"input_gate": "sigmoid"},
    "no-input-gate": {},
}  # fmt: skip


def read():
    """Bytes to train on, and held-out ones."""
    root = pathlib.Path(args.text or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        text = root.read_bytes()
        return text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    found = sorted(root.rglob("*.txt" if args.text else "*.py"))
    skip = set() if args.text else {"test", "tests", "idle_test", "site-packages"}
    texts = [p.read_bytes() for p in found if not skip & set(p.relative_to(root).parts)]
    if len(texts) < 10:
        parser.error(f"--text must be a file or hold ten .txt files or more, not {root}")
    return b"\n\n".join(t for n, t in enumerate(texts) if n % 10), b"\n\n".join(texts[::10])


def tokenized(train, held_out):
    """Token ids of both, and the bytes of a held-out token on average."""
    if args.vocabulary == 256:
        return np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), 1.0
    import tokenizers  # pip install tokenizers

    pieces = tokenizers.ByteLevelBPETokenizer()
    train, held_out = (x.decode("utf-8", "replace") for x in (train, held_out))
    pieces.train_from_iterator(train.splitlines(True), args.vocabulary, show_progress=True)
    ids = [np.array(pieces.encode(x).ids, np.uint16) for x in (train, held_out)]
    return *ids, len(held_out.encode()) / len(ids[1])


def windows(ids, starts, length):
    """Tokens from the places in `starts` on, and those that follow them."""
    window = ids[starts.astype(int)[:, None] + np.arange(length + 1)].astype("int32")
    return window[:, :-1], window[:, 1:]


class Positions(layers.Layer):
    def call(self, x):
        rates = 10_000.0 ** -keras.ops.linspace(0.0, 1.0, x.shape[-1] // 2)
        angle = keras.ops.arange(keras.ops.shape(x)[1], dtype="float32")[:, None] * rates
        waves = keras.ops.concatenate([keras.ops.sin(angle), keras.ops.cos(angle)], -1)
        return x + keras.ops.cast(0.05 * waves, x.dtype)  # of the size of the embeddings


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
    x = Positions()(x) if name == "transformer" else x
    for _ in range(args.blocks):
        y = layers.LayerNormalization()(x)
        if name == "lstm":
            x += layers.LSTM(width, return_sequences=True, use_cudnn=FUSED)(y)
        else:
            x += layers.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=True)
            y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
            x += layers.Dense(width)(y)
    logits = layers.Dense(args.vocabulary, dtype="float32")(layers.LayerNormalization()(x))
    return keras.Model(inputs, logits)


def sized(name):
    """The width, a multiple of 32, whose model has about as many parameters as asked for."""
    counts, width = {}, 64
    while width not in counts:
        counts[width] = build(name, width).count_params()
        width = max(1, round(width * (args.parameters / counts[width]) ** 0.5 / 32)) * 32
    return min(counts, key=lambda w: abs(np.log(counts[w] / args.parameters)))


def train(name, width, seed, rate, ids):
    keras.utils.set_random_seed(seed)
    model = build(name, width)
    rate = CosineDecay(0.0, args.steps, 0.1, warmup_target=rate, warmup_steps=args.steps // 10)
    optimizer = keras.optimizers.AdamW(rate, 0.1, beta_2=0.95, clipnorm=1.0)
    if isinstance(model, xLSTMLanguageModel):
        optimizer = exclude_from_weight_decay(optimizer, model)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(ids) - args.length, args.steps * args.batch)
    model.fit(*windows(ids, starts, args.length), batch_size=args.batch)
    return model


def bits(model, ids, length, count):
    """Bits of each token in `count` windows of the text, (count, length)."""
    x, y = windows(ids, np.linspace(0, len(ids) - length - 1, count), length)
    losses = []
    for j in range(0, count, batch := max(1, 8192 // length)):
        logits = model.predict_on_batch(x[j : j + batch]).astype("float32")
        loss = keras.ops.sparse_categorical_crossentropy(y[j : j + batch], logits, True)
        losses.append(keras.ops.convert_to_numpy(loss))
    return np.concatenate(losses) / np.log(2)


keras.config.set_dtype_policy(args.dtype)
args.out.mkdir(parents=True, exist_ok=True)
ids, held_out, size = tokenized(*read())
print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out, {size:.2f} bytes each")
axis = Figure(figsize=(7, 4), layout="constrained").subplots()
edges = np.unique(np.geomspace(1, args.far, 14).astype(int)) - 1
for name, rate in itertools.product(args.models, args.rates):
    near, far, width = [], [], sized(name)
    for seed in range(args.seeds):
        start = time.time()
        print(f"{name}, width {width}, learning rate {rate}, seed {seed}", flush=True)
        model = train(name, width, seed, rate, ids)
        near.append(bits(model, held_out, args.length, 128).mean() / size)
        far.append(bits(model, held_out, args.far, 8).mean(0) / size)
        print(f"held out: {near[-1]:.3f} bits per byte; {far[-1].mean():.3f} over {args.far}")
        row = [name, model.count_params(), args.vocabulary, args.length, rate, seed, args.steps]
        row += [round(float(near[-1]), 4), round(float(far[-1].mean()), 4)]
        with open(args.out / "results.csv", "a", newline="") as file:
            csv.writer(file).writerow([*row, round(time.time() - start)])
    curve = [np.mean(far, 0)[a:b].mean() for a, b in itertools.pairwise(edges)]
    label = f"{name}, {model.count_params():,}, rate {rate}: {np.mean(near):.3f}"
    axis.plot(edges[1:], curve, marker=".", label=f"{label} ± {np.std(near):.3f}")
axis.axvline(args.length, color="gray", linestyle=":")
axis.set(xscale="log", xlabel="tokens read (dotted: trained on)", ylabel="bits per byte, held out")
axis.legend()
axis.figure.savefig(args.out / "position.png", dpi=150)
print(f"wrote results.csv and position.png to {args.out}")
