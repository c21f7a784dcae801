"""Which of nine speakers said it? Japanese vowels, as series of 12 channels and 7 to 29 steps.

pip install --no-deps aeon==1.6.0    # brings the data, JapaneseVowels
python examples/classification.py --layer slstm --seeds 5
"""

import argparse
import csv
import importlib.util
import os
import pathlib

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--layer", choices=["lstm", "slstm", "mlstm", "xlstm"], default="slstm")
parser.add_argument("--bidirectional", action="store_true", help="read from both ends")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/classification"))
args = parser.parse_args()
if args.bidirectional and args.layer == "xlstm":
    parser.error("--bidirectional wraps one layer: lstm, slstm or mlstm")
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras.layers import LSTM, Bidirectional, Dense, Dropout, GlobalAveragePooling1D, Masking
from matplotlib.figure import Figure

from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMStack


def read(split):
    """The series, each (steps, channels), and their speakers, 0 to 8."""
    aeon = importlib.util.find_spec("aeon") or parser.error(
        "run: pip install --no-deps aeon==1.6.0"
    )
    name = f"datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts"
    lines = (pathlib.Path(aeon.origin).parent / name).read_text().split("@data\n")[1].splitlines()
    channels, labels = zip(*(line.rsplit(":", 1) for line in lines), strict=True)
    series = [np.array([c.split(",") for c in x.split(":")], "float32").T for x in channels]
    return series, np.array(labels, "int32") - 1


LAYERS = {  # (batch, steps, channels) to (batch, features): one of these lines is all that differs
    "lstm": lambda: [LSTM(64, dropout=0.1)],
    "slstm": lambda: [sLSTM(64, num_heads=4, dropout=0.1)],
    "mlstm": lambda: [mLSTM(64, num_heads=4, dropout=0.1)],
    "xlstm": lambda: [Dense(64), xLSTMStack(64, 2, pattern="1:1"), GlobalAveragePooling1D()],
}
(x, y), (x_test, y_test) = read("TRAIN"), read("TEST")
mean, std = np.concatenate(x).mean(0), np.concatenate(x).std(0)
x, x_test = ([(series - mean) / std for series in part] for part in (x, x_test))
x, x_test = (keras.utils.pad_sequences(p, 29, "float32", "post", value=-99) for p in (x, x_test))
args.out.mkdir(parents=True, exist_ok=True)
axis, reached = Figure(figsize=(6, 4), layout="constrained").subplots(), []
name = f"bidirectional {args.layer}" if args.bidirectional else args.layer
for seed in range(args.seeds):
    keras.utils.set_random_seed(seed)
    body = LAYERS[args.layer]()
    body = [Bidirectional(*body)] if args.bidirectional else body
    model = keras.Sequential([Masking(-99.0), *body, Dropout(0.3), Dense(9, activation="softmax")])
    rate = keras.optimizers.schedules.CosineDecay(5e-3, 9 * args.epochs)
    optimizer = keras.optimizers.Adam(rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, y, batch_size=32, epochs=args.epochs, validation_data=(x_test, y_test))
    axis.plot(range(1, args.epochs + 1), history.history["val_accuracy"], label=f"seed {seed}")
    reached.append(history.history["val_accuracy"][-1])
    with open(args.out / "results.csv", "a", newline="") as file:
        row = [name, model.count_params(), seed, args.epochs, round(reached[-1], 4)]
        csv.writer(file).writerow([*row, keras.backend.backend()])
print(f"{name}: {model.count_params():,} parameters, test accuracy", *(f"{a:.3f}" for a in reached))
axis.set(xlabel="epoch", ylabel="test accuracy", title=f"JapaneseVowels, {name}", ylim=(0.5, 1))
axis.legend()
axis.figure.savefig(args.out / f"{name.replace(' ', '_')}.png", dpi=150)
