"""xLSTMForecaster and the losses of forecasts."""

import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from tools import BACKEND, array, assert_close, jit, perturbed, tensor

from keras_xlstm import export
from keras_xlstm.losses import ObservedLoss, PinballLoss
from keras_xlstm.models import xLSTMForecaster
from keras_xlstm.models.forecaster import instance_scale, spread

TIME, HORIZON = 10, 6
SMALL = {"patch_size": 4, "units": 8, "num_heads": 2, "dropout": 0.0}
QUANTILES = [0.1, 0.5, 0.75, 0.9]


def data(channels=3, batch=4):
    """Inputs of every kind, with gaps."""
    rng = np.random.default_rng(0)
    history = 5 + 3 * rng.normal(size=(batch, TIME, channels))
    history[0, :3] = history[1, 4:7, 1] = history[1, -1] = np.nan
    inputs = {
        "history": history,
        "mask": rng.random((batch, TIME)) > 0.2,
        "future": rng.normal(size=(batch, HORIZON, 2)),
        "static": rng.normal(size=(batch, 2)),
    }
    return {n: x if n == "mask" else x.astype("float32") for n, x in inputs.items()}


def built(inputs, **options):
    """A model of these inputs, every weight moved; of the same weights for the same options."""
    keras.utils.set_random_seed(0)
    model = xLSTMForecaster(HORIZON, **{**SMALL, **options})
    model.build({name: x.shape for name, x in inputs.items()})
    return perturbed(model, np.random.default_rng(1))


def run(model, inputs):
    return model.predict_on_batch(inputs) if BACKEND == "jax" else array(model(inputs))


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize("quantiles", [None, QUANTILES])
def test_shapes(quantiles, patch_size):
    inputs = data()
    model = built(inputs, quantiles=quantiles, targets=2, patch_size=patch_size)
    model.jit_compile = jit()
    y = run(model, inputs)
    assert y.shape == (4, HORIZON, 2, *([] if quantiles is None else [4]))
    assert y.dtype == "float32"
    assert np.isfinite(y).all()
    symbolic = model({n: keras.Input(x.shape[1:], dtype=str(x.dtype)) for n, x in inputs.items()})
    assert symbolic.shape == (None, *y.shape[1:])
    assert symbolic.dtype == "float32"


def test_the_linear_map_by_hand():
    """What the stack adds is 0 at the start: the forecast is the linear map of z-scores."""
    x = data()["history"]
    model = xLSTMForecaster(HORIZON, **SMALL)
    model.build(x.shape)
    assert not array(model.head.kernel).any()
    kernel, bias = np.random.default_rng(1).normal(size=(TIME, HORIZON)), np.arange(HORIZON)
    model.linear_map.kernel.assign(kernel)
    model.linear_map.bias.assign(bias)
    mean, deviation = (f(x.astype("float64"), 1, keepdims=True) for f in (np.nanmean, np.nanstd))
    z = np.nan_to_num((x - mean) / deviation)
    want = (np.einsum("btc,th->bhc", z, kernel) + bias[:, None]) * deviation + mean
    assert_close(run(model, x), want, 1e-5)


def test_statistics_leave_gaps_out():
    x = data()["history"]
    x[2, :, 0], x[3, :, 1] = np.nan, 7.7  # never observed; constant
    mean, deviation = map(array, instance_scale(tensor(x)))
    seen = np.isfinite(x).any(1)
    got = np.where(seen, mean[:, 0], np.nan)
    with warnings.catch_warnings(action="ignore"):  # of a mean of nothing
        np.testing.assert_allclose(got, np.nanmean(x, 1), rtol=1e-5)
        want = np.nanstd(x, 1)
    want[2, 0] = want[3, 1] = 1
    np.testing.assert_allclose(deviation[:, 0], want, rtol=1e-5)
    assert mean[2, 0, 0] == 0


@pytest.mark.parametrize("quantiles", [None, QUANTILES])
def test_normalisation_is_reversed(quantiles):
    """Other units of measurement, of each channel its own: the same forecast in those units."""
    inputs = data()
    model = built(inputs, quantiles=quantiles)
    a, b = np.array([2, 1e3, 1e-3]), np.array([-5, 100, 0.01])
    moved = {**inputs, "history": (a * inputs["history"] + b).astype("float32")}
    if quantiles is not None:
        a, b = a[:, None], b[:, None]
    got = (run(model, moved) - b) / a
    np.testing.assert_allclose(got, run(model, inputs), atol=2e-3)


