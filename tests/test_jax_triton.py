"""Our Triton kernels under JAX against the float64 oracle: on a GPU, or on the CPU by Triton's
interpreter; and what jaxlib is to launch on Hopper, with no GPU there."""

import importlib.util
import pathlib
import subprocess
import sys

import keras
import pytest
from cases import make_segments, mLSTMCase
from contract.mlstm import mLSTM
from contract.on_jax import OnJax, Sharded
from contract.slstm import sLSTM
from tools import BACKEND, GPU, array, assert_close, some

if BACKEND != "jax" or not importlib.util.find_spec("triton"):
    pytest.skip("Triton's kernels under JAX", allow_module_level=True)

import jax.numpy as jnp
from keras_xlstm.backends.jax import device, mlstm_triton, slstm_triton, triton_launch

import keras_xlstm

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        pytest.importorskip("torch")  # whose tensors the interpreter takes
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        import triton_interpreter  # noqa: F401  registers the lowering for CPUs


class OnTriton(OnJax):
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16") if GPU else ("float32",)
    # The kernels are those of torch, where the interpreter runs every case: here what JAX hands them.
    every_run = None if GPU else (
        "outputs", "any_length", "options", "holes-growing", "without_states", "step_may_reset",
        "steps_are_the_sequence", "jit_and_remat", "vmap", "shard_map", "fit", "unfit", "refused",
        "states_by_chunks", "rounds", "sizes", "extreme_gates[0]",
    )  # fmt: skip


class TestMLSTM(Sharded, OnTriton, mLSTM):
    lengths, tiny, sizes = (1, 16, 17), {"K": 4, "V": 6}, {"T": 37, "B": 2, "H": 1}
    heads = [{"K": 20, "V": 40, "H": 3, "T": 20}]  # noqa: RUF012
    if GPU:
        sizes, heads = {"T": 300}, heads + [
            {"K": K, "V": V, "T": 600, "H": 3}
            for K, V in ((64, 128), (128, 256), (256, 512), (192, 96), (512, 64), (16, 1024))
        ]  # fmt: skip
    unfit = (
        ({"chunk_size": 20}, "its chunk sizes are 16, 32"),
        ({"K": 520}, "up to 512 key and 1024 value dimensions"),
        ({"dtype": "float64"}, "its dtypes are float32, bfloat16 and float16"),
    )

    @pytest.mark.parametrize("segments", [None, "growing"])
    def test_states_by_chunks(self, segments, rng, monkeypatch):
        """The way of few heads: every chunk's sum on its own, then along the borders."""
        of = device.of
        monkeypatch.setattr(device, "of", lambda dtype: of(dtype)._replace(processors=10**9))
        ids = make_segments(segments, 2, 67, rng)
        self.check(self.case(rng, B=2, T=67, K=20, V=30), segment_ids=ids)

    @on_gpu
    @pytest.mark.parametrize("length", [256, 768, 1024])
    @pytest.mark.parametrize("many", [True, False], ids=["many heads", "few heads"])
    @pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 256), (256, 512)])
    def test_whole_chunks(self, K, V, many, length, rng, monkeypatch):
        """On Hopper: kernels of its own, whose programs take a head through all chunks or not."""
        monkeypatch.setattr(device, "processors", lambda: 1 if many else 10**6)
        case = self.case(rng, B=2, T=length, H=2, K=K, V=V)
        self.check(case, "bfloat16", chunk_size=None)


class TestSLSTM(OnTriton, sLSTM):
    sizes, tiny, lengths, cuts = {"T": 9}, {"D": 6}, (1, 17), (4,)
    heads = [{"B": 9, "T": 70 if GPU else 3, "D": D} for D in (1, 17, 64)]  # noqa: RUF012
    unfit = (({"D": 1100}, "1024 units"),)

    @on_gpu
    @pytest.mark.parametrize(
        ("B", "D"),
        [(16, 128), (1, 100), (2100, 64), (16, 192), (9, 256), (70, 330), (3, 768), (17, 1024)],
    )
    def test_large(self, B, D, rng):
        self.check(self.case(rng, B=B, T=70, H=2, D=D), "bfloat16")

    @on_gpu
    def test_large_in_float32(self, rng):
        self.check(self.case(rng, B=5, T=40, H=2, D=192))

    # Heads that several programs share: on a GPU they wait for each other, in rounds of heads and
    # rows where not all are there at once; the interpreter has a launch for every step.
    @pytest.mark.parametrize("processors", [13, 30, 132] if GPU else [1])
    def test_rounds(self, processors, rng, monkeypatch):
        monkeypatch.setattr(device, "processors", lambda: processors)
        B, T, D, dtype = (35, 50, 140, "bfloat16") if GPU else (3, 3, 70, "float32")
        self.check(self.case(rng, B=B, T=T, H=2, D=D), dtype)


