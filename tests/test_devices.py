"""Several devices: the loss curve of one, files that one can load, layouts that miss no variable."""

import contextlib
import json
import os
import subprocess
import sys

import devices
import keras
import numpy as np
import pytest
from tools import BACKEND, HAS_PALLAS, HERE, array, assert_close, tensor, vjp

import keras_xlstm
from keras_xlstm.distribution import (
    ContextParallel,
    ModelParallel,
    axes_of,
    context_parallel,
    fully_shard,
)
from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMLanguageModel

jax_only = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="FSDP2 is PyTorch's")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What tests/devices.py prints, and the folder that it filled."""
    folder = tmp_path_factory.mktemp("devices")
    env = {**os.environ, "KERAS_BACKEND": BACKEND, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "devices.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


WAYS = {
    "jax": [
        ("large, data", "large, one"),
        ("large, context", "large, one"),
        ("paper, model", "paper, one"),
        *[("paper, model, kernels", "paper, one")][: bool(HAS_PALLAS)],
        ("large, model", "large, one"),
    ],
    "tensorflow": [("paper, mirrored", "paper, one"), ("paper, mirrored, compiled", "paper, one")],
    "torch": [("ddp", "ddp, one"), ("fsdp", "fsdp, one"), ("context", "context, one")],
}


@pytest.mark.parametrize(("way", "one"), WAYS[BACKEND])
def test_the_loss_curve_is_that_of_one_device(way, one, trained):
    curves, _ = trained
    want = curves[one][: devices.EPOCHS]
    np.testing.assert_allclose(curves[way], want, rtol=1e-5)
    assert want[-1] < 0.9 * want[0]


@pytest.mark.skipif(BACKEND == "torch", reason="the optimizer belongs to the module around it")
def test_a_model_saved_on_several_devices_goes_on_on_one(trained):
    """Its optimizer too: the epoch that follows is the one that follows on one device."""
    curves, folder = trained
    model = keras.models.load_model(folder / "model.keras")
    options = {"batch_size": devices.BATCH, "shuffle": False, "verbose": 0}
    (found,) = model.fit(devices.IDS[:, :-1], devices.IDS[:, 1:], **options).history["loss"]
    assert found == pytest.approx(curves["paper, one"][-1], rel=1e-5)


@jax_only
def test_a_weights_file_of_several_devices_loads_on_one(trained):
    _, folder = trained
    whole = keras.models.load_model(folder / "model.keras")
    model = devices.language_model(**devices.PAPER)
    model.load_weights(folder / "model.weights.h5")
    for a, b in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(array(a), array(b))


@torch_only
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_model_saved_by_one_of_two_processes_is_whole(way, trained):
    curves, folder = trained
    found = devices.evaluated(keras.models.load_model(folder / f"{way}.keras"))
    assert found == pytest.approx(curves[f"{way}, one, evaluated"], rel=1e-5)


@torch_only
def test_fsdp_halves_the_parameters(trained):
    assert trained[0]["fsdp, share"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_keras_cannot_compile_a_mirrored_step(trained):
    """README says so, of any Keras model: when this fails, it can say something better."""
    assert trained[0]["Keras compiles a mirrored step"] is False


# ---------------------------------------------------------------------------------------- layouts


def built(layer):
    layer.build((4, None, 6))
    return layer


MADE = {
    "paper": lambda: xLSTMLanguageModel(
        64, 32, 2, pattern="1:1", mlstm_options={"use_bias": True}, tie_embeddings=True
    ),
    "large": lambda: xLSTMLanguageModel(
        64, 32, 1, architecture="large", mlstm_options={"use_bias": True}
    ),
    "mLSTM": lambda: built(mLSTM(8, 2, key_dim=4, value_dim=8, use_bias=True, stateful=True)),
    "sLSTM": lambda: built(sLSTM(8, 2, stateful=True)),
}


@pytest.mark.parametrize("name", MADE)
def test_every_variable_has_a_layout(name):
    model = MADE[name]()
    if name == "large":
        model.enable_lora(2)
    for variable in model.weights:
        axes = axes_of(variable.path, len(variable.shape))
        assert axes is not None, f"add {variable.path} to keras_xlstm/distribution.py"
        if len(variable.shape) > 1 and "lora" not in variable.path:
            assert "cut" in axes, variable.path


@pytest.fixture
def over_two():
    """Two devices that share the model; conftest.py makes them of one CPU."""
    names = keras.distribution.list_devices()
    if len(names) < 2:
        pytest.skip("needs two devices")
    return ModelParallel(keras.distribution.DeviceMesh((1, 2), ("batch", "model"), names[:2]))


@jax_only
@pytest.mark.parametrize(
    ("Layer", "options"), [(mLSTM, {}), (sLSTM, {"recurrent_initializer": "orthogonal"})]
)
def test_carried_states_are_shared_out(Layer, options, over_two, rng):
    x = rng.normal(size=(4, 6, 6)).astype("float32")
    found = []
    for scope in (contextlib.nullcontext(), over_two.scope()):
        keras.utils.set_random_seed(0)
        with scope:
            layer = Layer(8, num_heads=2, stateful=True, return_sequences=True, **options)
            model = keras.Sequential([keras.Input(batch_shape=(4, 6, 6)), layer])
            found.append([model.predict(x, verbose=0) for _ in range(2)])
    assert all("model" in state.value.sharding.spec for state in layer.states)
    assert not np.allclose(*found[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


@pytest.mark.skipif(not HAS_PALLAS, reason="runs on JAX, a newer one")
@pytest.mark.parametrize("heads", [2, 3], ids=["shared out", "whole on both"])
@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_kernels_over_heads(op, heads, over_two, rng, monkeypatch):
    """Three heads cannot be cut for two devices: both compute all of them, and gradients know."""
    monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")
    shapes = [(2, 9, heads, 4)] * 3 + [(2, 9, heads)] * 2
    if op == "slstm":
        shapes = [(2, 9, 4, heads, 4), (heads, 4, 4, 4), (4, heads, 4)]
    inputs = [tensor(rng.normal(size=shape)) for shape in shapes]

    def outputs(*inputs):
        run = getattr(keras_xlstm.ops, op)
        h, state = run(*inputs, return_state=True, implementation="pallas")
        return h, *state

    cotangents = [tensor(rng.normal(size=s.shape)) for s in outputs(*inputs)]
    cotangents[-1] = None  # of m
    want = vjp(outputs, inputs, cotangents)
    with over_two.scope():
        found = vjp(outputs, inputs, cotangents)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(want), strict=True):
        assert_close(a, b, 1e-6)


@jax_only
def test_generation_goes_on(over_two):
    found = []
    for scope in (contextlib.nullcontext(), over_two.scope()):
        with scope:
            model = devices.language_model(architecture="large")
            found.append(model.generate([[1, 2, 3], [4]], 4, temperature=0.0))
    for one, two in zip(*found, strict=True):
        assert list(one) == list(two)


@jax_only
def test_optimizer_states_are_cut_as_their_weights(over_two):
    with over_two.scope():
        layer = built(mLSTM(8, num_heads=2))
        optimizer = keras.optimizers.Adam()
        optimizer.build(layer.trainable_variables)
    cut = [v.path for v in optimizer.variables if "model" in getattr(v.value.sharding, "spec", ())]
    assert len(cut) == 2 * sum("model" in v.value.sharding.spec for v in layer.weights) > 0


@jax_only
def test_a_map_of_the_users_goes_first(over_two):
    layouts = keras.distribution.LayoutMap(over_two.device_mesh)
    layouts["mine/query/kernel"] = ("model", None)
    layouts["dense/kernel"] = (None, "model")
    with ModelParallel(over_two.device_mesh, layouts).scope():
        query = built(mLSTM(8, num_heads=2, name="mine")).query
        dense = keras.layers.Dense(8, name="dense")
        other = keras.layers.Dense(8, name="other")
        for layer in (dense, other):
            layer.build((4, 6))
    specs = [tuple(layer.kernel.value.sharding.spec) for layer in (query, dense, other)]
    assert specs == [("model", None), (None, "model"), (None, None)]


@jax_only
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_heads": 1},
            r"input_gate/kernel of shape \(192, 1\) cannot be shared out among the 2",
        ),
        ({"vocabulary_size": 63}, r"embedding/embeddings of shape \(63, 32\)"),
    ],
)
def test_what_cannot_be_shared_out_evenly_is_refused(arguments, message, over_two):
    arguments = {"vocabulary_size": 64, "units": 32, "num_blocks": 1, **arguments}
    with over_two.scope(), pytest.raises(ValueError, match=message):
        xLSTMLanguageModel(**arguments)


@jax_only
def test_a_mesh_of_one_axis_is_refused(over_two):
    names = list(over_two.device_mesh.devices.flat)
    mesh = keras.distribution.DeviceMesh((2,), ("batch",), names)
    with pytest.raises(ValueError, match=r"must have two axes.*\('batch',\)"):
        ModelParallel(mesh)


def test_other_backends_are_named():
    if BACKEND != "jax":
        with pytest.raises(
            ValueError, match=f"runs on the jax backend. Received: Keras on {BACKEND}"
        ):
            ModelParallel(None)
        with pytest.raises(ValueError, match="jax backend.*On torch, take context_parallel"):
            ContextParallel(None)
    if BACKEND != "torch":
        with pytest.raises(ValueError, match="runs on the torch backend"):
            fully_shard(None)
        with pytest.raises(ValueError, match="torch backend.*On JAX, take ContextParallel"):
            with context_parallel():
                pass


@torch_only
def test_what_fsdp_cannot_take():
    with pytest.raises(ValueError, match="Received: Sequential"):
        fully_shard(keras.Sequential([keras.Input((None, 3)), mLSTM(4)]))
    model = devices.language_model()
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        fully_shard(model)
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.raises(ValueError, match="compiled with jit_compile=True"):
        fully_shard(model)
