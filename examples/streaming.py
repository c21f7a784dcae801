"""Watches a sensor frame by frame in ONNX Runtime, with models that were trained in Keras.

    python examples/streaming.py                           # trains, exports, then scores
    python streaming.py --score runs/streaming             # scores alone: needs no Keras, no xLSTM

Each model forecasts the next frame of a synthetic machine: three vibrating channels whose load
changes, with faults in the stream that is scored. The worse the forecast, the odder the frame.
The files hold one step of a model: frame and states in, forecast and new states out. LSTM is
exported the same way, to compare.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

import numpy as np


def machine(frames, seed, faults=0):
    """(frames, 3) float32, and which of them belong to a fault: ten frames of another frequency."""
    rng = np.random.default_rng(seed)
    load = np.cumsum(0.02 * rng.normal(size=frames)) % 1.0  # a slow walk
    speed = 0.3 + 0.2 * np.sin(2 * np.pi * load)
    broken = np.zeros(frames, bool)
    for start in rng.integers(100, frames - 10, faults):
        broken[start : start + 10] = True
    phase = np.cumsum(np.where(broken, 2.5 * speed, speed))
    waves = [np.sin(phase), np.sin(2 * phase + 0.5), speed * np.cos(phase)]
    return (np.stack(waves, 1) + 0.02 * rng.normal(size=(frames, 3))).astype("float32"), broken


def train_and_export(folder, units, epochs):
    """`folder/<layer>/streaming.onnx`, and what Keras itself forecasts, to compare with."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    from keras_xlstm import export
    from keras_xlstm.layers import mLSTM, sLSTM

    layers = {
        "lstm": keras.layers.LSTM(units, return_sequences=True, name="lstm"),
        "slstm": sLSTM(units, num_heads=4, return_sequences=True, name="slstm"),
        "mlstm": mLSTM(units, num_heads=4, return_sequences=True, name="mlstm"),
    }
    windows = machine(128 * 65, seed=0)[0].reshape(128, 65, 3)
    stream, _ = machine(2000, seed=1, faults=8)
    for name, layer in layers.items():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 3), name="frame")
        model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        history = model.fit(
            windows[:, :-1], windows[:, 1:], batch_size=16, epochs=epochs, verbose=0
        )
        print(f"{name}: trained, error {history.history['loss'][-1]:.4f}", flush=True)
        export.export_model(model, folder / name, format="onnx", parts="streaming")
        np.save(folder / name / "keras.npy", model.predict(stream[None], verbose=0)[0])


def score(path, frames, warm_up=50):
    """Forecasts of all frames, one by one, and the seconds that each took."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a step is too small to share
    session = onnxruntime.InferenceSession(path, options)
    frame, *states = session.get_inputs()
    state = {s.name: np.zeros([1, *s.shape[1:]], "float32") for s in states}
    for _ in range(warm_up):
        session.run(None, {frame.name: frames[:1], **state})
    forecasts, seconds = [], []
    for t in range(len(frames)):
        start = time.perf_counter()
        forecast, *new = session.run(None, {frame.name: frames[t : t + 1], **state})
        state = dict(zip(state, new, strict=True))
        seconds.append(time.perf_counter() - start)
        forecasts.append(forecast[0])
    return np.array(forecasts), np.array(seconds)


def report(folder):
    stream, broken = machine(2000, seed=1, faults=8)
    print("layer   microseconds per frame: median, 99 %   from Keras: 99.9 %, worst   faults found")
    for path in sorted(folder.glob("*/streaming.onnx")):
        forecasts, seconds = score(path, stream)
        anomaly = np.abs(stream[1:] - forecasts[:-1]).max(1)
        alarm = anomaly > np.quantile(anomaly[:100], 0.99) * 2  # learned before the first fault
        starts = np.flatnonzero(np.diff(broken.astype(int)) == 1)
        found = sum(alarm[start : start + 10].any() for start in starts)
        # mLSTM divides by a sum that may nearly cancel: there, in single frames, the order of
        # float32 sums shows.
        error = np.abs(forecasts - np.load(path.parent / "keras.npy")).max(1)
        usual, worst = np.quantile(error, [0.999, 1])
        median, slow = np.quantile(seconds, [0.5, 0.99]) * 1e6
        times = f"{median:26.0f} {slow:8.0f}"
        errors = f"{usual:18.1e} {worst:7.1e}"
        print(f"{path.parent.name:6} {times} {errors} {found:9} of {len(starts)}")
    assert "keras" not in sys.modules


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--score", type=pathlib.Path, help="a folder of exported files: only score")
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/streaming"))
    args = parser.parse_args()
    if args.score is not None:
        report(args.score)
        return
    train_and_export(args.out, args.units, args.epochs)
    # A process of its own, where nothing has imported Keras.
    subprocess.run([sys.executable, "-I", __file__, "--score", str(args.out)], check=True)


if __name__ == "__main__":
    main()
