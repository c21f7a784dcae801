"""Our Triton kernels under JAX against the float64 oracle: on a GPU, or on the CPU by Triton's
interpreter; and what jaxlib is to launch on Hopper, with no GPU there."""

import importlib.util
import pathlib
import subprocess
import sys

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
from tools import BACKEND, array, assert_close, tensor

if BACKEND != "jax" or not importlib.util.find_spec("triton"):
    pytest.skip("Triton's kernels under JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
from keras_xlstm.backends.jax import device, mlstm_triton, triton_launch

import keras_xlstm

GPU = jax.default_backend() == "gpu"
DTYPES = ["float32", "bfloat16", "float16"] if GPU else ["float32"]
SIZES = [(5, 7), (20, 40)]
if GPU:
    SIZES += [(64, 128), (128, 256), (256, 512), (192, 96), (512, 64), (16, 1024)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        pytest.importorskip("torch")  # whose tensors the interpreter takes
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        import triton_interpreter  # noqa: F401  registers the lowering for CPUs


def check(case, dtype="float32", factor=1.0, chunk_size=16, **options):
    case.check(dtype, factor, chunk_size=chunk_size, implementation="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, rng):
    check(mLSTMCase(rng, state=state), dtype)


@pytest.mark.parametrize("T", [1, 16, 17, 65])
def test_any_length(T, rng):
    check(mLSTMCase(rng, B=2, T=T, H=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_sizes(K, V, dtype, rng):
    T, chunk_size = (600, None) if GPU else (20, 16)
    check(mLSTMCase(rng, B=2, T=T, H=3, K=K, V=V), dtype, chunk_size=chunk_size)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("T", [256, 768, 1024])
@pytest.mark.parametrize("many", [True, False], ids=["many heads", "few heads"])
@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 256), (256, 512)])
def test_whole_chunks(K, V, many, T, rng, monkeypatch):
    """On Hopper: kernels of its own, whose programs take a head through all chunks or not."""
    monkeypatch.setattr(device, "processors", lambda: 1 if many else 10**6)
    check(mLSTMCase(rng, B=2, T=T, H=2, K=K, V=V), "bfloat16", chunk_size=None)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "returning"])
def test_masks_and_segments(mask, segments, rng):
    B, T = 4, 37
    mask = make_mask(mask, B, T, rng)
    check(mLSTMCase(rng, B=B, T=T, H=1), mask=mask, segment_ids=make_segments(segments, B, T, rng))


@pytest.mark.parametrize("segments", [None, "growing"])
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_states_by_chunks(segments, state, rng, monkeypatch):
    """The way of few heads: every chunk's sum on its own, then along the borders."""
    of = device.of
    monkeypatch.setattr(device, "of", lambda dtype: of(dtype)._replace(processors=10**9))
    ids = make_segments(segments, 2, 67, rng)
    check(mLSTMCase(rng, B=2, T=67, K=20, V=30, state=state), segment_ids=ids)


@pytest.mark.parametrize("options", [{"input_gate": "sigmoid"}, {"eps": 0.0}, {"eps": 0.1}])
def test_options(options, rng):
    check(mLSTMCase(rng), **options)


@pytest.mark.parametrize("seed", range(2))
def test_extreme_gates(seed):
    check(with_extreme_gates(seed), factor=5.0)  # as native's, in test_ops.py


def test_a_step_is_a_sequence_of_one(rng):
    case = mLSTMCase(rng, T=1, K=16, V=32)
    check(case)  # which trains
    assert_a_step_resets(case, "triton")


def _inputs(rng, B=2, T=20, H=2, K=4, V=6):
    case = mLSTMCase(rng, B=B, T=T, H=H, K=K, V=V)
    return [tensor(case.inputs[name]) for name in case.names[:5]]


def _run(*inputs):
    return keras_xlstm.ops.mlstm(*inputs, implementation="triton")


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
    for axes, given in (
        (0, stacked),
        ((0, None, None, None, 0), [stacked[0], *inputs[1:4], stacked[4]]),
    ):
        got = jax.vmap(_run, axes)(*given)
        for index in range(2):
            one = [x[index] if x.ndim > y.ndim else x for x, y in zip(given, inputs, strict=True)]
            assert_close(got[index], array(_run(*one)), 1e-5)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_shard_map(rng):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    inputs = _inputs(rng)
    sharded = jax.shard_map(
        _run, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False
    )  # fmt: skip
    assert_close(jax.jit(sharded)(*inputs), array(_run(*inputs)), 1e-5)


