"""What the native forms choose by sizes, each against the float64 oracle: products inside the
sLSTM's loop, heads as one kernel, and the mLSTM read once after the last step."""

import keras
import numpy as np
import pytest
from cases import MASKS, flags, make_mask, make_segments, mLSTMCase, sLSTMCase
from keras_xlstm.backends import reference
from tools import BACKEND, array, assert_close, tensor, vjp

from keras_xlstm import backends
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.layers import mLSTM
from keras_xlstm.layers.projections import BlockDiagonal

B, T, F = 3, 11, 4
inside = pytest.mark.skipif(
    BACKEND == "torch" or backends.host_values(tensor(0.0)) is None,
    reason="PyTorch, and all on GPUs, multiply before the loop",
)


def check_inside(
    rng, monkeypatch, dtype="float32", joined=128, gate_scale=1.0, factor=1.0, **options
):
    """`ops.slstm` with an input kernel, which the loop multiplies by, against the oracle."""
    monkeypatch.setattr(backends, "multiplies_inside", lambda *arguments: True)
    monkeypatch.setattr(reference.framework, "joined_heads", joined)
    case = sLSTMCase(rng, B=B, T=T, H=2, D=3, gate_scale=gate_scale)
    x, W = rng.normal(size=(B, T, F)), rng.normal(size=(F, 24))
    W[:, :12] *= gate_scale
    names = case.names[1:]
    mask, segment_ids = options.pop("mask", None), options.pop("segment_ids", None)
    implementation = "native" if BACKEND == "jax" else None  # on a GPU, too
    given_names, given = flags(mask, segment_ids)

    def call(x, W, R, bias, h, c, n, m, *given):
        given = dict(zip(given_names, given, strict=True))
        h, state = xlstm_ops.slstm(
            x,
            R,
            bias,
            (h, c, n, m),
            return_state=True,
            kernel=W,
            implementation=implementation,
            **given,
            **options,
        )
        return h, *state

    inputs = [tensor(a, dtype) for a in (x, W, *(case.inputs[n] for n in names))]
    cotangents = [*(tensor(c, dtype) for c in case.cotangents), None]
    (h, *state), gradients = vjp(call, inputs, cotangents, given=given)
    x, W, *rest = (np.asarray(array(a), np.float64) for a in inputs)
    gates = (x @ W).reshape(B, T, 4, 2, 3)
    want_h, want_state, want = case.expected([gates, *rest], mask, segment_ids, **options)
    tolerance = factor * {"float32": 2e-5, "float64": 1e-10}[dtype]
    dg = want["x"].reshape(B, T, 24)
    assert_close(h, want_h, tolerance, "h")
    scale = np.exp(array(state[3]) - want_state[3])
    for a, b, name in zip(state, want_state, "hcn", strict=False):
        assert_close(array(a) * (scale if name in "cn" else 1), b, tolerance, name)
    wanted = [dg @ W.T, np.einsum("btf,btg->fg", x, dg), *(want[n] for n in names)]
    for a, b, name in zip(gradients, wanted, ("x", "kernel", *names), strict=True):
        assert_close(a, b, 2 * tolerance, f"gradient of {name}", 1e-6)


@inside
@pytest.mark.parametrize("joined", [0, 128])
@pytest.mark.parametrize("options", [
    {}, {"mask": "holes"}, {"segments": "random"}, {"mask": "left", "segments": "returning"},
    {"forget_gate": "exp"}, {"recurrent_gradient_clip": 0.05}, {"scale": True},
], ids=str)  # fmt: skip
def test_products_inside_the_loop(options, joined, rng, monkeypatch):
    options = dict(options)
    if "mask" in options:
        options["mask"] = make_mask(options["mask"], B, T, rng)
    if "segments" in options:
        options["segment_ids"] = make_segments(options.pop("segments"), B, T, rng)
    if options.pop("scale", False):
        options["recurrent_scale"] = rng.integers(0, 2, (B, 2, 3)) * 2.0
    check_inside(rng, monkeypatch, joined=joined, **options)


