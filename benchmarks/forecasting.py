"""ETTh1 by xLSTMForecaster and, by neuralforecast, its xLSTM and NLinear: one protocol for all.

    python benchmarks/forecasting.py --csv ETTh1.csv --seeds 0 1 2
    python benchmarks/forecasting.py --csv ETTh1.csv --models ours --horizons 96

The first 12 months are to train, 4 to validate, 4 to test. Values are z-scores by the first 12
months. Each of the 7 columns is a series, with 336 hours of history. The test part is forecast
from every hour, as by `cross_validation(val_size=2880, test_size=2880, step_size=1)`. An epoch is
as many windows as there are to train on. neuralforecast's models have its defaults, apart from
`--steps`, `--windows` in each step, squares as the loss, and early stopping. Their seconds hold
their validation and forecasts as well; ours hold validation alone.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import record

from keras_xlstm.models import xLSTMForecaster
from keras_xlstm.windows import ForecastWindows

HISTORY, TRAIN, VALIDATION, TEST = 336, 8640, 2880, 2880


def table(path):
    rows = TRAIN + VALIDATION + TEST
    x = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=range(1, 8), max_rows=rows)
    return (x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)


def ours(x, horizon, seed, args):
    """Forecasts and targets of the test part, and seconds an epoch."""
    keras.utils.set_random_seed(seed)
    parts = {"train": (0, TRAIN), "validation": (TRAIN, TRAIN + VALIDATION)}
    parts["test"] = (TRAIN + VALIDATION, None)
    train, validation, test = (
        ForecastWindows(
            x, HISTORY, horizon, start=start, stop=stop, seed=seed,
            batch_size=32 if name == "train" else 256, shuffle=name == "train",
        )
        for name, (start, stop) in parts.items()
    )  # fmt: skip
    model = xLSTMForecaster(
        horizon, patch_size=24, units=args.units, dropout=args.dropout, seed=seed
    )
    rate = keras.optimizers.schedules.CosineDecay(3e-3, args.epochs * len(train))
    # Means of the weights over the last steps: single ones swing by more than models differ.
    optimizer = keras.optimizers.AdamW(rate, clipnorm=1.0, use_ema=True)
    model.compile(optimizer, "mse")
    stop = keras.callbacks.EarlyStopping(patience=args.epochs, restore_best_weights=True)
    means = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    begin = time.perf_counter()
    options = {"epochs": args.epochs, "callbacks": [means, stop], "verbose": 0}
    history = model.fit(train, validation_data=validation, **options).history
    seconds = (time.perf_counter() - begin) / len(history["loss"])
    print("validation:", *(f"{loss:.4f}" for loss in history["val_loss"]), flush=True)
    y = np.concatenate([test[index][1] for index in range(len(test))])
    return model.predict(test, verbose=0), y, seconds


def of_neuralforecast(name, x, horizon, seed, args):
    """The same, by its cross-validation."""
    import neuralforecast
    import pandas
    from neuralforecast.losses.pytorch import MSE
    from neuralforecast.models import NLinear, xLSTM

    which = ["nlinear", "xlstm"].index(name)
    steps, windows = args.steps[which], args.windows[which]
    model = [NLinear, xLSTM][which](
        h=horizon, input_size=HISTORY, loss=MSE(), max_steps=steps, windows_batch_size=windows,
        early_stop_patience_steps=5, val_check_steps=max(1, steps // 20), random_seed=seed + 1,
        enable_progress_bar=False, enable_model_summary=False, logger=False,
        inference_windows_batch_size=64,  # more would need more than 23 GB
    )  # fmt: skip
    hours = pandas.date_range("2016-07-01", periods=len(x), freq="h")
    columns = [pandas.DataFrame({"unique_id": i, "ds": hours, "y": x[:, i]}) for i in range(7)]
    forecaster = neuralforecast.NeuralForecast(models=[model], freq="h")
    begin = time.perf_counter()
    found = forecaster.cross_validation(
        pandas.concat(columns), val_size=VALIDATION, test_size=TEST, step_size=1, n_windows=None,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    taken = len(forecaster.models[0].train_trajectories)  # early stopping may end it
    an_epoch = 7 * (TRAIN - HISTORY - horizon + 1) / windows
    return found[type(model).__name__].to_numpy(), found["y"].to_numpy(), seconds / taken * an_epoch


def measured(name, x, horizon, args):
    """Means over the seeds: mean squared error, mean absolute error, seconds an epoch."""
    found = []
    for seed in args.seeds:
        if name == "ours":
            forecast, y, seconds = ours(x, horizon, seed, args)
        else:
            forecast, y, seconds = of_neuralforecast(name, x, horizon, seed, args)
        found.append((np.mean((forecast - y) ** 2), np.mean(abs(forecast - y)), seconds))
        print(
            f"{horizon} {name}, seed {seed}: MSE {found[-1][0]:.4f}, MAE {found[-1][1]:.4f}, "
            f"{seconds:.0f} s an epoch, {y.size // horizon:,} windows to test",
            flush=True,
        )
    return [float(value) for value in np.mean(found, 0)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", required=True, help="ETTh1.csv")
    models = ["ours", "nlinear", "xlstm"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 336])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="ours; those of the best are kept")
    parser.add_argument("--units", type=int, default=16, help="ours")
    parser.add_argument("--dropout", type=float, default=0.5, help="ours")
    parser.add_argument("--steps", type=int, nargs=2, default=[3000, 1000], help="NLinear, xLSTM")
    parser.add_argument("--windows", type=int, nargs=2, default=[1024, 128], help="in each step")
    record.option(parser)
    args = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "any number of")
    print(f"{record.device()}, OMP_NUM_THREADS {threads}; {record.versions()}; {vars(args)}")
    x = table(args.csv)
    for horizon in args.horizons:
        means = {name: measured(name, x, horizon, args) for name in args.models}
        case = f"ETTh1, {HISTORY} hours to {horizon}, mean of {len(args.seeds)} seeds"
        metrics = [("MSE", "z-scores squared"), ("MAE", "z-scores"), ("one epoch", "s")]
        for index, (metric, unit) in enumerate(metrics):
            found = {name: values[index] for name, values in means.items()}
            print(f"{case}: {metric} {found}", flush=True)
            mine = {"xLSTMForecaster": found.pop("ours")} if "ours" in found else {}
            record.add(__file__, case, metric, unit, mine, found)


if __name__ == "__main__":
    main()
