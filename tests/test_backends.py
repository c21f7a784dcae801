"""Choosing an implementation, bad input to the ops, and the scans of each framework."""

import keras
import numpy as np
import pytest
from tools import BACKEND, array

import keras_xlstm
from keras_xlstm import backends, ops

HOME = {"triton": ("torch", "jax"), "pallas": ("jax",), "xla": ("tensorflow",)}


def mlstm_inputs(rng, B=2, T=5, H=3, K=4, V=6):
    q, k = (rng.normal(size=(B, T, H, K)).astype("float32") for _ in "qk")
    v = rng.normal(size=(B, T, H, V)).astype("float32")
    i, f = (rng.normal(size=(B, T, H)).astype("float32") for _ in "if")
    return dict(zip("qkvif", (q, k, v, i, f), strict=True))


def slstm_inputs(rng, B=2, T=5, H=3, D=4):
    x = rng.normal(size=(B, T, 4, H, D)).astype("float32")
    return {"x": x, "recurrent_kernel": np.zeros((H, D, 4, D), "float32")}


def test_available_says_why():
    for said in backends.available().values():
        assert said["native"] is True
        for name, homes in HOME.items():
            if BACKEND not in homes:
                assert f"belongs to the {' and '.join(homes)} backend" in said[name]
            elif name == "xla":
                assert said[name] is True
            else:  # where there is a GPU it runs
                assert said[name] is True or any(w in said[name] for w in ("CUDA", "GPU", name))


@pytest.mark.parametrize("name", HOME)
def test_an_explicit_choice_is_honoured_or_refused(name, rng, monkeypatch):
    words = (
        f"The {name} implementation of mlstm was asked for and cannot run: .*implementation=None"
    )
    inputs = mlstm_inputs(rng)
    if backends.available()["mlstm"][name] is True:
        pytest.skip("it can run here")
    with pytest.raises(ValueError, match=words):
        ops.mlstm(**inputs, implementation=name)
    with pytest.raises(ValueError, match=words), backends.use(name):
        ops.mlstm(**inputs)
    with backends.use(name):  # the argument goes before the scope
        ops.mlstm(**inputs, implementation="native")
    with backends.use(name), backends.use("native"):
        keras_xlstm.layers.mLSTM(4, use_kernel=True)(np.zeros((1, 2, 3)))
    monkeypatch.setenv("KERAS_XLSTM_IMPLEMENTATION", name)
    with pytest.raises(ValueError, match=words):
        ops.mlstm(**inputs)
    with backends.use("native"):
        ops.mlstm(**inputs)


def test_unknown_implementations(rng, monkeypatch):
    words = "Unknown implementation. Received: {}='cuda'. Expected None or one of 'native'"
    with pytest.raises(ValueError, match=words.format("implementation")):
        ops.mlstm(**mlstm_inputs(rng), implementation="cuda")
    with pytest.raises(ValueError, match=words.format("implementation")), backends.use("cuda"):
        pass
    monkeypatch.setenv("KERAS_XLSTM_IMPLEMENTATION", "cuda")
    with pytest.raises(ValueError, match=words.format("KERAS_XLSTM_IMPLEMENTATION")):
        ops.slstm(**slstm_inputs(rng))


@pytest.mark.parametrize(("changed", "words"), [
    ({"k": (2, 5, 3, 5)}, r"`k` must have shape \(B, T, H, K\), here \(2, 5, 3, 4\). Received: shape \(2, 5, 3, 5\)"),
    ({"v": (2, 5, 3)}, r"`v` must have shape \(B, T, H, V\)"),
    ({"i": (2, 5, 3, 1)}, r"`i` must have shape \(B, T, H\)"),
    ({"f": (2, 4, 3)}, r"`f` must have shape \(B, T, H\), here \(2, 5, 3\). Received: shape \(2, 4, 3\)"),
], ids=str)  # fmt: skip
def test_mlstm_shapes(changed, words, rng):
    inputs = mlstm_inputs(rng) | {n: np.zeros(s, "float32") for n, s in changed.items()}
    with pytest.raises(ValueError, match=words):
        ops.mlstm(**inputs)


