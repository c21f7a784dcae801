"""Tomorrow's hours from those of the last four weeks: a first model of days with an xLSTM stack.

The data, traffic on a motorway, come with `pip install --no-deps autots==1.0.4`.
"""

import argparse
import importlib.util
import os
import zipfile

LAYERS = {  # (batch, days, 64) to the same: one of these lines is all that differs
    "lstm": lambda: LSTM(64, return_sequences=True),
    "xlstm": lambda: xLSTMStack(64, num_blocks=2, pattern="1:1"),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--layer", choices=LAYERS, default="xlstm")
parser.add_argument("--csv", help="another hourly table, with a header")
parser.add_argument("--column", type=int, default=5, help="of the table, from 0")
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras.layers import LSTM, Dense

from keras_xlstm.models import xLSTMStack

table = args.csv
if table is None:
    found = importlib.util.find_spec("autots") or parser.error("install autots, as above")
    packed = f"{found.submodule_search_locations[0]}/datasets/data/traffic_hourly.zip"
    table = zipfile.ZipFile(packed).open("traffic_hourly.zip")
hours = np.genfromtxt(table, delimiter=",", skip_header=1, usecols=args.column)
days = hours[: len(hours) // 24 * 24].reshape(-1, 24)
cut = int(0.8 * len(days))  # the last fifth is for the test
days = np.nan_to_num((days - np.nanmean(days[:cut])) / np.nanstd(days[:cut])).astype("float32")
x = np.stack([days[day - 28 : day] for day in range(28, len(days))])  # (batch, 28 days, 24 hours)
y = days[28:]
(x, x_test), (y, y_test) = (np.split(a, [cut - 28]) for a in (x, y))

keras.utils.set_random_seed(0)
inputs = keras.Input((28, 24))
features = LAYERS[args.layer]()(Dense(64)(inputs))
model = keras.Model(inputs, Dense(24)(features[:, -1]))
model.compile(keras.optimizers.Adam(2e-3), "mse")
model.fit(x, y, batch_size=16, epochs=args.epochs, validation_data=(x_test, y_test))

for name, found in {
    "the day a week before": x_test[:, -7],
    args.layer: model.predict(x_test, verbose=0),
}.items():
    print(f"mean squared error of {name}: {np.mean((found - y_test) ** 2):.3f}")
