"""The mLSTM's Triton kernels on torch: on a GPU, or on the CPU by Triton's interpreter.

Without a GPU, and not yet interpreted, this file runs itself in a process of its own with
TRITON_INTERPRET=1, and compiles the kernels for GPUs that are not there.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from cases import make_segments, mLSTMCase
from contract.mlstm import mLSTM
from contract.on_torch import OnTorch, on_gpu
from tools import BACKEND, GPU, HERE, INTERPRETED, TOLERANCE, array, assert_close, some, tensor

if BACKEND != "torch" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs on torch, with triton", allow_module_level=True)

import torch
from keras_xlstm.backends.kernels.mlstm import plan, tiles
from keras_xlstm.backends.kernels.plan import Device
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch import mlstm as kernels

import keras_xlstm

runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU, or the interpreter")


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_interpreted():
    """In one process: each would import the frameworks again."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    files = ["test_triton.py", "test_triton_slstm.py", "test_fuzz.py", "test_inference_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings"]
    command += [str(HERE / file) for file in files]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


# Bytes of stack that a thread may spill, where some do: what was seen with Triton 3.6 and 3.9 and
# was still the fastest tile there (128/128 takes what is fastest at 128/256). Elsewhere none.
SPILLS = {
    ("90", "128/256"): 384, ("90", "256/512"): 768, ("90", "128/128"): 192,
    ("90", "64/128"): 112, ("80", "24/40"): 128, ("80", "128/256"): 448,
    ("100", "128/256"): 448, ("90", "200"): 128, ("90", "760"): 400, ("90", "1020"): 832,
    ("86", "1020"): 256, ("100", "200"): 192, ("80", "128"): 192, ("90", "256"): 192,
    ("90", "1024"): 32, ("86", "1024"): 64, ("100", "288"): 16, ("90", "100"): 192,
}  # fmt: skip
if version("triton").startswith("3.7."):  # not what the tiles were chosen with
    SPILLS |= {("100", "200"): 416, ("80", "300"): 224}
STAGES = {
    "mlstm": {
        "gates.gates", "gates.chunks", "inter_chunk.chunk_states", "intra_chunk.intra_chunk",
        "step.step",
    },
    "recurrence_whole": {
        "recurrence_whole.forward", "recurrence_whole.backward",
        "kernel_gradient.kernel_gradient",
    },
    "recurrence_split": {
        "recurrence_split.forward", "recurrence_split.backward",
        "kernel_gradient.kernel_gradient",
    },
    "cluster": {"cluster.forward", "cluster.backward", "kernel_gradient.kernel_gradient"},
    "grid": {"grid.forward", "grid.backward", "kernel_gradient.kernel_gradient"},
    "block": {
        "inference.rms_norm", "inference.head_norm", "inference.gated_unit", "inference.gate_pair",
        "inference.products", "inference.add_parts",
    },
}  # fmt: skip


COMPILED = [
    ("mlstm", "90:128/256:bfloat16"), ("mlstm", "90:256/512:bfloat16"),
    ("mlstm", "90:64/128:bfloat16"),
    ("mlstm", "90:64/128:float16"), ("mlstm", "90:64/128:float32"),
    ("mlstm", "80:128/256:bfloat16"),
    ("mlstm", "90:128/128:bfloat16"),
    ("mlstm", "80:24/40:float32"), ("mlstm", "100:128/256:bfloat16"),
    ("mlstm", "gfx942:64/128:bfloat16"),
    ("recurrence_whole", "90:100:bfloat16"), ("recurrence_whole", "80:128:bfloat16"),
    ("recurrence_split", "90:200:bfloat16"), ("recurrence_split", "90:760:bfloat16"), ("recurrence_split", "90:1020:float16"),
    ("recurrence_split", "86:1020:bfloat16"), ("recurrence_split", "80:300:float32"), ("recurrence_split", "100:200:bfloat16"),
    ("recurrence_split", "86:128:bfloat16"), ("recurrence_split", "86:64:float32"), ("recurrence_split", "gfx942:192:bfloat16"),
    ("cluster", "90:32:bfloat16"), ("cluster", "90:192:float16"), ("cluster", "90:256:bfloat16"),
    ("cluster", "80:64:bfloat16"), ("cluster", "100:64:float16"),
    ("grid", "90:768:bfloat16"), ("grid", "90:1024:float16"), ("grid", "80:192:bfloat16"),
    ("grid", "100:288:bfloat16"),
    ("block", "90:block:bfloat16"), ("block", "80:block:float16"), ("block", "100:block:bfloat16"),
    ("block", "gfx942:block:bfloat16"),
]  # fmt: skip

