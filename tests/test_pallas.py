"""The Pallas kernels against the float64 oracle: on a GPU, or on the CPU by Pallas's interpreter;
and their lowering for CUDA with no GPU there."""

import contextlib
import re

import keras
import numpy as np
import pytest
from cases import make_segments, mLSTMCase
from contract.mlstm import mLSTM
from contract.on_jax import OnJax, Sharded, needs_two_devices, two_devices
from contract.slstm import sLSTM
from tools import GPU, HAS_PALLAS, array, assert_close, call

if not HAS_PALLAS:
    pytest.skip("Pallas's kernels belong to JAX, a newer one", allow_module_level=True)

import jax
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.pallas import mlstm, slstm
from keras_xlstm.backends.kernels.mlstm import tiles

import keras_xlstm

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")


class OnPallas(OnJax):
    implementation = "pallas"
    dtypes = ("float32", "bfloat16", "float16") if GPU else ("float32", "bfloat16")


class TestMLSTM(Sharded, OnPallas, mLSTM):
    heads = [{"K": 5, "V": 7, "H": 3}, {"K": 20, "V": 40, "H": 3}, {"K": 64, "V": 16, "H": 3}]  # noqa: RUF012
    tiny = {"K": 4, "V": 6}  # noqa: RUF012
    if GPU:
        sizes, heads = {"T": 300}, heads + [
            {"K": K, "V": V, "T": 600} for K, V in ((128, 256), (256, 512), (192, 96), (512, 64), (16, 1024))
        ]  # fmt: skip
    unfit = (
        ({"chunk_size": 20}, "its chunk sizes are 16, 32"),
        ({"K": 520}, "up to 512 key and 1024 value dimensions"),
        ({"empty": True}, "it takes batches of 1 to 65535, not of 0"),
        ({"dtype": "float64"}, "its dtypes are float32, bfloat16 and float16"),
    )

    @pytest.mark.parametrize("segments", [None, "growing"])
    def test_states_by_chunks(self, carried, segments, rng, monkeypatch):
        """The way of few heads: every chunk's sum on its own, then along the borders; more borders
        than are loaded at a time, and a rest."""
        monkeypatch.setattr(device, "processors", lambda: 10**9)
        ids = make_segments(segments, 2, 163, rng)
        self.check(self.case(rng, B=2, T=163, K=20, V=30, state=carried), segment_ids=ids)

    @pytest.mark.parametrize(("options", "own"), [
        ({}, (16, 64, 4)), ({"input_gate": "sigmoid"}, (32, 32, 4)), ({"eps": 0.0}, (64, 64, 16)),
    ], ids=str)  # fmt: skip
    def test_tiles_of_steps(self, options, own, rng, monkeypatch):
        monkeypatch.setattr(tiles, "pallas_step", lambda *sizes: own)
        case = self.case(rng, T=5, K=64, V=128)
        case.inputs["i"][:, 3] -= 1e4
        self.steps_are_the_sequence(case, **options)

    def test_a_batch_that_devices_cannot_share(self, rng):
        needs_two_devices()
        with two_devices(2), pytest.raises(ValueError, match="the batch of 3 among 2 devices"):
            self.h(*self.inputs(rng, B=3))

    @on_gpu
    @pytest.mark.parametrize(("K", "V"), [(20, 40), (128, 256)])
    def test_many_heads(self, K, V, dtype, rng, monkeypatch):
        """Their programs take the state through all chunks."""
        monkeypatch.setattr(device, "processors", lambda: 1)
        self.check(self.case(rng, B=1, T=500, H=2, K=K, V=V), dtype, chunk_size=64)

    @on_gpu
    @pytest.mark.parametrize("length", [256, 512, 768, 1280, 1792, 2000])
    @pytest.mark.parametrize(("H", "K", "V"), [(3, 128, 256), (2, 256, 512)])
    def test_no_race_at_any_number_of_chunks(self, length, H, K, V, rng):
        """XLA's Triton has compiled these kernels into a race where a program divided by 3 or 7."""
        case = self.case(rng, B=3, T=length, H=H, K=K, V=V)
        self.check(case, "bfloat16", chunk_size=None)