@inside
def test_products_inside_the_loop_in_float64_and_at_extreme_gates(rng, monkeypatch):
    check_inside(rng, monkeypatch, "float64")
    check_inside(rng, monkeypatch, gate_scale=1e3, factor=50.0)  # m itself is near 1e4


def test_what_a_kernel_argument_means(rng):
    """Before the loop or inside it: the gate inputs are the product."""
    x, W = rng.normal(size=(B, T, F)), rng.normal(size=(F, 24))
    R = tensor(rng.normal(size=(2, 3, 4, 3)))
    got = xlstm_ops.slstm(tensor(x), R, kernel=tensor(W))
    want = xlstm_ops.slstm(tensor((x @ W).reshape(B, T, 4, 2, 3)), R)
    assert_close(got, array(want), 1e-5)
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(F, 24\)"):
        xlstm_ops.slstm(tensor(x), R, kernel=tensor(W[:, :8]))


# ------------------------------------------------------------------------- the mLSTM read once


def check_last(case, dtype="float32", mask=None, factor=1.0, input_gate="exp"):
    """`mlstm_last` and its gradients against the oracle's step by step."""
    size = case.inputs["q"].shape[1]
    real = np.ones(case.inputs["q"].shape[:2], bool) if mask is None else mask
    last = np.where(real.any(1), size - 1 - real[:, ::-1].argmax(1), 0)
    rows = np.arange(len(last))
    inputs = {**case.inputs, "q": case.inputs["q"][rows, last]}
    inputs = [tensor(inputs[n], dtype) for n in case.names]
    cotangent = case.cotangents[0][rows, last] * real.any(1)[:, None, None]
    names, given = flags(mask, None)

    def call(q, k, v, i, f, C, n, m, *given):
        given = dict(zip(names, given, strict=True))
        h, state = xlstm_ops.mlstm_last(q, k, v, i, f, (C, n, m), input_gate=input_gate, **given)
        return h, *state

    cotangents = [tensor(c, dtype) for c in (cotangent, *case.cotangents[1:])] + [None]
    (h, C, n, m), gradients = vjp(call, inputs, cotangents, given=given)
    all_of = [np.asarray(array(a), np.float64) for a in inputs]
    q = np.zeros(case.inputs["q"].shape)
    q[rows, last] = all_of[0]
    at_last = np.zeros(case.cotangents[0].shape)
    at_last[rows, last] = cotangent
    case.cotangents[0] = at_last
    want_h, want_state, want = case.expected([q, *all_of[1:]], mask, input_gate=input_gate)
    tolerance = factor * {"float32": 2e-5, "float64": 1e-10}[dtype]
    some = real.any(1)
    assert_close(array(h)[some], want_h[rows, last][some], tolerance, "h")
    scale = np.exp(array(m) - want_state[2])
    states = (array(C) * scale[..., None, None], array(n) * scale[..., None], m)
    for name, a, b in zip("Cnm", states, want_state, strict=True):
        assert_close(a, b, tolerance, f"last {name}")
    want["q"] = want["q"][rows, last]
    for name, a in zip(case.names, gradients, strict=True):
        assert_close(a, want[name], 2 * tolerance, f"gradient of {name}", 1e-6)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("size", [2, 20, 67])
def test_read_once(size, input_gate, rng):
    check_last(mLSTMCase(rng, T=size), input_gate=input_gate)
    check_last(mLSTMCase(rng, T=size, state=False), "float64", input_gate=input_gate)


@pytest.mark.parametrize("mask", MASKS)
def test_read_once_behind_masks(mask, rng):
    check_last(mLSTMCase(rng, T=20), mask=make_mask(mask, 3, 20, rng))


@pytest.mark.parametrize("seed", range(3))
def test_read_once_at_extreme_gates(seed):
    rng = np.random.default_rng(seed)
    case = mLSTMCase(rng, T=40).extreme(rng)
    check_last(case, factor=5.0)