class TestSharedHeads(OnTriton, sLSTM):
    sizes, cuts = {"T": 3, "H": 1, "D": 70}, (2,)
    heads, every_run = ({"B": 3, "T": 3, "D": 100},), ("options[all]",)
    test_jit_and_remat = test_vmap = test_fit = test_fit_over_two_devices = None


class Lanes(OnTriton, sLSTM):
    """In 16 bits; interpreted, one program, or a launch for every step."""

    dtypes = ("bfloat16", "float16") if GPU else ("float16",)
    cuts, every_run = (2,), ("outputs_gradients_and_states[float16-True]", "options[all]")
    test_jit_and_remat = test_vmap = test_fit = test_fit_over_two_devices = None

    def check(self, case, dtype=None, **options):
        dtype = dtype or self.dtypes[0]
        assert getattr(slstm_triton.cut_of(case.inputs["x"].shape, jnp.dtype(dtype)), self.kind)
        super().check(case, dtype, **options)


class TestClusters(Lanes):
    kind, sizes = "clustered", {"T": 9 if GPU else 3, "D": 96 if GPU else 32}
    heads = [  # noqa: RUF012
        {"B": 9, "T": 70 if GPU else 3, "D": D}
        for D in ((32, 64, 96, 128, 192, 256) if GPU else (32,))
    ]


class TestWide(Lanes):
    every_run = ("options[all]",)
    kind, sizes = "wide", {"T": 9 if GPU else 3, "D": 320 if GPU else 96, "H": 1}
    heads = [  # noqa: RUF012
        {"B": 9, "T": 70 if GPU else 2, "D": D, "H": 1}
        for D in ((320, 768, 1024) if GPU else (96,))
    ]


@pytest.mark.skipif(GPU, reason="where there is none")
def test_what_needs_a_gpu_says_so(rng, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it needs arrays on a GPU, not on cpu"):
        keras_xlstm.ops.mlstm(*mLSTMCase(rng).tensors()[:5], implementation="triton")
    reason = keras_xlstm.backends.available()["mlstm"]["triton"]
    assert reason.startswith("it needs a GPU")


def test_what_the_slstm_cannot_run(monkeypatch):
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


SMALL_HEADS = "gates chunks hopper_fused hopper_fused hopper_dq_dk gate_gradients"
FUSED = (
    "gates chunks hopper_fused hopper_intra_chunk hopper_fused hopper_intra_chunk gate_gradients"
)
BY_CHUNKS = """gates chunks chunk_states scan_chunk_states hopper_intra_chunk hopper_intra_chunk
    chunk_states scan_chunk_states hopper_intra_chunk hopper_intra_chunk gate_gradients"""
SLSTM = "forward backward kernel_gradient"


@pytest.mark.skipif(GPU, reason="once, where nothing runs")
@pytest.mark.parametrize(("sizes", "names", "clusters"), some(
    [("64/128/132", SMALL_HEADS, {1}), ("64/12", SLSTM, {1, 2})],
    [("128/256/132", FUSED, {1}), ("128/256/2", BY_CHUNKS, {1}), ("192/4", SLSTM, {1, 6}),
     ("768/1", SLSTM, {1})],
))  # fmt: skip
def test_what_is_launched_on_hopper(sizes, names, clusters, monkeypatch):
    """In a process of its own: here the kernels may be the interpreter's. Warps: also those that a
    kernel specialises, which jaxlib must be told of."""
    monkeypatch.delenv("TRITON_INTERPRET")
    script = pathlib.Path(__file__).parent / "lower_for_hopper.py"
    done = subprocess.run([sys.executable, str(script), sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in launches] == names.split()
    assert {int(cluster) for *_, cluster in launches} == clusters
    warps = {name: int(warps) for name, warps, *_ in launches}
    assert warps.get("hopper_fused", 16) == 16
    for name in ("hopper_intra_chunk", "hopper_dq_dk"):
        assert warps.get(name, 12) == 12


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs tensorflow")
def test_triton_after_tensorflow():
    """Both bring an LLVM, and TensorFlow shows its own to all that is loaded later."""
    code = "import tensorflow, keras_xlstm.backends.kernels.load_triton, triton; print('both')"
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["both"], done.stderr[-2000:]


def test_the_slstm_layer(rng):
    layer = keras_xlstm.layers.sLSTM(8, num_heads=2, use_kernel="auto")
    x = keras.ops.convert_to_tensor(rng.normal(size=(2, 5, 3)), "float32")
    want = layer(x)
    with keras_xlstm.backends.use("triton"):
        assert_close(layer(x), array(want), 1e-5)