@pytest.mark.parametrize(("options", "words"), [
    ({"input_gate": "relu"}, "`input_gate` must be 'exp' or 'sigmoid'. Received: input_gate='relu'"),
    ({"eps": -1.0}, "`eps` must be a number >= 0. Received: eps=-1.0"),
    ({"eps": True}, "`eps` must be a number >= 0. Received: eps=True"),
    ({"eps": np.inf}, "`eps` must be a number >= 0. Received: eps=inf"),
    ({"return_state": "no"}, "`return_state` must be True or False. Received: return_state='no'"),
    ({"chunk_size": True}, "`chunk_size` must be a positive integer.*Received: chunk_size=True"),
    ({"chunk_size": 0}, "`chunk_size` must be a positive integer.*Received: chunk_size=0"),
    ({"initial_state": (1, 2)}, r"3 tensors \(C, n, m\), or None.*Received: 2 tensors"),
    ({"initial_state": np.zeros(3)}, r"3 tensors \(C, n, m\), or None.*Received: ndarray"),
    ({"initial_state": [np.zeros((2, 3, 4, 5), "float32")] * 3},
     r"`initial_state C` must have shape \(B, H, K, V\), here \(2, 3, 4, 6\)"),
    ({"initial_state": [None] * 3}, "`initial_state C` must be a floating-point tensor. Received: None"),
    ({"q": None}, "`q` must be a floating-point tensor. Received: None"),
    ({n: np.ones((2, 5, 3, 0), "float32") for n in "qk"}, "`q` must have at least one key dimension"),
    ({"mask": np.ones((2, 5), "int32")}, "`mask` must be boolean.*Received: dtype int32"),
    ({"mask": np.ones((2, 6), "bool")}, r"`mask` must have shape \(B, T\), here \(2, 5\)"),
    ({"segment_ids": np.ones((2, 5), "float32")}, "`segment_ids` must be integers.*float32"),
    ({"segment_ids": np.ones((5,), "int32")}, r"`segment_ids` must have shape \(B, T\)"),
    ({"q": np.ones((2, 5, 3, 4), "int32")}, "`q` must be a floating-point tensor. Received: dtype int32"),
    ({"q": np.ones((2, 5, 3, 4), "float16")}, "q, k, v must have one dtype. Received: .*float16"),
], ids=lambda x: "" if isinstance(x, dict) else x[:30])  # fmt: skip
def test_mlstm_options(options, words, rng):
    with pytest.raises(ValueError, match=words):
        ops.mlstm(**{**mlstm_inputs(rng), **options})


@pytest.mark.parametrize(("options", "words"), [
    ({"x": np.zeros((2, 5, 3, 3, 4), "float32")}, r"`x` must have shape \(B, T, 4, H, D\)"),
    ({"recurrent_kernel": np.zeros((3, 4, 4, 5), "float32")}, r"`recurrent_kernel` must have shape \(H, D, 4, D\)"),
    ({"bias": np.zeros((12,), "float32")}, r"`bias` must have shape \(4, H, D\)"),
    ({"return_state": 1}, "`return_state` must be True or False. Received: return_state=1"),
    ({"forget_gate": "relu"}, "`forget_gate` must be 'sigmoid' or 'exp'"),
    ({"recurrent_gradient_clip": -1}, "must be a positive number, or None.*Received: .*=-1"),
    ({"recurrent_scale": np.ones((2, 12), "float32")}, r"`recurrent_scale` must have shape \(B, H, D\)"),
    ({"initial_state": [np.zeros((2, 12), "float32")] * 4}, r"`initial_state h` must have shape \(B, H, D\)"),
], ids=lambda x: "" if isinstance(x, dict) else x[:30])  # fmt: skip
def test_slstm_options(options, words, rng):
    with pytest.raises(ValueError, match=words):
        ops.slstm(**{**slstm_inputs(rng), **options})


def test_symbolic_tensors(rng):
    words = r"takes tensors with values. Received: the symbolic .*use keras_xlstm.layers"
    symbolic = {n: keras.Input(x.shape[1:]) for n, x in mlstm_inputs(rng).items()}
    with pytest.raises(ValueError, match=words):
        ops.mlstm(**symbolic)


def test_variables_and_lists(rng):
    """Keras variables are tensors too, states may come as lists, and dtypes are kept."""
    inputs = {n: keras.Variable(x) for n, x in mlstm_inputs(rng).items()}
    h, state = ops.mlstm(**inputs, return_state=True)
    again, _ = ops.mlstm(**inputs, initial_state=list(state), return_state=True)
    assert again.shape == h.shape
    half = {n: x.astype("float16") for n, x in mlstm_inputs(rng).items()}
    h, state = ops.mlstm(**half, return_state=True)
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (h, *state)]
    assert dtypes == ["float16", "float32", "float32", "float32"]


def test_scan(rng):
    from keras_xlstm.backends.framework import framework

    xs = tuple(rng.normal(size=(7, n)).astype("float32") for n in (2, 3))
    xs = tuple(keras.ops.convert_to_tensor(x) for x in xs)

    def step(carry, x):
        total = carry[0] + x[0]
        return (total,), (total, x[1] * 2)

    zero = (keras.ops.zeros(2),)
    carry, (sums, doubled) = framework.scan(step, zero, xs)
    np.testing.assert_allclose(array(sums), np.cumsum(array(xs[0]), 0), rtol=1e-5)
    np.testing.assert_allclose(array(doubled), 2 * array(xs[1]))
    _, (sums, _) = framework.scan(step, zero, xs, reverse=True)
    np.testing.assert_allclose(array(sums), np.cumsum(array(xs[0])[::-1], 0)[::-1], rtol=1e-5)
    np.testing.assert_allclose(array(carry[0]), array(xs[0]).sum(0), rtol=1e-5)


def test_no_steps_are_refused(rng):
    x, *_ = slstm_inputs(rng).values()
    gate = x[:, :0, 0, :, 0]
    with pytest.raises(ValueError, match="`x` must have at least one time step.*0, 4, 3, 4"):
        ops.slstm(**{**slstm_inputs(rng), "x": x[:, :0]})
    with pytest.raises(ValueError, match="`q` must have at least one time step"):
        ops.mlstm(*[x[:, :0, 0]] * 3, gate, gate)