@pytest.mark.parametrize("mask", [None, "holes", "left"])
@pytest.mark.parametrize("options", [{}, {"go_backwards": True}, {"value_dim": 3}], ids=str)
def test_layers_without_sequences(options, mask, rng):
    """The last of all outputs, and the states, as with `return_sequences`."""
    x = tensor(rng.normal(size=(B, T, 6)))
    mask = None if mask is None else tensor(make_mask(mask, B, T, rng), "bool")
    last, whole = (
        mLSTM(4, num_heads=2, return_state=True, return_sequences=all_of, **options)
        for all_of in (False, True)
    )
    for layer in (last, whole):
        layer.build((B, None, 6))
    whole.set_weights([w + 0.3 * rng.normal(size=w.shape) for w in whole.get_weights()])
    last.set_weights(whole.get_weights())
    state = [rng.normal(size=s.shape).astype("float32") for s in last.get_initial_state(B)]
    for given in (None, state):
        got, want = (layer(x, initial_state=given, mask=mask) for layer in (last, whole))
        # Masked steps repeat the newest real one.
        assert_close(got[0], array(want[0])[:, -1], 1e-5, "outputs")
        for a, b in zip(got[1:], want[1:], strict=True):
            assert_close(a, array(b), 2e-5, "a state")


@pytest.mark.skipif(backends.host_values(tensor(0.0)) is None, reason="64 on GPUs")
def test_chunks_follow_the_size_of_a_memory():
    sizes = {
        (8, 8, 100): 8, (16, 16, 200): 16, (64, 64, 512): 64, (128, 128, 512): 64,
        (32, 32, 60): 60, (64, 64, 60): 60,
    }  # fmt: skip
    sizes = {key: 64 for key in sizes} if BACKEND == "torch" else sizes
    for key, want in sizes.items():
        assert reference.framework.chunk_size(*key) == want, key


def test_projections_in_blocks(rng, monkeypatch):
    """One product with zeros between blocks, with its gradient."""
    monkeypatch.setattr(reference.framework, "joined_blocks", lambda: 12)
    x, dy = (rng.normal(size=(B, T, 12)) for _ in range(2))
    W = rng.normal(size=(3, 4, 4))
    (y,), (dx, dW) = vjp(
        lambda x, W: (backends.block_diagonal(x, W),), [tensor(x), tensor(W)], [tensor(dy)]
    )
    x, dy = x.reshape(B, T, 3, 4), dy.reshape(B, T, 3, 4)
    assert_close(array(y), np.einsum("bthi,hio->btho", x, W).reshape(B, T, 12), 1e-6)
    assert_close(array(dx), np.einsum("btho,hio->bthi", dy, W).reshape(B, T, 12), 1e-6)
    assert_close(array(dW), np.einsum("bthi,btho->hio", x, dy), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("joined", [0, 12])
def test_layer_of_projections_in_blocks(joined, dtype, rng, monkeypatch):
    """Also with low-rank updates and in int8, which are EinsumDense's own."""
    monkeypatch.setattr(reference.framework, "joined_blocks", lambda: joined)
    layer = BlockDiagonal(3, 4, True, bias_initializer="normal", dtype=dtype)
    layer.build((None, None, 3, 4))
    x = tensor(rng.normal(size=(B, T, 3, 4)), layer.compute_dtype)

    def check():
        want = np.einsum("bthi,hio->btho", as_float32(x), as_float32(layer.kernel))
        y = layer(x)
        assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
        tolerance = 1e-2 if "bfloat16" in dtype else 1e-6
        assert_close(as_float32(y), want + as_float32(layer.bias), tolerance)

    check()
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.5))
    check()
    if dtype == "float32":
        before = layer(x)
        layer.quantize("int8")
        assert layer.quantization_mode == "int8"
        assert_close(array(layer(x)), array(before), 0.05)


def as_float32(x):
    return array(keras.ops.cast(x, "float32"))
