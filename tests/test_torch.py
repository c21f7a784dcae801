"""What is PyTorch's own: opaque operators, torch.compile, meta tensors, export."""

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
from keras_xlstm.layers.block import run_plain
from keras_xlstm.models import xLSTMLanguageModel


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
    torch.library.opcheck(slstm_module._forward.call, (*arguments(rng), *options))
    torch.library.opcheck(
        slstm_module._forward.call, (*arguments(rng, flags=False), True, 0.0, True)
    )


def test_shapes_of_long_texts_take_no_longer():
    """Before a first step `fit` asks a model for shapes: every chunk would be worked out there."""
    from keras.src.backend import compute_output_spec
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = set()
    for options in ({"architecture": "large"}, {"pattern": "1:1"}):
        model = xLSTMLanguageModel(9, 8, 2, num_heads=2, **options)
        for length in (192, 1920):
            with Calls() as calls:
                logits = compute_output_spec(model, keras.KerasTensor((2, length), "int32"))
            assert logits.shape == (2, length, 9)
            counts.add((*options, calls.count))
    assert len(counts) == 2


def with_aot_eager(function, **options):
    """torch.compile without its code generator, which takes a minute for some of these."""
    return torch._dynamo.optimize("aot_eager")(function)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fit_compiled(rng):
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def train(jit_compile):
        keras.utils.set_random_seed(0)
        layers = [sLSTM(8, num_heads=2), keras.layers.Dense(1)]
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


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_transforms(op, T, rng):
    """torch.func and forward mode, which look through the operators: an opaque one would leave
    tangents out without a word."""
    B, H, D = 3, 2, 4
    if op == "mlstm":
        shapes = [(B, T, H, D)] * 3 + [(B, T, H)] * 2 + [(B, H, D, D), (B, H, D), (B, H)]
        options = {"chunk_size": 4}
    else:
        shapes, options = [(B, T, 4, H, D), (H, D, 4, D), (4, H, D)] + [(B, H, D)] * 4, {}
    inputs = [torch.tensor(rng.normal(size=s)) for s in shapes]
    count = 5 if op == "mlstm" else 3
    if op == "slstm":
        inputs[5].abs_()  # n
    weights = torch.tensor(rng.normal(size=(B, T, H, D)))
    mask = torch.tensor(rng.random((B, T)) < 0.7)
    call = getattr(keras_xlstm.ops, op)

    def loss(*inputs, mask=mask):
        rest = {"initial_state": inputs[count:], "mask": mask, "return_state": True}
        h, state = call(*inputs[:count], **rest, **options)
        return (h * weights).sum() + sum(s.square().sum() for s in state[:2])

    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    every = tuple(range(len(inputs)))
    got = torch.func.grad(loss, every)(*inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    tangents = tuple(torch.tensor(rng.normal(size=x.shape)) for x in inputs)
    slope = sum((a * b).sum() for a, b in zip(want, tangents, strict=True))
    _, got = torch.func.jvp(loss, tuple(inputs), tangents)
    torch.testing.assert_close(got, slope)
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, inputs, tangents)
        got = torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent
    torch.testing.assert_close(got, slope)
    for place, (a, b) in enumerate(zip(want, tangents, strict=True)):  # one argument alone
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            duals = list(inputs)
            duals[place] = torch.autograd.forward_ad.make_dual(inputs[place], b)
            got = torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent
        torch.testing.assert_close(got, (a * b).sum())
    several = [torch.stack([x, x + t]) for x, t in zip(inputs, tangents, strict=True)]
    got = torch.func.vmap(torch.func.grad(loss))(*several)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], torch.func.grad(loss)(*(x[1] for x in several)))


