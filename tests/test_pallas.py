"""The Pallas kernels against the float64 oracle: on a GPU, or on the CPU by Pallas's interpreter;
and their lowering for CUDA with no GPU there."""

import contextlib

import keras
import numpy as np
import pytest
from test_ops import (
    MASKS,
    assert_a_step_resets,
    make_mask,
    make_segments,
    mLSTMCase,
    with_extreme_gates,
)
from tools import HAS_PALLAS, array, assert_close, call, tensor

if not HAS_PALLAS:
    pytest.skip("Pallas's kernels belong to JAX, a newer one", allow_module_level=True)

import jax
import jax.numpy as jnp
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.pallas import mlstm as kernels
from keras_xlstm.backends.kernels.mlstm import tiles

import keras_xlstm

GPU = jax.default_backend() == "gpu"
DTYPES = ["float32", "bfloat16", "float16"] if GPU else ["float32", "bfloat16"]
SIZES = [(5, 7), (20, 40), (64, 16)]
if GPU:
    SIZES += [(128, 256), (256, 512), (192, 96), (512, 64), (16, 1024)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    """Lowering for a GPU that is not there."""
    monkeypatch.delenv("KERAS_XLSTM_INTERPRET", raising=False)
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(device, "shared_memory", lambda: 232_448)
    monkeypatch.setattr(device, "processors", lambda: 132)
    with contextlib.ExitStack() as stack:
        if hasattr(jax.sharding, "AbstractDevice"):  # JAX 0.12 asks which GPU it is
            gpu = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
            mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield


def check(case, dtype="float32", factor=1.0, chunk_size=16, **options):
    case.check(dtype, factor, chunk_size=chunk_size, implementation="pallas", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, rng):
    check(mLSTMCase(rng, state=state), dtype)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 65])
def test_any_length(T, rng):
    check(mLSTMCase(rng, B=2, T=T, H=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_sizes(K, V, dtype, rng):
    T, chunk_size = (600, None) if GPU else (20, 16)
    check(mLSTMCase(rng, B=2, T=T, H=3, K=K, V=V), dtype, chunk_size=chunk_size)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512])
def test_chunk_sizes(chunk_size, rng):
    check(mLSTMCase(rng, B=1, T=700, H=1, K=64, V=64), "bfloat16", chunk_size=chunk_size)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), [(20, 40), (128, 256)])
def test_many_heads(K, V, dtype, rng, monkeypatch):
    """Their programs take the state through all chunks."""
    monkeypatch.setattr(device, "processors", lambda: 1)
    check(mLSTMCase(rng, B=1, T=500, H=2, K=K, V=V), dtype, chunk_size=64)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("T", [256, 512, 768, 1280, 1792, 2000])
@pytest.mark.parametrize(("H", "K", "V"), [(3, 128, 256), (2, 256, 512)])
def test_no_race_at_any_number_of_chunks(T, H, K, V, rng):
    """XLA's Triton has compiled these kernels into a race where a program divided by 3 or 7."""
    check(mLSTMCase(rng, B=3, T=T, H=H, K=K, V=V), "bfloat16", chunk_size=None)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "returning"])
def test_masks_and_segments(mask, segments, rng):
    B, T = 4, 37
    mask = make_mask(mask, B, T, rng)
    check(mLSTMCase(rng, B=B, T=T, H=1), mask=mask, segment_ids=make_segments(segments, B, T, rng))


@pytest.mark.parametrize("segments", [None, "growing"])
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_states_by_chunks(segments, state, rng, monkeypatch):
    """The way of few heads: every chunk's sum on its own, then along the borders; more borders
    than are loaded at a time, and a rest."""
    monkeypatch.setattr(device, "processors", lambda: 10**9)
    ids = make_segments(segments, 2, 163, rng)
    check(mLSTMCase(rng, B=2, T=163, K=20, V=30, state=state), segment_ids=ids)


@pytest.mark.parametrize("options", [{"input_gate": "sigmoid"}, {"eps": 0.0}, {"eps": 0.1}])
def test_options(options, rng):
    check(mLSTMCase(rng), **options)


@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates(seed):
    check(with_extreme_gates(seed), factor=5.0)  # as native's, in test_ops.py


def test_a_row_that_starts_fresh(rng):
    case = mLSTMCase(rng)
    for name in "Cnm":
        case.inputs[name][0] = 0.0
    case.inputs["i"][:, 0] -= 800.0
    check(case)