def test_quantiles_do_not_cross():
    y = 9 * np.random.default_rng(0).normal(size=(50, 4))
    for centre in range(4):
        got = array(spread(tensor(y), centre))
        assert (np.diff(got) >= 0).all()
        np.testing.assert_allclose(got[:, centre], y[:, 0], atol=1e-5)
    gaps = np.log1p(np.exp(y[:, 1:]))
    np.testing.assert_allclose(np.diff(got), gaps, rtol=1e-3, atol=1e-5)
    inputs = data()
    model = built(inputs, quantiles=QUANTILES)
    assert (np.diff(run(model, inputs)) >= 0).all()
    assert model._centre == 1


# ------------------------------------------------------------------ what it depends on


def test_a_mask_is_a_gap():
    inputs = data()
    model = built(inputs)
    want = run(model, inputs)
    filled = np.where(np.isnan(inputs["history"]), 99, inputs["history"]).astype("float32")
    each = inputs["mask"][:, :, None] & np.isfinite(inputs["history"])
    other = built({**inputs, "mask": each})
    assert_close(run(other, {**inputs, "mask": each, "history": filled}), want, 1e-5)
    for dtype in ("int32", "float32"):
        assert_close(run(model, {**inputs, "mask": inputs["mask"].astype(dtype)}), want, 1e-6)
    holes = np.where(each, filled, np.nan)
    assert_close(run(model, {**inputs, "history": holes}), want, 1e-5)
    assert not np.allclose(run(model, {**inputs, "history": filled}), want, rtol=1e-3)


def test_every_input_counts():
    inputs = data()
    model = built(inputs, targets=2)
    before = run(model, inputs)
    for name, at, changed in [
        ("history", (2, TIME - 2, 0), [0]),  # a target: its own forecast
        ("history", (2, TIME - 2, 2), [0, 1]),  # a covariate: all of them
        ("future", (2, HORIZON - 1, 1), [0, 1]),
        ("static", (2, 1), [0, 1]),
    ]:
        moved = {**inputs, "mask": np.ones_like(inputs["mask"])}
        before = run(model, moved)
        moved[name] = moved[name].copy()
        moved[name][at] += 2
        found = np.abs(run(model, moved) - before).max(1)
        assert sorted(np.flatnonzero(found[2] > 1e-4)) == changed, name
        assert not found[[0, 1, 3]].any()


def test_the_future_acts_forwards():
    """What is known of a patch reaches forecasts of it and of later ones."""
    inputs = data()
    model = built(inputs)
    before = run(model, inputs)
    inputs["future"][:, 4] += 1  # of patches of 4 steps, the second
    difference = np.abs(run(model, inputs) - before)
    assert not difference[:, :4].any()
    assert difference[:, 4:].max() > 1e-3


def test_what_is_known_of_the_history_too():
    inputs = data()
    long = np.concatenate([np.full((4, TIME, 2), np.nan, "float32"), inputs["future"]], 1)
    model, other = built(inputs), built({**inputs, "future": long})
    want = run(model, inputs)
    assert_close(run(other, {**inputs, "future": long}), want, 1e-5)
    long[:, 3] = 1
    assert not np.allclose(run(other, {**inputs, "future": long}), want, rtol=1e-3)


# ------------------------------------------------------------------ losses


def test_pinball_by_hand():
    rng = np.random.default_rng(0)
    y, forecast = rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3, 2, 4))
    error = y[..., None] - forecast
    each = np.where(error > 0, np.multiply(QUANTILES, error), np.subtract(QUANTILES, 1) * error)
    got = PinballLoss(QUANTILES)(tensor(y), tensor(forecast))
    np.testing.assert_allclose(array(got), each.mean(), rtol=1e-5)
    y[1, :2] = np.nan
    rest = each.mean(-1)[np.isfinite(y)]
    for reduction, want in (("sum_over_batch_size", rest.mean()), ("sum", rest.sum())):
        got = PinballLoss(QUANTILES, reduction=reduction)(tensor(y), tensor(forecast))
        np.testing.assert_allclose(array(got), want, rtol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "log_cosh", "mape", "msle"])
def test_observed_loss_is_that_of_keras(loss):
    rng = np.random.default_rng(0)
    y, forecast = rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3, 2))
    ours, of_keras = ObservedLoss(loss), keras.losses.get(loss)
    want = of_keras(tensor(y), tensor(forecast))
    got = ours(tensor(y), tensor(forecast))
    np.testing.assert_allclose(array(got), np.mean(array(want)), rtol=1e-5)
    y[1, :2] = np.nan
    kept = np.isfinite(y)
    want = of_keras(tensor(y[kept][:, None]), tensor(forecast[kept][:, None]))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(ours))
    for loss in (ours, again):
        got = loss(tensor(y), tensor(forecast))
        np.testing.assert_allclose(array(got), np.mean(array(want)), rtol=1e-5)
    assert array(ours(tensor(np.full((2, 3, 1), np.nan)), tensor(np.ones((2, 3, 1))))) == 0