class TestSLSTM(OnPallas, sLSTM):
    heads = [{"B": 9, "T": 70 if GPU else 3, "H": 3, "D": D} for D in (1, 16, 17, 48, 64)]  # noqa: RUF012
    tiny, fits = {"D": 6}, 1e-3 if GPU else 1e-4
    # By itself float32's heads are 64 units at most.
    unfit = (({"D": 130}, "it takes up to 64 units a head in float32 here, not 130"),)

    @on_gpu
    @pytest.mark.parametrize(
        ("B", "D"),
        [(16, 128), (1, 100), (2100, 64), (16, 192), (9, 256), (70, 330), (3, 768), (17, 1024)],
    )
    def test_large(self, B, D, rng):
        self.check(self.case(rng, B=B, T=70, H=2, D=D), "bfloat16")


class TestSharedHeads(OnPallas, sLSTM):
    """Heads that several programs share on a GPU, in rounds of heads and rows. By the interpreter,
    whose programs cannot wait for each other, one has all of a head."""

    dtypes = ("bfloat16", "float16")
    sizes, tiny = {"T": 9, "H": 1, "D": 130}, {"H": 1, "D": 130}
    heads = ({"B": 35, "T": 50 if GPU else 3, "H": 2, "D": 140},)
    every_run = ("sizes", "options[all]", "length[1]", "edge")
    test_jit_and_remat = test_vmap = test_fit = test_fit_over_two_devices = None

    @pytest.mark.parametrize("processors", [13, 30, 132] if GPU else [1])
    def test_rounds(self, processors, dtype, rng, monkeypatch):
        monkeypatch.setattr(device, "processors", lambda: processors)
        self.check(self.case(rng, **self.heads[0]), dtype)

    def test_transformations_of_shared_heads(self, rng):
        """vmap must not make the grid larger than the device."""
        x, R = rng.normal(size=(3, 2, 4, 4, 1, 130)), rng.normal(size=(1, 130, 4, 130)) / 12
        x, R = (jax.numpy.asarray(a, "bfloat16") for a in (x, R))

        def gradient(x, R):
            def loss(x, R):
                h = jax.checkpoint(lambda x: keras_xlstm.ops.slstm(x, R, implementation="pallas"))(
                    x
                )
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


def assert_lowers(step, arguments, names, monkeypatch):
    with pretended_gpu(monkeypatch):
        traced = jax.jit(step).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "atomic" not in str(traced.jaxpr)  # the same sums in every run
    assert all(name in lowered for name in names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", [(4, 600, 2, 128, 256), (1, 9000, 2, 256, 512)], ids=str)
def test_mlstm_lowers_for_cuda_without_a_gpu(sizes, dtype, monkeypatch):
    B, T, H, K, V = sizes
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    shapes += [(B, H, K, V), (B, H, K), (B, H), (B, T)]
    dtypes = [dtype] * 5 + ["float32"] * 3 + ["int32"]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def step(*arguments):
        *inputs, ids = arguments

        def run(q, k, v, i, f, *state):
            return mlstm.mlstm(
                q, k, v, i, f, state, ids, input_gate="exp", eps=1e-6, chunk_size=None
            )[0]

        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    names = "mlstm_h", "mlstm_dq", "mlstm_dk", "mlstm_dv", "mlstm_chunks", "mlstm_borders"
    assert_lowers(step, arguments, names, monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "D"),
    [("bfloat16", 64), ("float16", 64), ("float32", 64), ("bfloat16", 192), ("float16", 768)],
)
def test_slstm_lowers_for_cuda_without_a_gpu(dtype, D, monkeypatch):
    B, T, H = 16, 300, 3
    shapes = [(B, T, 4, H, D), (H, D, 4, D), (4, H, D), *[(B, H, D)] * 4, *[(B, T)] * 2]
    dtypes = [dtype, *["float32"] * 6, "bool", "bool"]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def step(*arguments):
        *inputs, hold, reset = arguments

        def run(x, R, bias, *state):
            return slstm.slstm(x, R, bias, state, hold, reset, None, "sigmoid", 1.0)[0]

        h, gradient = jax.vjp(run, *inputs)
        return gradient(h)

    assert_lowers(step, arguments, ("slstm_forward", "slstm_backward"), monkeypatch)


@pytest.mark.skipif(GPU, reason="where there is none")
def test_what_needs_a_gpu_says_so(rng, monkeypatch):
    monkeypatch.delenv("KERAS_XLSTM_INTERPRET")
    inputs = mLSTMCase(rng).tensors()[:5]
    with pytest.raises(ValueError, match="it needs arrays on a GPU, not on cpu"):
        keras_xlstm.ops.mlstm(*inputs, implementation="pallas")
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
