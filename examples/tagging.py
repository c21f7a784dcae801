"""Which kind of token is each byte of Python source part of? A tag for every step.

What stands behind them tells the `i` of `if` from that of `index`. The text is Python's standard
library, tagged by its own `tokenize`.
"""

import argparse
import io
import keyword
import os
import pathlib
import sysconfig
import tokenize

MODELS = {  # (batch, steps, 64) to (batch, steps, features): one of these lines is all that differs
    "lstm": lambda: LSTM(96, return_sequences=True),
    "bidirectional-lstm": lambda: Bidirectional(LSTM(64, return_sequences=True)),
    "forward": lambda: xLSTMStack(64, 2, pattern="1:1"),
    "alternate": lambda: xLSTMStack(64, 2, pattern="1:1", direction="alternate"),
    "both": lambda: xLSTMStack(64, 2, pattern="1:1", direction="both"),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--model", choices=MODELS, default="alternate")
parser.add_argument("--files", type=int, default=50, help="of the library; every fifth held out")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--seeds", type=int, default=1)
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras.layers import LSTM, Bidirectional, Dense, Embedding

from keras_xlstm.models import xLSTMStack

TAGS = {"COMMENT": 1, "STRING": 2, "NUMBER": 3, "OP": 4, "NAME": 5, "KEYWORD": 6}  # 0: blanks


def tagged(path):
    """A file in windows of 128 bytes, zeros behind its end, and a tag for each byte."""
    source = path.read_bytes()
    x, y = np.frombuffer(source, "uint8").astype("int32"), np.zeros(len(source), "int32")
    lines = np.cumsum([0, *map(len, source.splitlines(keepends=True))])
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        name = tokenize.tok_name[token.type]
        name = "KEYWORD" if name == "NAME" and keyword.iskeyword(token.string) else name
        start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
        y[start:end] = TAGS.get("STRING" if "STRING" in name else name, 0)  # FSTRING_MIDDLE, too
    return [np.pad(part, (0, -len(part) % 128)).reshape(-1, 128) for part in (x, y)]


files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
files = [path for path in files if path.read_bytes().isascii()]
files = [tagged(path) for path in np.random.default_rng(0).permutation(files)[: args.files]]
parts = [file for n, file in enumerate(files) if n % 5], files[::5]
train, test = ([np.concatenate([file[n] for file in part]) for n in (0, 1)] for part in parts)
for seed in range(args.seeds):
    keras.utils.set_random_seed(seed)
    layers = [Embedding(128, 64, mask_zero=True), MODELS[args.model](), Dense(len(TAGS) + 1)]
    model = keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
    rate = keras.optimizers.schedules.CosineDecay(5e-3, args.epochs * -(-len(train[0]) // 32))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # leaves padding out
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(*train, 32, args.epochs)
    right = model.predict(test[0], 256).argmax(-1) == test[1]
    every, words = (right[of].mean() for of in (test[0] > 0, test[1] >= TAGS["NAME"]))
    print(f"{args.model}: {model.count_params():,} parameters, seed {seed}, ", end="")
    print(f"right: {every:.4f} of all bytes, {words:.4f} of those of names and keywords")
