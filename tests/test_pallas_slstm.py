"""The sLSTM's Pallas kernels against the float64 oracle, as test_pallas.py does the mLSTM's."""

import re

import keras
import numpy as np
import pytest
from test_ops import MASKS, make_mask, make_segments, sLSTMCase
from tools import HAS_PALLAS, array, assert_close, tensor

if not HAS_PALLAS:
    pytest.skip("Pallas's kernels belong to JAX, a newer one", allow_module_level=True)

import jax
from keras_xlstm.backends.jax.pallas import slstm as kernels
from test_pallas import DTYPES, GPU, interpreter, pretended_gpu  # noqa: F401  a fixture

import keras_xlstm


def check(case, dtype="float32", factor=1.0, **options):
    case.check(dtype, factor, implementation="pallas", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, rng):
    check(sLSTMCase(rng, state=state), dtype)


@pytest.mark.parametrize("T", [1, 2, 65])
def test_any_length(T, rng):
    check(sLSTMCase(rng, B=2, T=T, H=1))


@pytest.mark.parametrize("D", [1, 16, 17, 48, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(D, dtype, rng):
    check(sLSTMCase(rng, B=9, T=70 if GPU else 3, H=3, D=D), dtype)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("B", "D"),
    [(16, 128), (1, 100), (2100, 64), (16, 192), (9, 256), (70, 330), (3, 768), (17, 1024)],
)
def test_large(B, D, rng):
    check(sLSTMCase(rng, B=B, T=70, H=2, D=D), "bfloat16")


# Heads that several programs share on a GPU, in rounds of heads and rows: `processors` at once.
# By the interpreter, whose programs cannot wait for each other, one has all of a head.


@pytest.mark.parametrize("processors", [13, 30, 132] if GPU else [1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shared_heads(dtype, processors, rng, monkeypatch):
    monkeypatch.setattr(kernels.device, "processors", lambda: processors)
    check(sLSTMCase(rng, B=35, T=50 if GPU else 3, H=2, D=140), dtype)


def test_shared_heads_with_all_options(rng):
    mask, ids = make_mask("holes", 4, 9, rng), make_segments("returning", 4, 9, rng)
    case = sLSTMCase(rng, B=4, T=9, H=1, D=130)
    scale = rng.integers(0, 2, case.inputs["h"].shape) * 2.0
    check(
        case, "bfloat16", mask=mask, segment_ids=ids, recurrent_scale=scale, forget_gate="exp",
        recurrent_gradient_clip=0.2,
    )  # fmt: skip


def test_transformations_of_shared_heads(rng):
    """vmap must not make the grid larger than the device."""
    x, R = rng.normal(size=(3, 2, 4, 4, 1, 130)), rng.normal(size=(1, 130, 4, 130)) / 12
    x, R = (jax.numpy.asarray(a, "bfloat16") for a in (x, R))

    def gradient(x, R):
        def loss(x, R):
            h = jax.checkpoint(lambda x: keras_xlstm.ops.slstm(x, R, implementation="pallas"))(x)
            return (h.astype("float32") ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, R)

    alone = str(jax.make_jaxpr(gradient)(x[0], R))
    together = str(jax.make_jaxpr(jax.vmap(gradient, in_axes=(0, None)))(x, R))
    grids = [set(re.findall(r"grid=\([\d, ]+\)", jaxpr)) for jaxpr in (alone, together)]
    assert grids[0]
    assert grids[0] == grids[1]
    assert "scan" in together
    got = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(x, R)
    want = [gradient(row, R) for row in x]
    for index, a in enumerate(got):
        for row, b in zip(a, want, strict=True):
            assert_close(array(row), array(b[index]), 1e-2)


def test_one_step_of_shared_heads(rng):
    check(sLSTMCase(rng, B=2, T=1, H=1, D=130), "bfloat16")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "returning"])
def test_masks_and_segments(mask, segments, rng):
    mask, ids = make_mask(mask, 4, 9, rng), make_segments(segments, 4, 9, rng)
    check(sLSTMCase(rng, B=4, T=9), mask=mask, segment_ids=ids)


def test_options(rng):
    check(sLSTMCase(rng), forget_gate="exp")
    check(sLSTMCase(rng), recurrent_gradient_clip=0.2)
    case = sLSTMCase(rng)
    scale = rng.integers(0, 2, case.inputs["h"].shape) * 2.0
    check(case, recurrent_scale=scale, mask=make_mask("holes", 3, 20, rng))


@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates(seed):
    rng = np.random.default_rng(seed)
    case = sLSTMCase(rng)
    case.cotangents[1:] = [np.zeros_like(x) for x in case.cotangents[1:]]
    shape = case.inputs["x"][:, :, :2].shape
    case.inputs["x"][:, :, :2] += 1e4 * (rng.integers(0, 3, shape) - 1)
    check(case, factor=50.0)  # as native's, in test_ops.py


def test_a_row_that_starts_fresh(rng):
    case = sLSTMCase(rng)
    for name in "hcnm":
        case.inputs[name][0] = 0.0
    case.inputs["x"][:, 0, 0] -= 800.0
    check(case)


def test_without_state_and_bias(rng):
    case = sLSTMCase(rng, B=9)
    x, R = (tensor(case.inputs[name]) for name in ("x", "R"))

    def gradient(implementation):
        def loss(x, R):
            return (keras_xlstm.ops.slstm(x, R, implementation=implementation) ** 2).sum()

        return jax.grad(jax.jit(loss), argnums=(0, 1))(x, R)

    tolerance = 1e-2 if GPU else 2e-5  # there native's products are tf32, JAX's default
    for a, b in zip(gradient("pallas"), gradient("native"), strict=True):
        assert_close(a, array(b), tolerance)


def test_fit(rng):
    """Keras works out shapes with a batch that has no size."""
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def losses(use_kernel):
        keras.utils.set_random_seed(0)
        layer = keras_xlstm.layers.sLSTM(8, num_heads=2, use_kernel=use_kernel)
        model = keras.Sequential([keras.Input((20, 3)), layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-3 if GPU else 1e-4)


@pytest.mark.parametrize(
    ("dtype", "D"),
    [("bfloat16", 64), ("float16", 64), ("float32", 64), ("bfloat16", 192), ("float16", 768)],
)
def test_lowers_for_cuda_without_a_gpu(dtype, D, monkeypatch):
    B, T, H = 16, 300, 3
    shapes = [(B, T, 4, H, D), (H, D, 4, D), (4, H, D), *[(B, H, D)] * 4, *[(B, T)] * 2]
    dtypes = [dtype, *["float32"] * 6, "bool", "bool"]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def step(*arguments):
        *inputs, hold, reset = arguments

        def run(x, R, bias, *state):
            return kernels.slstm(x, R, bias, state, hold, reset, None, "sigmoid", 1.0)[0]

        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    with pretended_gpu(monkeypatch):
        traced = jax.jit(step).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "atomic" not in str(traced.jaxpr)  # the same sums in every run
    for name in ("slstm_forward", "slstm_backward"):
        assert name in lowered


def test_what_cannot_run_says_so(rng):
    case = sLSTMCase(rng, D=130)
    x, R = (tensor(case.inputs[name]) for name in ("x", "R"))
    with pytest.raises(ValueError, match="it takes up to 64 units a head in float32 here, not 130"):
        keras_xlstm.ops.slstm(x, R, implementation="pallas")