def test_nothing_reaches_past_a_mask(rng):
    mask = make_mask("holes", 3, 20, rng)
    case = mLSTMCase(rng, B=3, T=20)
    options = {"mask": mask, "implementation": "pallas", "chunk_size": 16}
    clean = case.run("float32", **options)[0]
    for name in case.names[:5]:
        case.inputs[name][~mask] = np.nan
    poisoned = case.run("float32", **options)[0]
    for a, b in zip([*clean[0], *clean[1]], [*poisoned[0], *poisoned[1]], strict=True):
        np.testing.assert_array_equal(array(a), array(b))


def _inputs(rng, B=2, T=20, H=2, K=4, V=6):
    case = mLSTMCase(rng, B=B, T=T, H=H, K=K, V=V)
    return [tensor(case.inputs[name]) for name in case.names[:5]]


def _run(*inputs, implementation="pallas"):
    return keras_xlstm.ops.mlstm(*inputs, implementation=implementation)


def test_transformations(rng):
    """jit, grad, remat, vmap."""
    inputs = _inputs(rng)

    def gradient(transform):
        def loss(*inputs):
            return jnp.sum(_run(*inputs) ** 2)

        return jax.grad(transform(loss), argnums=(0, 1, 2, 3, 4))(*inputs)

    want = gradient(lambda loss: loss)
    for transform in (jax.jit, jax.checkpoint):
        for a, b in zip(gradient(transform), want, strict=True):
            assert_close(a, array(b), 1e-5)
    stacked = [jnp.stack([x, 2 * x]) for x in inputs]
    got = jax.vmap(_run)(*stacked)
    for index in range(2):
        assert_close(got[index], array(_run(*(x[index] for x in stacked))), 1e-5)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("spec", [("data",), (None, None, "data")], ids=["batch", "heads"])
def test_shard_map(spec, rng):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*spec)
    inputs = _inputs(rng)
    # A kernel does not say over which axes its results vary: check_vma=False.
    sharded = jax.shard_map(
        _run, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False
    )  # fmt: skip

    def gradient(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2, 3, 4)))

    for a, b in zip(gradient(sharded)(*inputs), gradient(_run)(*inputs), strict=True):
        assert_close(a, array(b), 1e-5)


@pytest.mark.parametrize("batch", [4, None], ids=["static", "symbolic"])
def test_fit(batch, rng):
    """Keras works out shapes with a symbolic batch."""
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def losses(use_kernel):
        keras.utils.set_random_seed(0)
        layer = keras_xlstm.layers.mLSTM(8, num_heads=2, use_kernel=use_kernel)
        inputs = keras.Input((20, 3), batch_size=batch)
        model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
        model.compile("sgd", "mse")
        return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", [(4, 600, 2, 128, 256), (1, 9000, 2, 256, 512)], ids=str)
def test_lowers_for_cuda_without_a_gpu(sizes, dtype, monkeypatch):
    B, T, H, K, V = sizes
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    shapes += [(B, H, K, V), (B, H, K), (B, H), (B, T)]
    dtypes = [dtype] * 5 + ["float32"] * 3 + ["int32"]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def step(*arguments):
        *inputs, ids = arguments

        def run(q, k, v, i, f, *state):
            return kernels.mlstm(
                q, k, v, i, f, state, ids, input_gate="exp", eps=1e-6, chunk_size=None
            )[0]

        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    with pretended_gpu(monkeypatch):
        traced = jax.jit(step).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "atomic" not in str(traced.jaxpr)  # the same sums in every run
    for name in ("mlstm_h", "mlstm_dq", "mlstm_dk", "mlstm_dv", "mlstm_chunks", "mlstm_borders"):
        assert name in lowered


def test_what_cannot_run_says_so(rng, monkeypatch):
    inputs = _inputs(rng)
    with pytest.raises(ValueError, match="its chunk sizes are 16, 32"):
        keras_xlstm.ops.mlstm(*inputs, implementation="pallas", chunk_size=20)
    wide = _inputs(rng, K=520)
    with pytest.raises(ValueError, match="up to 512 key and 1024 value dimensions"):
        _run(*wide)
    with pytest.raises(ValueError, match="it takes batches of 1 to 65535, not of 0"):
        _run(*(x[:0] for x in inputs))
    with pytest.raises(ValueError, match="its dtypes are float32, bfloat16 and float16"):
        _run(*(x.astype("float64") for x in inputs))
    if not GPU:
        monkeypatch.delenv("KERAS_XLSTM_INTERPRET")
        with pytest.raises(ValueError, match="it needs arrays on a GPU, not on cpu"):
            _run(*inputs)
        assert keras_xlstm.backends.available()["mlstm"]["pallas"].startswith("it needs a GPU")
        layer = keras_xlstm.layers.mLSTM(4, num_heads=2, use_kernel=True)
        with pytest.raises(ValueError, match="needs a GPU"):
            call(layer, np.zeros((2, 5, 3), "float32"))


