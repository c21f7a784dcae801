"""Which of nine speakers is it? Japanese vowels, as series of 12 channels and 7 to 29 steps.

The data, JapaneseVowels, come with `pip install --no-deps aeon==1.6.0`.
"""

import argparse
import importlib.util
import os
import pathlib

LAYERS = {  # (batch, steps, channels) to (batch, features): one of these lines is all that differs
    "lstm": lambda: [LSTM(64, dropout=0.1)],
    "slstm": lambda: [sLSTM(64, num_heads=4, dropout=0.1)],
    "mlstm": lambda: [mLSTM(64, num_heads=4, dropout=0.1)],
    "bidirectional": lambda: [Bidirectional(sLSTM(64, num_heads=4, dropout=0.1))],
    "xlstm": lambda: [Dense(64), xLSTMStack(64, 2, pattern="1:1"), GlobalAveragePooling1D()],
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--layer", choices=LAYERS, default="slstm")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/classification"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras.layers import LSTM, Bidirectional, Dense, Dropout, GlobalAveragePooling1D, Masking
from matplotlib.figure import Figure

from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMStack

aeon = importlib.util.find_spec("aeon") or parser.error("pip install --no-deps aeon==1.6.0")
parts = []  # series (batch, 29, 12), NaN after their ends, and speakers (batch,), 0 to 8
for name in ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"):
    path = pathlib.Path(aeon.origin).parent / "datasets/data/JapaneseVowels" / name
    rows = [line.split(":") for line in path.read_text().split("@data\n")[1].splitlines()]
    x = [np.array([channel.split(",") for channel in row[:-1]], "float32").T for row in rows]
    x = keras.utils.pad_sequences(x, 29, "float32", padding="post", value=np.nan)
    parts.append((x, np.array([int(row[-1]) - 1 for row in rows])))
mean, std = (f(parts[0][0], (0, 1)) for f in (np.nanmean, np.nanstd))
train, test = ((np.nan_to_num((x - mean) / std, nan=-99.0), y) for x, y in parts)
args.out.mkdir(parents=True, exist_ok=True)
axis = Figure().subplots(subplot_kw={"xlabel": "epoch", "ylabel": "test accuracy"})
for seed in range(args.seeds):
    keras.utils.set_random_seed(seed)
    body = LAYERS[args.layer]()
    model = keras.Sequential([Masking(-99.0), *body, Dropout(0.3), Dense(9, "softmax")])
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-3, 9 * args.epochs))
    model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"])
    reached = model.fit(*train, 32, args.epochs, validation_data=test).history["val_accuracy"]
    row = args.layer, model.count_params(), seed, args.epochs, f"{reached[-1]:.4f}"
    with open(args.out / "results.csv", "a") as file:
        print(*row, keras.backend.backend(), sep=",", file=file)
    print(f"{args.layer}: {row[1]:,} parameters, seed {seed}, test accuracy {row[-1]}")
    axis.plot(reached)
axis.figure.savefig(args.out / f"{args.layer}.png", dpi=150)
