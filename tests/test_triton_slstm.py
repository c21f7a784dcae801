"""The sLSTM's Triton kernels against the float64 oracle; without a GPU test_triton.py runs this
file, too, in a process that interprets them."""

import keras
import numpy as np
import pytest
from test_ops import MASKS, make_mask, make_segments, sLSTMCase
from test_triton import (
    DTYPES,
    GPU,
    INTERPRETED,
    assert_exports_natively,
    assert_same_in_a_cuda_graph,
    no_plans,  # noqa: F401  a fixture
    on_gpu,
    poisoned,
)
from tools import array, assert_close, tensor

if not (GPU or INTERPRETED):
    pytest.skip("needs a GPU, or the interpreter", allow_module_level=True)

import torch
from keras_xlstm.backends.kernels.slstm import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch import slstm as kernels

import keras_xlstm

# A head in one program, and in several.
ONE, SEVERAL = {"D": 6, "T": 9}, {"D": 70, "T": 9 if GPU else 3, "H": 1}
both = pytest.mark.parametrize("sizes", [ONE, SEVERAL], ids=["one", "several"])


def cut_of(x):
    B, T, _, H, D = x.shape
    return plan.Cut(device.of(x.device, x.dtype), B, T, H, D, x.dtype.itemsize)


def check(case, dtype="float32", factor=1.0, **options):
    with poisoned():
        case.check(dtype, factor, compiled=False, implementation="triton", **options)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, sizes, rng):
    check(sLSTMCase(rng, state=state, **sizes), dtype)


@pytest.mark.parametrize("T", [1, 2, 3, 65])
def test_any_length(T, rng):
    check(sLSTMCase(rng, B=2, T=T, H=1))
    if T < 65 or GPU:
        check(sLSTMCase(rng, B=2, T=T, H=1, D=70))


@pytest.mark.parametrize("D", [1, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(D, dtype, rng):
    check(sLSTMCase(rng, B=2, T=40 if GPU else 2, H=2, D=D), dtype)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [128, 192, 256, 300, 768, 1024])
def test_large_heads(D, dtype, rng):
    check(sLSTMCase(rng, B=9, T=70, H=2 if D < 700 else 1, D=D), dtype)


@pytest.mark.parametrize("B", [1, 8, 9, 33])
@both
def test_rows_of_a_batch(B, sizes, rng):
    check(sLSTMCase(rng, B=B, **{**sizes, "T": 2}))


@on_gpu
@pytest.mark.parametrize(("B", "D"), [(200, 192), (500, 70), (2100, 64), (300, 128)])
def test_more_rows_than_run_at_once(B, D, rng):
    """Several launches, each of programs that are all resident; larger tiles of rows."""
    check(sLSTMCase(rng, B=B, T=12, H=2, D=D), "bfloat16")


@pytest.mark.parametrize("processors", [1, 7, 13])
def test_small_devices(processors, rng, monkeypatch):
    """Too few processors for the programs of a head: a launch for every step."""
    if INTERPRETED and processors > 1:
        pytest.skip("the interpreter runs one program after the other")
    monkeypatch.setattr(device, "processors", lambda device: processors)
    monkeypatch.setattr(device, "all_shared_memory", device.shared_memory)
    T, D = (6, 200) if GPU else (3, 136)  # more units than one round has, and a rest
    cut = cut_of(tensor(np.zeros((9, T, 4, 2, D))))
    assert cut.waits == (cut.tiles <= cut.resident)
    mask = make_mask("holes", 9, T, rng)
    ids = make_segments("growing", 9, T, rng)
    check(sLSTMCase(rng, B=9, T=T, D=D), mask=mask, segment_ids=ids)


@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "growing", "returning"])
def test_masks_and_segments(mask, segments, sizes, rng):
    if INTERPRETED and sizes is SEVERAL and (mask == "rows") != (segments is None):
        # The kernel is told where to hold and where to start afresh, not why.
        pytest.skip("no other code of the kernel, which the interpreter is slow in")
    B, T = 4, 9 if GPU or sizes is ONE else 3
    mask = make_mask(mask, B, T, rng)
    ids = make_segments(segments, B, T, rng)
    check(sLSTMCase(rng, B=B, **{**sizes, "T": T}), mask=mask, segment_ids=ids)