@pytest.mark.parametrize("quantiles", [None, QUANTILES])
def test_fit_with_gaps(quantiles):
    """Level, slope and gaps: a few steps find more than the mean; no weight becomes NaN."""
    inputs = data(batch=12)
    y = 5 + np.random.default_rng(2).normal(size=(12, HORIZON, 3)).astype("float32")
    y[1, :4], y[2, :, 1] = np.nan, np.nan
    model = xLSTMForecaster(HORIZON, quantiles, **{**SMALL, "dropout": 0.1}, seed=0)
    loss = ObservedLoss("mse") if quantiles is None else PinballLoss(quantiles)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit())
    losses = model.fit(inputs, y, batch_size=5, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(array(v)).all() for v in model.weights)


# ------------------------------------------------------------------ beyond the horizon


def test_forecast_by_hand():
    inputs = data()
    model = built(inputs, quantiles=QUANTILES, targets=2)
    rng = np.random.default_rng(3)
    future = rng.normal(size=(4, 15, 2)).astype("float32")
    got = model.forecast({**inputs, "future": future}, 15)
    assert got.shape == (4, 15, 2, 4)
    history, mask, found = inputs["history"], inputs["mask"], []
    future = np.concatenate([future, np.full((4, 3, 2), np.nan, "float32")], 1)
    for roll in range(3):
        known = future[:, roll * HORIZON : (roll + 1) * HORIZON]
        y = run(model, {**inputs, "history": history, "mask": mask, "future": known})
        found.append(y)
        new = np.concatenate([y[..., 1], np.full((4, HORIZON, 1), np.nan)], -1)
        history = np.concatenate([history, new], 1)[:, -TIME:].astype("float32")
        mask = np.concatenate([mask, np.ones((4, HORIZON), bool)], 1)[:, -TIME:]
    np.testing.assert_allclose(got, np.concatenate(found, 1)[:, :15], rtol=1e-5, atol=1e-5)


def test_forecast_slides_what_is_known():
    """A future that covers the history moves on with it."""
    inputs = {"history": data()["history"]}
    future = np.random.default_rng(3).normal(size=(4, TIME + 2 * HORIZON, 1)).astype("float32")
    model = built({**inputs, "future": future[:, : TIME + HORIZON]})
    got = model.forecast({**inputs, "future": future}, 2 * HORIZON)
    history = np.concatenate([inputs["history"], got[:, :HORIZON]], 1)[:, -TIME:]
    second = run(model, {"history": history, "future": future[:, HORIZON:]})
    np.testing.assert_allclose(got[:, HORIZON:], second, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ files


def test_saved_and_cloned(tmp_path):
    inputs = data()
    model = built(
        inputs, quantiles=QUANTILES, targets=2, stack_options={"pattern": "1:1"}, num_blocks=2
    )
    model.compile("adam", PinballLoss(QUANTILES), jit_compile=jit())
    want = run(model, inputs)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, xLSTMForecaster)
    assert again.loss.quantiles == QUANTILES
    assert_close(run(again, inputs), want, 1e-6)
    assert_close(again.forecast(inputs, HORIZON), want, 1e-5)
    fresh = keras.models.clone_model(model)
    assert fresh.get_config() == model.get_config()


def test_under_mixed_precision():
    inputs = data()
    inputs["history"] *= 1e6  # float16 ends at 65,504
    keras.config.set_dtype_policy("mixed_float16")
    model = built(inputs)
    y = run(model, inputs)
    assert y.dtype == "float32"
    assert np.isfinite(y).all()
    assert model.head.compute_dtype == "float16"


def test_in_float64():
    inputs = data()
    model, double = built(inputs), built(inputs, dtype="float64")
    double.set_weights(model.get_weights())  # Keras draws others in float64
    want = run(model, inputs)
    inputs = {n: x if n == "mask" else x.astype("float64") for n, x in inputs.items()}
    got = run(double, inputs)
    assert got.dtype == "float64"
    assert_close(got, want, 1e-5)


def test_inside_another_model():
    x = keras.Input((TIME, 2))
    y = xLSTMForecaster(HORIZON, **SMALL)(x)
    model = keras.Model(x, keras.layers.Flatten()(y))
    assert run(model, data()["history"][:, :, :2]).shape == (4, 2 * HORIZON)