# Cards with less shared memory: every kernel that is not Hopper's, in every dtype. Their tiles are
# not tuned: some spill, at most this much with Triton 3.9.
LESS_MEMORY, LESS_MEMORY_SPILL = ("86", "89", "120"), 1_048
for arch in LESS_MEMORY:
    COMPILED += [
        (stages, f"{arch}:{sizes}:{dtype}")
        for dtype in ("bfloat16", "float16", "float32")
        for stages, sizes in (
            ("mlstm", "64/128"), ("mlstm", "128/256"), ("mlstm", "512/1024"),
            ("recurrence_whole", "24"), ("recurrence_split", "200"),
            *((("block", "block"),) if dtype != "float32" else ()),
            *((("recurrence_split", "512"),) if dtype == "float32" else
              (("cluster", "64"), ("grid", "192"), ("grid", "1024"))),
        )
    ]  # fmt: skip

# The kernels of every stage once; the other sizes, dtypes and GPUs are in `make test-all`.
EVERY_RUN = [
    (stages, asked) for stages, asked in COMPILED if asked in (
        "90:64/128:bfloat16", "90:100:bfloat16", "90:32:bfloat16", "90:768:bfloat16",
        "gfx942:64/128:bfloat16", "80:24/40:float32", "86:64:float32", "90:block:bfloat16",
    )
]  # fmt: skip

