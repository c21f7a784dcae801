"""Forecasts the columns of an hourly table, each from its 336 hours before: the mean, and the
tenths that few values should lie outside of.

python examples/forecasting.py    # data: pip install --no-deps autots==1.0.4, or
python examples/forecasting.py --csv ETTh1.csv --columns 1 2 3 4 5 6 7 --ahead 96
"""

import argparse
import csv
import importlib.util
import os
import pathlib
import zipfile

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--csv", help="a table with a header; motorway traffic and weather if left out")
parser.add_argument("--columns", type=int, nargs="+", default=[1, 4, 5], help="ETTh1 has 1 to 7")
parser.add_argument("--ahead", type=int, default=96, help="hours")
parser.add_argument("--layer", choices=["lstm", "slstm", "mlstm", "xlstm"], default="xlstm")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/forecasting"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras.layers import LSTM, Dense, Dropout, Reshape
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMStack

LAYERS = {  # (batch, days, 64) to the same: one of these lines is all that differs
    "lstm": lambda: LSTM(64, return_sequences=True),
    "slstm": lambda: sLSTM(64, num_heads=4, return_sequences=True),
    "mlstm": lambda: mLSTM(64, num_heads=4, return_sequences=True),
    "xlstm": lambda: xLSTMStack(64, num_blocks=1, slstm_at=[0], dropout=0.1),
}
keras.utils.set_random_seed(args.seed)
if args.csv is None:
    spec = importlib.util.find_spec("autots") or parser.error("pip install --no-deps autots==1.0.4")
    archive = f"{spec.submodule_search_locations[0]}/datasets/data/traffic_hourly.zip"
    args.csv = zipfile.ZipFile(archive).open("traffic_hourly.zip")
x = np.genfromtxt(args.csv, delimiter=",", skip_header=1, usecols=args.columns, max_rows=14400)
a, b = int(0.6 * len(x)), int(0.8 * len(x))  # 12 months to train, 4 to validate, 4 to test
x = np.nan_to_num((x - np.nanmean(x[:a], 0)) / np.nanstd(x[:a], 0)).astype("float32")
whole = 336 + args.ahead
x = np.lib.stride_tricks.sliding_window_view(x, whole, axis=0)
parts = x[: a - whole + 1], x[a - 336 : b - whole + 1], x[b - 336 :]  # columns by themselves
train, validation, (past, future) = (np.split(p.reshape(-1, whole), [336], 1) for p in parts)


def linear(x):
    """NLinear (arXiv 2205.13504): a linear map of the differences from the last value."""
    return Dense(args.ahead)(x - x[:, -1:]) + x[:, -1:]


def recurrent(x):
    """Quantile 0.1, mean and quantile 0.9, (batch, ahead, 3): of days, and a linear map beside."""
    mean, std = keras.ops.mean(x, 1, keepdims=True), keras.ops.std(x, 1, keepdims=True) + 0.01
    x = (x - mean) / std
    y = Dropout(0.3)(LAYERS[args.layer]()(Dense(64)(Reshape((14, 24))(x)))[:, -1])
    y = Reshape((args.ahead, 3))(Dense(3 * args.ahead)(y) + Dense(3 * args.ahead)(x))
    return y * std[:, :, None] + mean[:, :, None]


def loss(y, found):
    """Squares for the forecast, pinball losses for the quantiles beside it."""
    low, error, high = (y - found[:, :, j] for j in range(3))
    pinball = keras.ops.maximum(0.1 * low, -0.9 * low) + keras.ops.maximum(0.9 * high, -0.1 * high)
    return keras.ops.square(error) + pinball


def fitted(body, loss):
    inputs = keras.Input((336,))
    model = keras.Model(inputs, body(inputs))
    rate = CosineDecay(3e-3, args.epochs * -(-len(train[0]) // 256))
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss)
    model.fit(*train, batch_size=256, epochs=args.epochs, validation_data=validation)
    return model.predict(past, batch_size=256)


args.out.mkdir(parents=True, exist_ok=True)
found = fitted(recurrent, loss)
forecasts = {"repeat-last": past[:, -1:], "NLinear": fitted(linear, "mse")}
for name, y in {**forecasts, args.layer: found[:, :, 1]}.items():
    mse, mae = np.mean((y - future) ** 2), np.mean(abs(y - future))
    print(f"{name}: MSE {mse:.3f}, MAE {mae:.3f}")
    with open(args.out / "results.csv", "a", newline="") as file:
        row = [name, args.ahead, args.seed, args.epochs, round(float(mse), 4)]
        csv.writer(file).writerow([*row, round(float(mae), 4), keras.backend.backend()])
inside = np.mean((found[:, :, 0] <= future) & (future <= found[:, :, 2]))
print(f"between the outer quantiles, which should hold 0.80 of all: {inside:.2f}")
axis = Figure(figsize=(9, 3.5), layout="constrained").subplots()
axis.plot(range(-336, args.ahead), np.append(past[-1], future[-1]), color="gray", label="truth")
axis.plot(found[-1, :, 1], label=f"forecast, {args.layer}")
axis.fill_between(range(args.ahead), *found[-1, :, ::2].T, alpha=0.3, label="0.1 to 0.9")
axis.set(xlabel="hours from now", ylabel=f"column {args.columns[-1]}, z-score")
axis.figure.legend(loc="outside upper right", ncols=3)
axis.figure.savefig(args.out / "forecast.png", dpi=150)