@both
def test_options(sizes, rng):
    check(sLSTMCase(rng, **sizes), forget_gate="exp")
    check(sLSTMCase(rng, **sizes), recurrent_gradient_clip=0.2)
    case = sLSTMCase(rng, **sizes)
    shape = case.inputs["h"].shape
    T = case.inputs["x"].shape[1]
    scale = rng.integers(0, 2, shape) * 2.0
    check(case, recurrent_scale=scale, mask=make_mask("holes", shape[0], T, rng))


@both
@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates(seed, sizes):
    rng = np.random.default_rng(seed)
    case = sLSTMCase(rng, **sizes)
    case.cotangents[1:] = [np.zeros_like(x) for x in case.cotangents[1:]]
    shape = case.inputs["x"][:, :, :2].shape
    case.inputs["x"][:, :, :2] += 1e4 * (rng.integers(0, 3, shape) - 1)
    check(case, factor=50.0)  # as native's, in test_ops.py


@both
def test_a_row_that_starts_fresh(sizes, rng):
    case = sLSTMCase(rng, **sizes)
    for name in "hcnm":
        case.inputs[name][0] = 0.0
    case.inputs["x"][:, :, 0] -= 800.0
    case.cotangents[3][:] = 0.0  # n itself is not the same number at another m
    check(case, factor=50.0)


@both
def test_no_bias(sizes, rng):
    case = sLSTMCase(rng, **sizes)
    x, R = (tensor(case.inputs[n]).requires_grad_() for n in ("x", "R"))
    found = []
    for implementation in ("triton", "native"):
        h = keras_xlstm.ops.slstm(x, R, implementation=implementation)
        found.append([h, *torch.autograd.grad((h**2).sum(), (x, R))])
    for a, b in zip(*found, strict=True):
        assert_close(a, array(b), 2e-5)


@both
def test_nan_reaches_the_output(sizes, rng):
    """And ends: what programs wait for is not to be confused with a NaN of the user's."""
    case = sLSTMCase(rng, **sizes)
    for bits in (0xFFFFFFFF, 0x7FC00000, 0xFFFF0000):
        nan = np.array([bits], "uint32").view("float32")[0]
        inputs = [tensor(case.inputs[n].astype("float32")) for n in case.names]
        inputs[0][1, 2] = float("nan")
        inputs[3][2] = torch.tensor(nan)
        h = keras_xlstm.ops.slstm(*inputs[:3], inputs[3:], implementation="triton")
        lost = np.isnan(array(h)).any((2, 3))
        np.testing.assert_array_equal(lost[0], False)
        np.testing.assert_array_equal(lost[1], np.arange(lost.shape[1]) >= 2)
        np.testing.assert_array_equal(lost[2], True)


@both
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_steps_are_the_sequence(forget_gate, sizes, rng):
    case = sLSTMCase(rng, **sizes)
    inputs = [tensor(case.inputs[n]) for n in case.names]
    options = {"return_state": True, "implementation": "triton", "forget_gate": forget_gate}
    for state in (inputs[3:], [torch.zeros_like(s) for s in inputs[3:]]):
        want, want_state = keras_xlstm.ops.slstm(*inputs[:3], state, **options)
        out = []
        for t in range(want.shape[1]):
            step = inputs[0][:, t : t + 1]
            h, state = keras_xlstm.ops.slstm(step, *inputs[1:3], state, **options)
            out.append(array(h))
        assert_close(np.concatenate(out, 1), array(want), 2e-5)
        for a, b in zip(state, want_state, strict=True):
            assert_close(a, array(b), 2e-5)