def test_tiles_of_a_step():
    """By how many heads there are: more programs, or larger ones."""
    assert tiles.pallas_step(8, 256, 512) == (32, 64, 4)
    assert tiles.pallas_step(512, 256, 512) == (128, 64, 16)
    assert tiles.pallas_step(10**6, 128, 512) == (32, 64, 4)
    assert tiles.pallas_step(8, 16, 16) == (16, 16, 4)


@pytest.mark.parametrize(("options", "own"), [
    ({}, (16, 64, 4)), ({"input_gate": "sigmoid"}, (32, 32, 4)), ({"eps": 0.0}, (64, 64, 16)),
], ids=str)  # fmt: skip
def test_steps_are_the_sequence(options, own, rng, monkeypatch):
    monkeypatch.setattr(tiles, "pallas_step", lambda *sizes: own)
    case = mLSTMCase(rng, T=5, K=64, V=128)
    case.inputs["i"][:, 3] -= 1e4
    inputs = [tensor(case.inputs[n]) for n in case.names]
    call = {"return_state": True, "implementation": "pallas", **options}
    for state in (inputs[5:], [jnp.zeros_like(s) for s in inputs[5:]]):
        want, want_state = keras_xlstm.ops.mlstm(*inputs[:5], state, **call)
        out = []
        for t in range(5):
            step = [a[:, t : t + 1] for a in inputs[:5]]
            h, state = keras_xlstm.ops.mlstm(*step, state, **call)
            out.append(array(h))
        assert_close(np.concatenate(out, 1), array(want), 2e-5)
        for a, b in zip(state, want_state, strict=True):
            assert_close(a, array(b), 2e-5)


def test_a_step_may_reset_and_has_gradients(rng):
    case = mLSTMCase(rng, T=1, K=16, V=32)
    check(case)
    assert_a_step_resets(case, "pallas")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("layer", ["mLSTM", "sLSTM"])
def test_fit_over_two_devices(layer, rng):
    """Each device runs the kernels on its part of the batch."""
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def losses(devices):
        keras.utils.set_random_seed(0)
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:devices])
        )
        try:
            memory = getattr(keras_xlstm.layers, layer)(8, num_heads=2, use_kernel=True)
            model = keras.Sequential([keras.Input((20, 3)), memory, keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        finally:
            keras.distribution.set_distribution(None)

    np.testing.assert_allclose(losses(2), losses(1), rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_batch_that_devices_cannot_share(rng):
    devices = keras.distribution.list_devices()[:2]
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        with pytest.raises(ValueError, match="splits the batch of 3 among 2 devices"):
            _run(*_inputs(rng, B=3))
    finally:
        keras.distribution.set_distribution(None)


def test_generation(rng):
    """A prompt and single steps through the kernels give what the native form gives."""
    keras.utils.set_random_seed(0)
    model = keras_xlstm.models.xLSTMLanguageModel(
        20, units=64, num_blocks=1, num_heads=2, architecture="large"
    )
    prompts = [[1, 2, 3], [4]]
    with keras_xlstm.backends.use("native"):
        want = model.generate(prompts, max_new_tokens=5, temperature=0.0)
    twin = model.__class__.from_config(model.get_config())
    twin.set_weights(model.get_weights())
    with keras_xlstm.backends.use("pallas"):
        assert [list(t) for t in twin.generate(prompts, max_new_tokens=5, temperature=0.0)] == [
            list(t) for t in want
        ]


def test_norm_apart_from_its_fusions(monkeypatch, rng):
    """What keeps XLA from fusing on a GPU changes no number, and has a gradient and a vmap."""
    layer = keras_xlstm.layers.MultiHeadNorm(2)
    x, dy = (jax.numpy.asarray(rng.normal(size=(3, 2, 5, 8)), "float32") for _ in "xy")
    layer.build(x.shape[1:])
    # A function for each: JAX keeps what it traced by function.
    alone, apart = (jax.vmap(jax.grad(lambda x, dy: (layer(x) * dy).sum())) for _ in "ab")
    want = alone(x, dy)
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    assert "optimization_barrier" in str(jax.make_jaxpr(apart)(x, dy))
    assert_close(array(apart(x, dy)), array(want), 1e-6)
