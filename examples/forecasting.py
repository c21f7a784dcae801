"""Forecasts the columns of an hourly table, each from its 336 hours before, with the range that
holds 80 of 100 values; and the last window, rolled beyond the horizon.

python examples/forecasting.py    # data: pip install --no-deps autots==1.0.4, or
python examples/forecasting.py --csv ETTh1.csv --columns 1 2 3 4 5 6 7 --ahead 96
"""

import argparse
import importlib.util
import os
import pathlib
import zipfile

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--csv", help="a table with a header; motorway traffic and weather if left out")
parser.add_argument("--columns", type=int, nargs="+", default=[1, 4, 5], help="ETTh1 has 1 to 7")
parser.add_argument("--ahead", type=int, default=96, help="hours")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/forecasting"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_xlstm.losses import PinballLoss
from keras_xlstm.models import xLSTMForecaster
from keras_xlstm.windows import ForecastWindows

keras.utils.set_random_seed(args.seed)
if args.csv is None:
    spec = importlib.util.find_spec("autots") or parser.error("pip install --no-deps autots==1.0.4")
    archive = f"{spec.submodule_search_locations[0]}/datasets/data/traffic_hourly.zip"
    args.csv = zipfile.ZipFile(archive).open("traffic_hourly.zip")
x = np.genfromtxt(args.csv, delimiter=",", skip_header=1, usecols=args.columns, max_rows=14400)
a, b = int(0.6 * len(x)), int(0.8 * len(x))  # 12 months to train, 4 to validate, 4 to test
x = (x - np.nanmean(x[:a], 0)) / np.nanstd(x[:a], 0)  # gaps stay NaN
train, validation, test = (
    ForecastWindows(x, 336, args.ahead, start=start, stop=stop, batch_size=size, shuffle=shuffle)
    for start, stop, size, shuffle in ((0, a, 32, True), (a, b, 256, False), (b, None, 256, False))
)

model = xLSTMForecaster(args.ahead, [0.1, 0.5, 0.9], patch_size=24, seed=args.seed)
model.compile(keras.optimizers.AdamW(1e-3, clipnorm=1.0), PinballLoss(model.quantiles))
stop = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
model.fit(train, validation_data=validation, epochs=args.epochs, callbacks=[stop])

args.out.mkdir(parents=True, exist_ok=True)
model.save(args.out / "forecaster.keras")
found = model.predict(test)
past, y = (
    np.concatenate(parts) for parts in zip(*((x["history"], y) for x, y in test), strict=True)
)
for name, forecast in {"repeat-last": past[:, -1:], "xlstm": found[..., 1]}.items():
    mse, mae = np.nanmean((forecast - y) ** 2), np.nanmean(abs(forecast - y))
    print(f"{name}: MSE {mse:.3f}, MAE {mae:.3f}")
inside = np.mean(((found[..., 0] <= y) & (y <= found[..., 2]))[np.isfinite(y)])
print(f"between the outer quantiles, which should hold 0.80 of all: {inside:.2f}")
ahead = model.forecast(past[-1:], 2 * args.ahead)[0, :, -1]
axis = Figure(figsize=(9, 3.5), layout="constrained").subplots()
axis.plot(range(-336, args.ahead), [*past[-1, :, -1], *y[-1, :, -1]], color="gray", label="truth")
axis.plot(ahead[:, 1], label="median")
axis.fill_between(range(len(ahead)), ahead[:, 0], ahead[:, 2], alpha=0.3, label="0.1 to 0.9")
axis.set(xlabel="hours from now", ylabel=f"column {args.columns[-1]}, z-score")
axis.figure.legend(loc="outside upper right", ncols=3)
axis.figure.savefig(args.out / "forecast.png", dpi=150)