@pytest.mark.parametrize(("changed", "words"), [
    ({"dtype": "float64"}, "dtypes are float32, bfloat16 and float16, not float64"),
    ({"D": 1025}, "up to 1024 units a head, not 1025"),
], ids=["float64", "1025"])  # fmt: skip
def test_what_does_not_fit_is_refused_or_native(changed, words, rng):
    dtype = changed.get("dtype", "float32")
    case = sLSTMCase(rng, B=1, T=2, H=1, D=changed.get("D", 3))
    inputs = [tensor(case.inputs[n], dtype) for n in case.names[:3]]
    with pytest.raises(ValueError, match=words):
        keras_xlstm.ops.slstm(*inputs, implementation="triton")
    h = keras_xlstm.ops.slstm(*inputs)
    native = keras_xlstm.ops.slstm(*inputs, implementation="native")
    np.testing.assert_array_equal(array(h), array(native))


def test_a_device_with_little_shared_memory_says_so(rng, monkeypatch):
    monkeypatch.setattr(device, "shared_memory", lambda device: 30_000)
    case = sLSTMCase(rng, B=1, T=2, H=1, D=300)
    inputs = [tensor(case.inputs[n]) for n in case.names[:3]]
    with pytest.raises(ValueError, match="300 units are too large for the device's shared mem"):
        keras_xlstm.ops.slstm(*inputs, implementation="triton")
    check(sLSTMCase(rng, B=1, T=2, H=1, D=40))  # in one program it needs little


def _small(rng, **sizes):
    case = sLSTMCase(rng, **sizes)
    return [tensor(case.inputs[n]).requires_grad_() for n in case.names]


@both
def test_operators_are_well_formed(sizes, rng):
    x, R, bias, *state = _small(rng, **{**sizes, "T": 2})
    flags = torch.zeros(x.shape[:2], dtype=torch.int8, device=x.device)
    for given in ((bias, *state, flags, flags, state[0].detach()), (None,) * 8):
        torch.library.opcheck(kernels._forward.call, (x, R, *given, False, 0.0, True))


@both
def test_second_derivatives_are_refused(sizes, rng):
    x, R, bias, *_ = _small(rng, **sizes)
    h = keras_xlstm.ops.slstm(x, R, bias, implementation="triton")
    (gradient,) = torch.autograd.grad((h**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sLSTM has first derivatives only"):
        torch.autograd.grad(gradient.sum(), x)


def _run(*a):
    return keras_xlstm.ops.slstm(*a, implementation="triton") ** 2


@both
def test_recomputed_activations(sizes, rng):
    inputs = _small(rng, **sizes)[:3]
    want = torch.autograd.grad(_run(*inputs).sum(), inputs)
    h = torch.utils.checkpoint.checkpoint(_run, *inputs, use_reentrant=False)
    got = torch.autograd.grad(h.sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@both
def test_compiled_whole(sizes, rng):
    inputs = _small(rng, **sizes)[:3]
    explained = torch._dynamo.explain(_run)(*inputs)
    assert explained.graph_break_count == 0
    assert "keras_xlstm.slstm_triton_forward" in str(explained.graphs[0].graph)
    want = torch.autograd.grad(_run(*inputs).sum(), inputs)
    compiled = torch.compile(_run, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).sum(), inputs), want, strict=True):
        torch.testing.assert_close(a, b)


def _losses(use_kernel):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 9, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    keras.utils.set_random_seed(0)
    layer = keras_xlstm.layers.sLSTM(8, num_heads=2, use_kernel=use_kernel)
    model = keras.Sequential([keras.Input((9, 3)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]


def test_fit():
    np.testing.assert_allclose(_losses(True), _losses(False), rtol=1e-4)


def test_export_is_native(rng):
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    model = keras.Sequential([keras.Input((6, 3)), keras_xlstm.layers.sLSTM(4, num_heads=2)])
    assert_exports_natively(model, x)


@on_gpu
@pytest.mark.parametrize("T", [1, 20])
@both
def test_in_a_cuda_graph(T, sizes, rng):
    case = sLSTMCase(rng, **{**sizes, "T": T})
    inputs = [tensor(case.inputs[n]) for n in case.names]

    def run():
        return keras_xlstm.ops.slstm(
            *inputs[:3], inputs[3:], return_state=True, implementation="triton"
        )

    assert_same_in_a_cuda_graph(run)