@pytest.mark.parametrize("batch", [4, None], ids=["static", "symbolic"])
def test_fit(batch, rng):
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def losses(implementation):
        keras.utils.set_random_seed(0)
        layer = keras_xlstm.layers.mLSTM(8, num_heads=2)
        model = keras.Sequential([keras.Input((20, 3), batch), layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        with keras_xlstm.backends.use(implementation):
            return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(losses("triton"), losses("native"), rtol=1e-4)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_fit_over_two_devices(rng):
    """Each device runs the kernels on its part of the batch."""
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")

    def losses(devices):
        keras.utils.set_random_seed(0)
        names = keras.distribution.list_devices()[:devices]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=names))
        try:
            memory = keras_xlstm.layers.mLSTM(8, num_heads=2)
            model = keras.Sequential([keras.Input((20, 3)), memory, keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
            with keras_xlstm.backends.use("triton"):
                return model.fit(x, y, **options).history["loss"]
        finally:
            keras.distribution.set_distribution(None)

    np.testing.assert_allclose(losses(2), losses(1), rtol=1e-5)


def test_what_cannot_run_says_so(rng, monkeypatch):
    inputs = _inputs(rng)
    with pytest.raises(ValueError, match="its chunk sizes are 16, 32"):
        keras_xlstm.ops.mlstm(*inputs, implementation="triton", chunk_size=20)
    with pytest.raises(ValueError, match="up to 512 key and 1024 value dimensions"):
        _run(*_inputs(rng, K=520))
    with pytest.raises(ValueError, match="its dtypes are float32, bfloat16 and float16"):
        _run(*(x.astype("float64") for x in inputs))
    if not GPU:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="it needs arrays on a GPU, not on cpu"):
            _run(*inputs)
        reason = keras_xlstm.backends.available()["mlstm"]["triton"]
        assert reason.startswith("it needs a GPU")


def test_pallas_is_picked_where_it_is_better(monkeypatch):
    q, v = jnp.ones((2, 20, 2, 4)), jnp.ones((2, 20, 2, 6))
    if not GPU:
        assert mlstm_triton.not_preferred(q, v) == "Triton's interpreter is for tests"
        monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(mlstm_triton.pallas, "unsupported", lambda *call: None)
    for capability, T, words in (
        (80, 20, "only on Hopper"),
        (90, 1, "single steps"),
        (90, 20, None),
    ):
        monkeypatch.setattr(device, "capability", lambda capability=capability: capability)
        reason = mlstm_triton.not_preferred(q[:, :T], v[:, :T])
        assert words in reason if words else reason is None
    monkeypatch.setattr(mlstm_triton.pallas, "unsupported", lambda *call: "it is gone")
    monkeypatch.setattr(device, "capability", lambda: 80)
    assert mlstm_triton.not_preferred(q, v) is None


PTX = """.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .align 64 .b8 k_param_1[128],
\t.param .u32 k_param_2,
\t.param .u64 .ptr .global .align 1 k_param_3,
\t.param .u64 .ptr .global .align 1 k_param_4,
\t.param .u64 .ptr .global .align 1 k_param_5
)
.reqntid 128
{ ld.param.b32 %r1, [k_param_2]; }
"""


def test_parameters_come_as_they_are_passed():
    # A result, an operand, a number, an operand; then two that Triton adds.
    ptx, order = triton_launch._ordered(PTX, "k", [(1, 0), (0, 1), (2, 2), (0, 0)])
    assert order == [3, 1, 0, 2]
    places = [ptx.index(f"k_param_{j}") for j in (3, 1, 0, 2, 4, 5)]
    assert places == sorted(places)
    assert ptx.count(".param ") == 6
    assert ptx[ptx.index(".reqntid") :] == PTX[PTX.index(".reqntid") :]


@pytest.mark.skipif(GPU, reason="once, where nothing runs")
def test_what_is_launched_on_hopper(monkeypatch):
    """In a process of its own: here the kernels may be the interpreter's. Warps: also those that a
    kernel specialises, which jaxlib must be told of."""
    monkeypatch.delenv("TRITON_INTERPRET")
    script = pathlib.Path(__file__).parent / "lower_for_hopper.py"
    sizes = "64/128/132", "128/256/132", "128/256/2", "64/12", "192/4", "768/1"
    command = [sys.executable, str(script), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.split() for line in done.stdout.splitlines()]
    names = [name for name, *_ in launches]
    assert names[:6] == [
        "gates", "chunks", "hopper_fused", "hopper_fused", "hopper_dq_dk", "gate_gradients",
    ]  # fmt: skip
    assert names[6:13] == [
        "gates", "chunks", "hopper_fused", "hopper_intra_chunk", "hopper_fused",
        "hopper_intra_chunk", "gate_gradients",
    ]  # fmt: skip
    assert names[13:24] == [
        "gates", "chunks", "chunk_states", "scan_chunk_states", "hopper_intra_chunk",
        "hopper_intra_chunk", "chunk_states", "scan_chunk_states", "hopper_intra_chunk",
        "hopper_intra_chunk", "gate_gradients",
    ]  # fmt: skip
    assert names[24:] == ["forward", "backward", "kernel_gradient"] * 3
    assert [int(cluster) for *_, cluster in launches[24:]] == [2, 2, 1, 6, 6, 1, 1, 1, 1]
    warps = {name: int(warps) for name, warps, *_ in launches}
    assert warps["hopper_fused"] == 16
    assert warps["hopper_intra_chunk"] == warps["hopper_dq_dk"] == 12


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs tensorflow")
def test_triton_after_tensorflow():
    """Both bring an LLVM, and TensorFlow shows its own to all that is loaded later."""
    code = "import tensorflow, keras_xlstm.backends.kernels.load_triton, triton; print('both')"
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["both"], done.stderr[-2000:]