@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_second_derivatives_by_transforms(op, rng):
    """Against differences of first ones."""
    B, T, H, D = 2, 9, 2, 4
    if op == "mlstm":
        shapes, options = [(B, T, H, D)] * 3 + [(B, T, H)] * 2, {"chunk_size": 4, "eps": 0.0}
    else:
        shapes, options = [(B, T, 4, H, D), (H, D, 4, D), (4, H, D)], {}
    inputs, along = (
        [torch.tensor(factor * rng.normal(size=s)) for s in shapes] for factor in (1.0, 1e-5)
    )

    def loss(*inputs):
        return getattr(keras_xlstm.ops, op)(*inputs, **options).square().sum()

    first = torch.func.grad(loss, tuple(range(len(inputs))))
    _, got = torch.func.jvp(first, tuple(inputs), tuple(along))
    nested = torch.func.grad(
        lambda *x: sum((a * b).sum() for a, b in zip(first(*x), along, strict=True)),
        tuple(range(len(inputs))),
    )(*inputs)
    ends = [first(*(x + sign * d for x, d in zip(inputs, along, strict=True))) for sign in (1, -1)]
    for a, b, above, below in zip(got, nested, *ends, strict=True):
        want = (above - below) / 2
        torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-7 * want.abs().max().item())
        torch.testing.assert_close(b, a)


def test_transforms_do_not_clip(rng):
    x, R, *_ = arguments(rng)

    def loss(x):
        return keras_xlstm.ops.slstm(x, R, recurrent_gradient_clip=1.0).sum()

    with pytest.raises(ValueError, match="works under PyTorch's autograd; torch.func"):
        torch.func.grad(loss)(x)


def test_inference_keeps_no_history(rng):
    """Without gradients the loop holds two steps of c, n and m, and no gates."""
    inputs = [None if a is None else a.detach() for a in arguments(rng, T=50)]
    kept = slstm_module._forward(*inputs, False, 0.0, False)
    assert kept[1].shape[1] == 2
    assert kept[4].numel() == 0
    full = slstm_module._forward(*inputs, False, 0.0, True)
    for a, b in zip([kept[0], *kept[5:]], [full[0], *full[5:]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


IDS = np.random.default_rng(0).integers(1, 9, (4, 9), dtype="int32")


def language_model(jit_compile, loss=None, **options):
    keras.utils.set_random_seed(0)
    options = {"num_blocks": 2, "num_heads": 2, "seed": 3, **options}
    model = xLSTMLanguageModel(9, 8, **options)
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit_compile)
    return model


def losses(model):
    fit = model.fit(IDS[:, :-1], IDS[:, 1:], batch_size=2, epochs=2, shuffle=False, verbose=0)
    return [*fit.history["loss"], *keras.ops.sum(model.predict(IDS, verbose=0), (1, 2)).tolist()]


def test_a_model_is_compiled_by_its_blocks(monkeypatch, tmp_path):
    """One block of each kind, whose code the others run with their own weights, and the loss: of
    logits, and of parts of them."""
    compiled = []

    def compile_(function):
        compiled.append(function.__name__)
        return with_aot_eager(function)

    monkeypatch.setattr(torch, "compile", compile_)
    options = {"dropout": 0.2, "architecture": "large"}
    want = losses(language_model(False, **options))
    assert compiled == []
    model = language_model(True, **options)
    # Among them sums of logits that nearly cancel: 5e-6 on one processor, of 0.3.
    np.testing.assert_allclose(losses(model), want, rtol=1e-5, atol=2e-5)
    assert compiled == ["compute_xLSTMLargeBlock", "token_losses", "cross_entropy"]
    model.enable_lora(2)
    model.compile("sgd", model.loss, jit_compile=False)
    assert all(block.runner is run_plain for block in model.blocks)
    model.save(tmp_path / "model.keras")


class Plain(keras.losses.SparseCategoricalCrossentropy):
    """Not the class itself, so that Keras's own way is taken."""


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "mean_with_sample_weight"])
@pytest.mark.parametrize("weights", [None, "tokens", "rows"])
def test_the_loss_over_a_row_of_tokens_is_keras_own(reduction, weights, rng):
    y = torch.tensor(rng.integers(0, 9, (4, 8)))
    logits = torch.tensor(rng.normal(size=(4, 8, 9)).astype("float32"))
    shape = {None: None, "tokens": (4, 8), "rows": (4, 1)}[weights]
    weights = None if shape is None else torch.tensor(rng.random(shape).astype("float32"))
    found = []
    for Loss in (keras.losses.SparseCategoricalCrossentropy, Plain):
        model = language_model(False, Loss(from_logits=True, reduction=reduction))
        found.append(float(model.compute_loss(None, y, logits, weights)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