# Roles of `hopper_intra_chunk`, how many forms of `hopper_fused`, of `hopper_dq_dk`.
ON_HOPPER = {
    "90:64/128:bfloat16": ("dk dq", 2, 1), "90:128/256:bfloat16": ("dk dq dv h", 2, 0),
    "90:256/512:bfloat16": ("dv h", 0, 0), "90:128/128:bfloat16": ("", 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(request):
    """The lines of compile_kernels.py for all that is tested here, split, and its last words."""
    items = [item for item in request.session.items if "compiled" in item.fixturenames]
    asked = [item.callspec.params["asked"] for item in items]
    command = [sys.executable, str(HERE / "compile_kernels.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()], done.stderr[-3000:]


@pytest.mark.skipif(GPU or INTERPRETED, reason="once, where nothing runs")
@pytest.mark.parametrize(("stages", "asked"), some(EVERY_RUN, COMPILED))
def test_compiles_without_a_gpu(stages, asked, compiled):
    lines, last_words = compiled
    if asked == "gfx942:192:bfloat16" and version("triton").startswith("3.7."):
        pytest.skip("Triton 3.7 fails for AMD at a sum over pieces; 3.6 and 3.9 do not")
    lines = [line for line in lines if line[0] == asked]
    assert {line[1] for line in lines} >= STAGES[stages], last_words
    if asked in ON_HOPPER:
        name = "hopper_intra_chunk.hopper_intra_chunk"
        roles = " ".join(sorted({line[2] for line in lines if line[1] == name}))
        fused = sum(line[1] == "hopper_fused.hopper_fused" for line in lines)  # and in reverse
        both = sum(line[1] == "hopper_dq_dk.hopper_dq_dk" for line in lines)
        assert (roles, fused, both) == ON_HOPPER[asked]
    arch, sizes, _ = asked.split(":")
    for *_, shared, limit, stack in lines:
        assert int(shared) <= int(limit), lines
        most = SPILLS.get((arch, sizes), LESS_MEMORY_SPILL if arch in LESS_MEMORY else 0)
        assert int(stack) <= most, lines


@runs
class TestMLSTM(OnTorch, mLSTM):
    dtypes = ("float32", "bfloat16", "float16") if GPU else ("float32",)
    # Interpreted, programs take their time one after another: few of them, each index once.
    sizes = {"T": 37, "B": 2, "H": 1}  # noqa: RUF012
    heads = [{"K": 20, "V": 40, "H": 2}, {"K": 64, "V": 16}]  # noqa: RUF012
    if GPU:
        sizes, heads = {"T": 300}, heads + [
            {"K": K, "V": V, "T": 600} for K, V in ((128, 256), (256, 512), (192, 96), (512, 64), (16, 1024))
        ]  # fmt: skip
    unfit = (
        ({"dtype": "float64"}, "dtypes are float32, bfloat16 and float16, not float64"),
        ({"K": 513}, "up to 512 key and 1024 value dimensions a head, not 513 and 7"),
        ({"V": 1025}, "up to 512 key and 1024 value dimensions a head, not 5 and 1025"),
        ({"chunk_size": 24}, "chunk sizes are 16, 32, 64, 128, 256, 512, not 24"),
    )

    def test_more_chunks_than_one_block_of_borders(self, rng, monkeypatch):
        """`chunks` goes along them a block at a time."""
        blocks = plan.BORDERS if GPU else 2
        monkeypatch.setattr(plan, "BORDERS", blocks)
        self.check(self.case(rng, B=1, T=16 * (blocks + 1) + 3, H=1))

    @pytest.mark.parametrize("segments", [None, "growing"])
    def test_states_by_chunks(self, carried, segments, rng, monkeypatch):
        """The way of few heads: every chunk's sum on its own, then along the borders."""
        monkeypatch.setattr(device, "processors", lambda device: 10**9)
        ids = make_segments(segments, 2, 50, rng)
        self.check(self.case(rng, B=2, T=50, H=1, K=20, V=30, state=carried), segment_ids=ids)

    def test_one_tile_at_a_time(self, rng, monkeypatch):
        """As on devices where Triton's way to fetch ahead was never run."""
        monkeypatch.setattr(device, "pipelined", lambda device: False)
        self.check(self.case(rng, B=2, T=50, K=20, V=30))

    def test_too_little_shared_memory(self, rng, monkeypatch):
        monkeypatch.setattr(device, "shared_memory", lambda device: 40_000)
        inputs = self.case(rng, B=1, T=3, H=1, K=8, V=512).tensors()[:5]
        with pytest.raises(ValueError, match="of 8/512 are too large for the device's shared"):
            keras_xlstm.ops.mlstm(*inputs, implementation="triton")
        h, native = (keras_xlstm.ops.mlstm(*inputs, implementation=i) for i in (None, "native"))
        np.testing.assert_array_equal(array(h), array(native))

    @pytest.mark.parametrize(("options", "own"), [
        ({}, (16, 4)), ({"input_gate": "sigmoid"}, (32, 4)), ({"eps": 0.0}, (64, 8)),
    ], ids=str)  # fmt: skip
    def test_tiles_of_steps(self, options, own, rng, monkeypatch):
        monkeypatch.setattr(tiles, "step", lambda *sizes: own)
        case = self.case(rng, T=20 if GPU else 3, K=70, V=40)
        case.inputs["i"][:, 1] -= 1e4
        self.steps_are_the_sequence(case, **options)

    def test_operators_are_well_formed(self, rng):
        inputs = [x.requires_grad_() for x in self.case(rng, B=1, T=18).tensors()]
        segments = torch.zeros(1, 18, dtype=torch.int32, device=inputs[0].device)
        for state, ids, last in ((inputs[5:], segments, True), ([None] * 3, None, False)):
            arguments = (*inputs[:5], *state, ids, False, 1e-6, 16, True, last)
            # What it keeps has gaps, whose bytes would be any: they are poisoned.
            torch.library.opcheck(kernels._forward.call, arguments)

    def test_fit_compiled(self):
        if not (GPU and shutil.which("g++")):
            pytest.skip("torch.compile needs a compiler, and a minute on a CPU")
        np.testing.assert_allclose(self.losses(True, True), self.losses(False), rtol=1e-4)

    @on_gpu
    @pytest.mark.parametrize("many", [True, False], ids=["many heads", "few heads"])
    @pytest.mark.parametrize(("K", "V", "chunk_size"), [
        (128, 256, 64), (128, 256, 128), (128, 256, 256), (128, 256, 512), (64, 128, 128),
        (64, 128, 256), (256, 512, 128), (256, 512, 256),
    ])  # fmt: skip
    @pytest.mark.parametrize("segments", [None, "growing"])
    def test_whole_chunks(self, K, V, chunk_size, segments, many, rng, monkeypatch):
        """Hopper has kernels of its own for them, and others again where there are heads enough."""
        if many:  # a program of theirs has several chunks, too
            monkeypatch.setattr(device, "processors", lambda device: 2)
        case = self.case(rng, B=1, T=4 * chunk_size, H=2, K=K, V=V)
        ids = make_segments(segments, *case.extent, rng)
        self.check(case, "bfloat16", chunk_size=chunk_size, segment_ids=ids)

    @on_gpu
    @pytest.mark.parametrize("length", [128, 896])
    def test_small_heads(self, length, carried, rng, monkeypatch):
        """On Hopper a program has one chunk after another, of all heads; here one, and seven."""
        monkeypatch.setattr(device, "processors", lambda device: 2)
        sizes = {"B": 1, "T": length, "K": 64, "V": 128, "state": carried}
        for gate in ("exp", "sigmoid"):
            self.check(self.case(rng, **sizes), "bfloat16", chunk_size=128, input_gate=gate)
        case = self.case(rng, **sizes).extreme(rng)
        self.check(case, "bfloat16", factor=5.0, chunk_size=128)

    @on_gpu
    @pytest.mark.parametrize(("K", "V"), [(20, 40), (128, 256)])
    def test_many_heads(self, K, V, dtype, rng, monkeypatch):
        """Their programs take the state through all chunks: what a loop carries on a GPU is not what
        the interpreter carries (test_kernel_sources.py)."""
        monkeypatch.setattr(device, "processors", lambda device: 1)
        self.check(self.case(rng, B=1, T=500, H=2, K=K, V=V), dtype, chunk_size=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_heads_fit_the_cards_with_least_shared_memory(dtype):
    for K in (1, 16, 17, 64, 100, 128, 129, 256, 257, 512):
        for V in (1, 16, 64, 128, 129, 256, 257, 512, 513, 1024):
            assert tiles.unsupported(K, V, None, dtype, 101_376) is None, (K, V)


def test_tiles_of_a_step():
    """By how many heads there are: more programs, or larger ones."""
    assert [tiles.step(heads, 256, 512) for heads in (8, 128, 512)] == [(16, 4), (32, 4), (64, 4)]
    assert [tiles.step(heads, 512, 1000) for heads in (8, 10**6)] == [(16, 4), (32, 4)]
    assert [tiles.step(8, *sizes) for sizes in ((5, 7), (16, 1024))] == [(16, 4), (256, 4)]


def test_lengths_share_compiled_kernels():
    device = Device(232_448, 1, "tf32x3")

    def constants(B, T):
        call = plan.Call(B, T, 2, 16, 32, "float32", ("float32",) * 2, False, False, 64)
        steps = plan.forward(device, call, has_state=False, states=True, trains=True).steps
        steps += plan.backward(device, call, has_state=False, states=False).steps
        return [(step.kernel, step.constants) for step in steps]

    assert len(constants(1, 100)) == 9
    assert constants(1, 100) == constants(3, 1000)
    assert constants(1, 64) == constants(3, 640) != constants(1, 100)  # whole chunks alone


def elsewhere(x):
    """The same numbers, not at a multiple of 16 bytes."""
    first = max(1, 4 // x.itemsize)
    memory = x.new_empty(x.numel() + first)[first:].view(x.shape).copy_(x.detach())
    assert memory.data_ptr() % 16
    return memory.requires_grad_(x.requires_grad)


@runs
@pytest.mark.parametrize("dtype", TestMLSTM.dtypes)
def test_h_alone(dtype, rng):
    """It has a shorter way than h with states, of calls alike: not of others."""
    T, K, V = (256, 64, 128) if GPU else (20, 5, 7)
    case = mLSTMCase(rng, B=1, T=T, H=2, K=K, V=V)
    inputs = [tensor(case.inputs[n], dtype).requires_grad_() for n in case.names[:5]]
    gradient = tensor(case.cotangents[0], dtype)
    again = []

    def saved_elsewhere(*inputs, **options):
        with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
            return keras_xlstm.ops.mlstm(*inputs, **options)

    def results(inputs, gradient, op=keras_xlstm.ops.mlstm, **options):
        options |= {"implementation": "triton", "chunk_size": 128 if GPU else 16, "eps": 0.0}
        h = op(*inputs, **options)
        h = h[0] if "return_state" in options else h
        found = [h, *torch.autograd.grad(h, inputs, gradient)]
        again.append(found)
        return found

    want = results(inputs, gradient, return_state=True)
    results(inputs, gradient)
    results(inputs, gradient)
    results(inputs, elsewhere(gradient))
    results(inputs, gradient.mT.contiguous().mT)
    results([elsewhere(x) for x in inputs], gradient)
    results(inputs, gradient, saved_elsewhere)
    results(inputs, gradient)
    for found in again:
        for a, b in zip(found, want, strict=True):
            assert_close(array(a), array(b), TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(again[1], again[-1], strict=True))


@runs
def test_transforms(rng):
    inputs = mLSTMCase(rng).tensors()[:5]

    def loss(*a):
        return keras_xlstm.ops.mlstm(*a, implementation="triton").square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, (0, 1, 2, 3, 4))(*inputs), want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="PyTorch's own operators alone"):
        torch.func.vmap(loss)(*(x[None] for x in inputs))
    with pytest.raises(ValueError, match="PyTorch's own operators alone"):
        torch.func.jvp(loss, tuple(inputs), tuple(inputs))
    for place, slope in enumerate(want):  # left to the native form, whichever has a tangent
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            duals = list(inputs)
            duals[place] = torch.autograd.forward_ad.make_dual(inputs[place], inputs[place])
            got = torch.autograd.forward_ad.unpack_dual(
                keras_xlstm.ops.mlstm(*duals).square().sum()
            )
        expected = (slope * inputs[place]).sum()
        torch.testing.assert_close(got.tangent, expected, rtol=1e-3, atol=1e-3)


@runs
@pytest.mark.sweep
def test_two_processes():
    command = [sys.executable, str(HERE / "two_processes.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "same gradients" in done.stdout, done.stderr[-3000:]