RUN_FILE = """
import sys
import numpy as np, onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(f"{folder}/sequence.onnx")
inputs = dict(np.load(f"{folder}/inputs.npz"))
assert sorted(x.name for x in session.get_inputs()) == sorted(inputs)
np.save(f"{folder}/ran.npy", session.run(["output"], inputs)[0])
assert "keras" not in sys.modules
"""


def test_onnx(tmp_path):
    for name in ("onnxruntime", export._CONVERTER[BACKEND]):
        pytest.importorskip(name, reason=f"the extra export-{BACKEND}")
    inputs = data()
    model = built(inputs, quantiles=QUANTILES, targets=2)
    want = run(model, inputs)
    export.export_model(model, tmp_path, "onnx", "sequence")
    np.savez(tmp_path / "inputs.npz", **{n: x[:3] for n, x in inputs.items()})
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN_FILE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "ran.npy"), want[:3], rtol=1e-4, atol=1e-4)


def test_a_step_is_refused():
    with pytest.raises(ValueError, match="forecaster.*cannot stream"):
        export.step_model(built(data(), name="forecaster"))


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "`horizon` must be a positive integer"),
        ({"patch_size": 2.5}, "`patch_size` must be a positive integer"),
        ({"targets": 0}, "`targets` must be a positive integer"),
        ({"quantiles": [0.9, 0.1]}, "`quantiles` must be a list of rising numbers"),
        ({"quantiles": []}, "`quantiles` must be"),
        ({"quantiles": [0.5, 1]}, "`quantiles` must be"),
        ({"quantiles": 0.5}, "`quantiles` must be"),
        ({"quantiles": ["0.5"]}, "`quantiles` must be"),
        ({"dropout": 1.5}, "`dropout` must be a number"),
        ({"linear": "no"}, "`linear` must be True or False"),
        ({"units": 10, "num_heads": 4}, "10"),
        ({"stack_options": {"num_block": 3}}, "num_block"),
        ({"stack_options": "1:1"}, "`stack_options` must be a dict"),
        ({"seed": "a"}, "`seed` must be an integer"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        xLSTMForecaster(**{"horizon": 4, **options}).build((None, 8, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"histroy": 1}, "takes the history, or a dict.*histroy"),
        ({"history": None}, "takes the history"),
        ({"history": (4, TIME)}, "'history' must have shape"),
        ({"history": (4, None, 3)}, "'history' must have shape"),
        ({"mask": (4, TIME, 2)}, r"'mask' must have shape \(batch, 10\) or \(batch, 10, 3\)"),
        ({"future": (4, HORIZON + 1, 2)}, "'future' must have shape.*6, features.*16, features"),
        ({"static": (4, 1, 2)}, "'static' must have shape"),
    ],
)
def test_bad_shapes(changes, message):
    shapes = {**{n: x.shape for n, x in data().items()}, **changes}
    with pytest.raises(ValueError, match=message):
        xLSTMForecaster(HORIZON, **SMALL).build(shapes)


def test_calls_that_do_not_fit():
    inputs = data()
    model = built(inputs)
    with pytest.raises(ValueError, match="built for history .*Received: history"):
        model({n: x for n, x in inputs.items() if n != "future"})
    with pytest.raises(ValueError, match="padded in front with NaN"):
        model({**inputs, "history": inputs["history"][:, 1:]})
    with pytest.raises(ValueError, match="'history' must be floating-point.*int"):
        model({**inputs, "history": np.zeros((4, TIME, 3), "int32")})
    with pytest.raises(ValueError, match="targets exceed|`targets` must not exceed"):
        xLSTMForecaster(HORIZON, targets=4).build((4, TIME, 3))
    with pytest.raises(ValueError, match="not built"):
        xLSTMForecaster(HORIZON).forecast(inputs, 3)
    with pytest.raises(ValueError, match=r"'future' must have shape \(batch, 9, features\)"):
        model.forecast(inputs, 9)
    with pytest.raises(ValueError, match="`steps` must be a positive integer"):
        model.forecast(inputs, 0)
    with pytest.raises(ValueError, match="same `quantiles`"):
        PinballLoss(QUANTILES)(tensor(np.ones((2, 3, 1))), tensor(np.ones((2, 3, 1))))
    with pytest.raises(ValueError, match="as many targets"):
        PinballLoss(QUANTILES)(tensor(np.ones((2, 3, 5))), tensor(np.ones((2, 3, 1, 4))))
    with pytest.raises(ValueError, match="`loss` must be 'mse' or.*Received: loss='mes'"):
        ObservedLoss("mes")
    with pytest.raises(ValueError, match="take keras_xlstm.losses.PinballLoss"):
        ObservedLoss("mse")(tensor(np.ones((2, 3, 1))), tensor(np.ones((2, 3, 1, 4))))
