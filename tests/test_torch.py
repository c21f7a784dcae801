"""What is PyTorch's own: opaque operators, torch.compile, meta tensors, export, no second order."""

import shutil

import numpy as np
import pytest
from tools import BACKEND, array

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import keras
import torch
from keras_xlstm.backends.torch import slstm_loop as slstm_module

import keras_xlstm
from keras_xlstm.layers import mLSTM, sLSTM


def arguments(rng, T=5, flags=True):
    B, H, D = 2, 2, 3
    x, R, bias = (
        torch.tensor(rng.normal(size=s)) for s in ((B, T, 4, H, D), (H, D, 4, D), (4, H, D))
    )
    state = [torch.tensor(rng.random((B, H, D)) + 0.5) for _ in range(4)]
    for a in (x, R, bias, *state):
        a.requires_grad_()
    hold = torch.tensor(rng.random((B, T)) < 0.3) if flags else None
    return x, R, bias, *state, hold, hold, None


def test_operators_are_well_formed(rng):
    options = (False, 0.0, True)
    torch.library.opcheck(slstm_module._forward, (*arguments(rng), *options))
    torch.library.opcheck(slstm_module._forward, (*arguments(rng, flags=False), True, 0.0, True))


@pytest.mark.parametrize("Layer", [sLSTM, mLSTM])
def test_meta_tensors_run_no_loop(Layer, monkeypatch):
    """A user's own layer is traced on meta tensors: the loop must not run then."""

    class Outer(keras.layers.Layer):  # without compute_output_shape: Keras calls it to see
        def __init__(self):
            super().__init__()
            self.inner = Layer(4, return_state=True)

        def call(self, x):
            assert x.device.type == "meta"
            return self.inner(x)

    steps = []
    original = torch.Tensor.baddbmm_
    monkeypatch.setattr(
        torch.Tensor, "baddbmm_", lambda *a, **k: steps.append(1) or original(*a, **k)
    )
    output, *_ = Outer()(keras.Input((None, 3)))
    assert output.shape == (None, 4)
    assert not steps


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fit_compiled(rng):
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def train(jit_compile):
        keras.utils.set_random_seed(0)
        first = sLSTM(8, num_heads=2, return_sequences=True)
        layers = [first, mLSTM(8, num_heads=2), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((20, 3)), *layers])
        model.compile("sgd", "mse", jit_compile=jit_compile)
        return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(train(True), train(False), rtol=1e-4)


@pytest.mark.parametrize("Layer", [sLSTM, mLSTM])
def test_export_needs_nothing_of_ours(Layer, rng, tmp_path):
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    model = keras.Sequential([keras.Input((6, 3)), Layer(4, num_heads=2)])
    want = array(model(x))
    with torch.no_grad():
        program = torch.export.export(model, (torch.tensor(x),), strict=False)
    assert "keras_xlstm" not in str(program.graph)
    np.testing.assert_allclose(program.module()(torch.tensor(x)).detach().numpy(), want, atol=1e-6)


@pytest.mark.parametrize("op", ["slstm", "mlstm"])
def test_second_derivatives_are_refused(op, rng):
    if op == "slstm":
        x, R, *_ = arguments(rng)
        h = keras_xlstm.ops.slstm(x, R)
    else:
        q = torch.tensor(rng.normal(size=(2, 5, 2, 3)), requires_grad=True)
        x, gate = q, torch.zeros(2, 5, 2, dtype=torch.float64)
        h = keras_xlstm.ops.mlstm(q, q, q, gate, gate)
    (gradient,) = torch.autograd.grad((h**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


def test_inference_keeps_no_history(rng):
    """Without gradients the loop holds two steps of c, n and m, and no gates."""
    inputs = [None if a is None else a.detach() for a in arguments(rng, T=50)]
    kept = slstm_module._forward(*inputs, False, 0.0, False)
    assert kept[1].shape[1] == 2
    assert kept[4].numel() == 0
    full = slstm_module._forward(*inputs, False, 0.0, True)
    for a, b in zip([kept[0], *kept[5:]], [full[0], *full[5:]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
