"""Forecasts the columns of an hourly table 96 hours ahead, each from its 336 hours before.

python examples/forecasting.py    # data: pip install --no-deps autots==1.0.4, or --csv ETTh1.csv
"""

import argparse
import importlib.util
import os
import zipfile

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np
from keras.layers import LSTM, Dense, Dropout, Reshape
from matplotlib.figure import Figure

from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMStack

LAYERS = {  # (batch, days, 64) to the same: one of these lines is all that differs
    "lstm": lambda: LSTM(64, return_sequences=True),
    "slstm": lambda: sLSTM(64, num_heads=4, return_sequences=True),
    "mlstm": lambda: mLSTM(64, num_heads=4, return_sequences=True),
    "xlstm": lambda: xLSTMStack(64, num_blocks=1, slstm_at=[0], dropout=0.1),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--csv", help="a table with a header; motorway traffic and weather if left out")
parser.add_argument("--columns", type=int, nargs="+", default=[1, 4, 5], help="ETTh1 has 1 to 7")
parser.add_argument("--layer", choices=LAYERS, default="xlstm")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="forecast.png")
args = parser.parse_args()
keras.utils.set_random_seed(args.seed)
if args.csv is None:
    spec = importlib.util.find_spec("autots") or parser.error("pip install --no-deps autots==1.0.4")
    archive = f"{spec.submodule_search_locations[0]}/datasets/data/traffic_hourly.zip"
    args.csv = zipfile.ZipFile(archive).open("traffic_hourly.zip")
x = np.genfromtxt(args.csv, delimiter=",", skip_header=1, usecols=args.columns, max_rows=14400)
a, b = int(0.6 * len(x)), int(0.8 * len(x))  # 12 months to train, 4 to validate, 4 to test
x = np.nan_to_num((x - np.nanmean(x[:a], 0)) / np.nanstd(x[:a], 0)).astype("float32")
x = np.lib.stride_tricks.sliding_window_view(x, 336 + 96, axis=0)
parts = x[: a - 431], x[a - 336 : b - 431], x[b - 336 :]  # each column is a series by itself
train, validation, (past, future) = (np.split(p.reshape(-1, 432), [336], 1) for p in parts)
inputs = keras.Input((336,))
mean, std = keras.ops.mean(inputs, 1, keepdims=True), keras.ops.std(inputs, 1, keepdims=True) + 0.01
y = LAYERS[args.layer]()(Dense(64)(Reshape((14, 24))((inputs - mean) / std)))[:, -1]
model = keras.Model(inputs, Dense(96)(Dropout(0.2)(y)) * std + mean)
rate = keras.optimizers.schedules.CosineDecay(3e-3, args.epochs * -(-len(train[0]) // 256))
model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), "mse")
model.fit(*train, batch_size=256, epochs=args.epochs, validation_data=validation)
for name, y in ("repeat-last", past[:, -1:]), (args.layer, model.predict(past, batch_size=256)):
    print(f"{name}: MSE {np.mean((y - future) ** 2):.3f}, MAE {np.mean(abs(y - future)):.3f}")
axis = Figure(figsize=(9, 3.5), layout="constrained").subplots()
axis.plot(range(-336, 96), np.append(past[-1], future[-1]), color="gray", label="truth")
axis.plot(range(96), y[-1], label=f"forecast, {args.layer}")
axis.set(xlabel="hours from now", ylabel=f"column {args.columns[-1]}, z-score")
axis.figure.legend(loc="outside upper right", ncols=2)
axis.figure.savefig(args.out, dpi=150)
