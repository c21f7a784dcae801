"""The sLSTM's Triton kernels under JAX against the float64 oracle, as test_jax_triton.py does the
mLSTM's."""

import importlib.util

import keras
import pytest
from test_ops import MASKS, make_mask, make_segments, sLSTMCase
from tools import BACKEND, array, assert_close

if BACKEND != "jax" or not importlib.util.find_spec("triton"):
    pytest.skip("Triton's kernels under JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
from keras_xlstm.backends.jax import device, slstm_triton
from test_jax_triton import DTYPES, GPU, interpreter  # noqa: F401  a fixture

import keras_xlstm


def check(case, dtype="float32", factor=1.0, **options):
    case.check(dtype, factor, implementation="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, rng):
    check(sLSTMCase(rng, state=state), dtype)


@pytest.mark.parametrize("T", [1, 2, 17])
def test_any_length(T, rng):
    check(sLSTMCase(rng, B=2, T=T, H=1))


@pytest.mark.parametrize("D", [1, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(D, dtype, rng):
    check(sLSTMCase(rng, B=9, T=70 if GPU else 3, H=2, D=D), dtype)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("B", "D"),
    [(16, 128), (1, 100), (2100, 64), (16, 192), (9, 256), (70, 330), (3, 768), (17, 1024)],
)
def test_large(B, D, rng):
    check(sLSTMCase(rng, B=B, T=70, H=2, D=D), "bfloat16")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_large_in_float32(rng):
    check(sLSTMCase(rng, B=5, T=40, H=2, D=192))


# Heads that several programs share: on a GPU they wait for each other, in rounds of heads and rows
# where not all are there at once; the interpreter has a launch for every step.


@pytest.mark.parametrize("processors", [13, 30, 132] if GPU else [1])
def test_shared_heads(processors, rng, monkeypatch):
    monkeypatch.setattr(device, "processors", lambda: processors)
    B, T, D, dtype = (35, 50, 140, "bfloat16") if GPU else (3, 3, 70, "float32")
    check(sLSTMCase(rng, B=B, T=T, H=2, D=D), dtype)


def test_shared_heads_with_all_options(rng):
    mask, ids = make_mask("holes", 3, 5, rng), make_segments("returning", 3, 5, rng)
    case = sLSTMCase(rng, B=3, T=5, H=1, D=70)
    scale = rng.integers(0, 2, case.inputs["h"].shape) * 2.0
    check(
        case, mask=mask, segment_ids=ids, recurrent_scale=scale, forget_gate="exp",
        recurrent_gradient_clip=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "returning"])
def test_masks_and_segments(mask, segments, rng):
    B, T = 3, 9
    mask = make_mask(mask, B, T, rng)
    check(sLSTMCase(rng, B=B, T=T, H=1), mask=mask, segment_ids=make_segments(segments, B, T, rng))


@pytest.mark.parametrize("options", [{"forget_gate": "exp"}, {"recurrent_gradient_clip": 0.1}])
def test_options(options, rng):
    check(sLSTMCase(rng), **options)


# Heads of 32, 64, ... units in 16 bits: their programs are a cluster, on Hopper; interpreted, one.

HALVES = ["bfloat16", "float16"] if GPU else ["float16"]


def check_clustered(case, dtype, **options):
    x = case.inputs["x"]
    assert slstm_triton.cut_of(x.shape, jnp.dtype(dtype)).clustered
    check(case, dtype, **options)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [32, 64, 96, 128, 192, 256] if GPU else [32])
def test_clusters(D, dtype, rng):
    B, T = (9, 70) if GPU else (9, 3)
    check_clustered(sLSTMCase(rng, B=B, T=T, D=D), dtype)
    check_clustered(sLSTMCase(rng, B=B, T=T, D=D, state=False), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_clusters_with_all_options(dtype, rng):
    B, T, D = (11, 9, 128) if GPU else (3, 4, 32)
    mask, ids = make_mask("holes", B, T, rng), make_segments("returning", B, T, rng)
    case = sLSTMCase(rng, B=B, T=T, D=D)
    scale = rng.integers(0, 2, case.inputs["h"].shape) * 2.0
    check_clustered(
        case, dtype, mask=mask, segment_ids=ids, recurrent_scale=scale, forget_gate="exp",
        recurrent_gradient_clip=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [320, 768, 1024] if GPU else [96])
def test_wide_heads(D, dtype, rng):
    B, T = (9, 70) if GPU else (9, 3)
    case = sLSTMCase(rng, B=B, T=T, H=1, D=D)
    assert slstm_triton.cut_of(case.inputs["x"].shape, jnp.dtype(dtype)).wide
    check(case, dtype)


def test_transformations(rng):
    """jit, grad, remat, vmap."""
    x = jnp.asarray(rng.normal(size=(3, 2, 4, 4, 1, 20)), "float32")
    R = jnp.asarray(rng.normal(size=(1, 20, 4, 20)) / 5, "float32")

    def gradient(x, R, transform=lambda run: run):
        def loss(x, R):
            run = transform(lambda x: keras_xlstm.ops.slstm(x, R, implementation="triton"))
            return jnp.sum(run(x) ** 2)

        return jax.grad(loss, argnums=(0, 1))(x, R)

    want = [gradient(one, R) for one in x]
    for transform in (jax.jit, jax.checkpoint):
        for a, b in zip(gradient(x[0], R, transform), want[0], strict=True):
            assert_close(a, array(b), 1e-5)
    for n, got in enumerate(zip(*jax.vmap(gradient, (0, None))(x, R), strict=True)):
        for a, b in zip(got, want[n], strict=True):
            assert_close(a, array(b), 1e-5)


def test_what_cannot_run_says_so(monkeypatch):
    x = jnp.zeros((2, 3, 4, 1, 1100), "float32")
    assert "1024 units" in slstm_triton.unsupported(x)
    if not GPU:
        assert "float32 alone" in slstm_triton.unsupported(jnp.zeros((2, 3, 4, 1, 8), "bfloat16"))
    monkeypatch.setattr(device, "triton_interpreted", lambda: False)
    monkeypatch.setattr(device, "unsupported", lambda *args: None)
    monkeypatch.setattr(device, "processors", lambda: 10)
    monkeypatch.setattr(device, "shared_memory", lambda: 232_448)
    x = jnp.zeros((2, 3, 4, 1, 768), "bfloat16")
    assert "48 programs of a head of 768 units wait" in slstm_triton.unsupported(x)
    assert slstm_triton.unsupported(x[..., :128]) is None


def test_the_layer(rng):
    layer = keras_xlstm.layers.sLSTM(8, num_heads=2, use_kernel="auto")
    x = keras.ops.convert_to_tensor(rng.normal(size=(2, 5, 3)), "float32")
    want = layer(x)
    with keras_xlstm.backends.use("triton"):
        assert_close(layer(x), array(want), 1e-5)
