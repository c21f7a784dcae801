"""The Triton kernels against the float64 oracle: on a GPU, or on the CPU by Triton's interpreter.

Without a GPU, and not yet interpreted, this file runs itself in a process of its own with
TRITON_INTERPRET=1, and compiles the kernels for GPUs that are not there.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import keras
import numpy as np
import pytest
from tools import BACKEND, HERE, TOLERANCE, array, assert_close, tensor

if BACKEND != "torch" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs on torch, with triton", allow_module_level=True)

import torch
from keras_xlstm.backends.kernels.mlstm import plan, tiles
from keras_xlstm.backends.kernels.plan import Device
from keras_xlstm.backends.torch import device, launch
from keras_xlstm.backends.torch import mlstm as kernels
from test_ops import MASKS, make_mask, make_segments, mLSTMCase, with_extreme_gates

import keras_xlstm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU, or the interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
DTYPES = ["float32", "bfloat16", "float16"] if GPU else ["float32"]
SIZES = [(5, 7), (20, 40), (64, 16)]
if GPU:
    SIZES += [(128, 256), (256, 512), (192, 96), (512, 64), (16, 1024)]


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """None from before: what a test says of the device holds."""
    monkeypatch.setattr(launch, "BOUND", {})


@contextlib.contextmanager
def poisoned():
    """Every buffer is full of NaN before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case, dtype="float32", factor=1.0, chunk_size=16, **options):
    with poisoned():
        case.check(dtype, factor, chunk_size=chunk_size, implementation="triton", **options)


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_interpreted():
    """In one process: each would import the frameworks again."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    files = ["test_triton.py", "test_triton_slstm.py", "test_triton_slstm_lanes.py"]
    files += ["test_poison.py", "test_fuzz.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings"]
    command += [str(HERE / file) for file in files]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


def assert_exports_natively(model, x):
    want = array(model(x))
    with torch.no_grad():
        program = torch.export.export(model, (tensor(x),), strict=False)
    assert "keras_xlstm" not in str(program.graph)
    assert_close(program.module()(tensor(x)).detach(), want, 1e-5)


def assert_same_in_a_cuda_graph(run):
    with torch.no_grad():
        want = [t.clone() for t in keras.tree.flatten(run())]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = keras.tree.flatten(run())
        graph.replay()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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
    ("grid", "86:1024:bfloat16"), ("grid", "100:288:bfloat16"),
]  # fmt: skip

# Roles of `hopper_intra_chunk`, how many forms of `hopper_fused`, of `hopper_dq_dk`.
ON_HOPPER = {
    "90:64/128:bfloat16": ("dk dq", 2, 1), "90:128/256:bfloat16": ("dk dq dv h", 2, 0),
    "90:256/512:bfloat16": ("dv h", 0, 0), "90:128/128:bfloat16": ("", 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """The lines of compile_kernels.py, split, and its last words."""
    command = [sys.executable, str(HERE / "compile_kernels.py"), *(asked for _, asked in COMPILED)]
    done = subprocess.run(command, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()], done.stderr[-3000:]


@pytest.mark.skipif(GPU or INTERPRETED, reason="once, where nothing runs")
@pytest.mark.parametrize(("stages", "asked"), COMPILED)
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
        assert int(stack) <= SPILLS.get((arch, sizes), 0), lines


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(dtype, state, rng):
    check(mLSTMCase(rng, state=state), dtype)


@runs
@pytest.mark.parametrize("T", [1, 15, 16, 17, 33, 65])
def test_any_length(T, rng):
    check(mLSTMCase(rng, B=2, T=T, H=1))


@runs
def test_more_chunks_than_one_block_of_borders(rng):
    """`chunks` goes along the borders 128 at a time."""
    check(mLSTMCase(rng, B=1, T=16 * 129 + 3, H=1))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_sizes(K, V, dtype, rng):
    T, chunk_size = (300, None) if GPU else (20, 16)
    check(mLSTMCase(rng, B=2, T=T, H=2, K=K, V=V), dtype, chunk_size=chunk_size)


@on_gpu
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512])
def test_chunk_sizes(chunk_size, rng):
    check(mLSTMCase(rng, B=1, T=700, H=1, K=64, V=64), "bfloat16", chunk_size=chunk_size)


@on_gpu
@pytest.mark.parametrize("many", [True, False], ids=["many heads", "few heads"])
@pytest.mark.parametrize(("K", "V", "chunk_size"), [
    (128, 256, 64), (128, 256, 128), (128, 256, 256), (128, 256, 512), (64, 128, 128),
    (64, 128, 256), (256, 512, 128), (256, 512, 256),
])  # fmt: skip
@pytest.mark.parametrize("segments", [None, "growing"])
def test_whole_chunks(K, V, chunk_size, segments, many, rng, monkeypatch):
    """Hopper has kernels of its own for them, and others again where there are heads enough."""
    if many:  # a program of theirs has several chunks, too
        monkeypatch.setattr(device, "processors", lambda device: 2)
    T = 4 * chunk_size
    case = mLSTMCase(rng, B=1, T=T, H=2, K=K, V=V)
    segments = make_segments(segments, 1, T, rng)
    check(case, "bfloat16", chunk_size=chunk_size, segment_ids=segments)


@on_gpu
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
@pytest.mark.parametrize("T", [128, 896])
def test_small_heads(T, state, rng, monkeypatch):
    """On Hopper a program has one chunk after another, of all heads; here one, and seven."""
    monkeypatch.setattr(device, "processors", lambda device: 2)
    for gate in ("exp", "sigmoid"):
        case = mLSTMCase(rng, B=1, T=T, H=2, K=64, V=128, state=state)
        check(case, "bfloat16", chunk_size=128, input_gate=gate)
    case = with_extreme_gates(0, B=1, T=T, K=64, V=128, state=state)
    check(case, "bfloat16", factor=5.0, chunk_size=128)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), [(20, 40), (128, 256)])
def test_many_heads(K, V, dtype, rng, monkeypatch):
    """Their programs take the state through all chunks: what a loop carries on a GPU is not what
    the interpreter carries (test_kernel_sources.py)."""
    monkeypatch.setattr(device, "processors", lambda device: 1)
    check(mLSTMCase(rng, B=1, T=500, H=2, K=K, V=V), dtype, chunk_size=64)


@runs
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "growing", "returning"])
def test_masks_and_segments(mask, segments, rng):
    B, T = 4, 37
    mask = make_mask(mask, B, T, rng)
    check(mLSTMCase(rng, B=B, T=T, H=1), mask=mask, segment_ids=make_segments(segments, B, T, rng))


@runs
@pytest.mark.parametrize("segments", [None, "growing"])
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_states_by_chunks(segments, state, rng, monkeypatch):
    """The way of few heads: every chunk's sum on its own, then along the borders."""
    monkeypatch.setattr(device, "processors", lambda device: 10**9)
    ids = make_segments(segments, 2, 50, rng)
    check(mLSTMCase(rng, B=2, T=50, K=20, V=30, state=state), segment_ids=ids)


@runs
def test_options(rng):
    check(mLSTMCase(rng), input_gate="sigmoid")
    check(mLSTMCase(rng), eps=0.0)
    check(mLSTMCase(rng), eps=0.1)


@runs
@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates(seed):
    check(with_extreme_gates(seed), factor=5.0)  # as native's, in test_ops.py


@runs
def test_a_row_that_starts_fresh(rng):
    case = mLSTMCase(rng)
    for name in "Cnm":
        case.inputs[name][0] = 0.0
    case.inputs["i"][:, 0] -= 800.0
    check(case)


@runs
def test_nothing_reaches_past_a_mask(rng):
    mask = make_mask("holes", 3, 20, rng)
    case = mLSTMCase(rng, B=3, T=20)
    options = {"mask": mask, "implementation": "triton", "chunk_size": 16}
    clean = case.run("float32", **options)[0]
    for name in case.names[:5]:
        case.inputs[name][~mask] = np.nan
    poisoned = case.run("float32", **options)[0]
    for a, b in zip([*clean[0], *clean[1]], [*poisoned[0], *poisoned[1]], strict=True):
        np.testing.assert_array_equal(array(a), array(b))


def test_tiles_of_a_step():
    """By how many heads there are: more programs, or larger ones."""
    assert [tiles.step(heads, 256, 512) for heads in (8, 128, 512)] == [(16, 4), (32, 4), (64, 4)]
    assert [tiles.step(heads, 512, 1000) for heads in (8, 10**6)] == [(16, 4), (32, 4)]
    assert [tiles.step(8, *sizes) for sizes in ((5, 7), (16, 1024))] == [(16, 4), (256, 4)]


@runs
@pytest.mark.parametrize(("options", "own"), [
    ({}, (16, 4)), ({"input_gate": "sigmoid"}, (32, 4)), ({"eps": 0.0}, (64, 8)),
], ids=str)  # fmt: skip
def test_steps_are_the_sequence(options, own, rng, monkeypatch):
    monkeypatch.setattr(tiles, "step", lambda *sizes: own)
    T = 20 if GPU else 6
    case = mLSTMCase(rng, T=T, K=70, V=40)
    case.inputs["i"][:, 3] -= 1e4
    inputs = [tensor(case.inputs[n]) for n in case.names]
    for state in (inputs[5:], [torch.zeros_like(s) for s in inputs[5:]]):
        call = {"return_state": True, "implementation": "triton", **options}
        want, want_state = keras_xlstm.ops.mlstm(*inputs[:5], state, **call)
        out = []
        with torch.no_grad():
            for t in range(T):
                step = [a[:, t : t + 1] for a in inputs[:5]]
                h, state = keras_xlstm.ops.mlstm(*step, state, **call)
                out.append(array(h))
        assert_close(np.concatenate(out, 1), array(want), 2e-5)
        for a, b in zip(state, want_state, strict=True):
            assert_close(a, array(b), 2e-5)


@runs
def test_a_step_may_reset(rng):
    case = mLSTMCase(rng, T=1)
    inputs = [tensor(case.inputs[n]) for n in case.names]
    mask = tensor(np.array([[True], [False], [True]]), "bool")
    both = [
        keras_xlstm.ops.mlstm(
            *inputs[:5], inputs[5:], mask, return_state=True, implementation=implementation
        )
        for implementation in ("native", "triton")
    ]
    for a, b in zip(*(keras.tree.flatten(x) for x in both), strict=True):
        assert_close(a, array(b), 2e-5)


@runs
@pytest.mark.parametrize(("changed", "words"), [
    ({"dtype": "float64"}, "dtypes are float32, bfloat16 and float16, not float64"),
    ({"K": 513}, "up to 512 key and 1024 value dimensions a head, not 513 and 7"),
    ({"V": 1025}, "up to 512 key and 1024 value dimensions a head, not 5 and 1025"),
    ({"chunk_size": 24}, "chunk sizes are 16, 32, 64, 128, 256, 512, not 24"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")  # fmt: skip
def test_what_does_not_fit_is_refused_or_native(changed, words, rng):
    changed = dict(changed)
    dtype, chunk_size = changed.pop("dtype", "float32"), changed.pop("chunk_size", None)
    case = mLSTMCase(rng, B=1, T=3, H=1, **changed)
    inputs = [tensor(case.inputs[n], dtype) for n in case.names[:5]]
    with pytest.raises(ValueError, match=words):
        keras_xlstm.ops.mlstm(*inputs, chunk_size=chunk_size, implementation="triton")
    h = keras_xlstm.ops.mlstm(*inputs, chunk_size=chunk_size)
    native = keras_xlstm.ops.mlstm(*inputs, chunk_size=chunk_size, implementation="native")
    np.testing.assert_array_equal(array(h), array(native))


def test_lengths_share_compiled_kernels():
    device = Device(232_448, 10**9, "tf32x3")

    def constants(B, T):
        call = plan.Call(B, T, 2, 16, 32, "float32", ("float32",) * 2, False, False, 64)
        steps = plan.forward(device, call, has_state=False, states=True, trains=True).steps
        steps += plan.backward(device, call, has_state=False, states=False).steps
        return [(step.kernel, step.constants) for step in steps]

    assert len(constants(1, 100)) == 9
    assert constants(1, 100) == constants(3, 1000)
    assert constants(1, 64) == constants(3, 640) != constants(1, 100)  # whole chunks alone


def _small(rng, **sizes):
    case = mLSTMCase(rng, **sizes)
    return [tensor(case.inputs[n]).requires_grad_() for n in case.names]


@runs
def test_operators_are_well_formed(rng):
    inputs = _small(rng, B=1, T=18)
    segments = torch.zeros(1, 18, dtype=torch.int32, device=inputs[0].device)
    for state, ids, last in ((inputs[5:], segments, True), ([None] * 3, None, False)):
        arguments = (*inputs[:5], *state, ids, False, 1e-6, 16, True, last)
        with poisoned():  # what it keeps has gaps, whose bytes would be any
            torch.library.opcheck(kernels._forward.call, arguments)


@runs
def test_second_derivatives_are_refused(rng):
    q, *rest = _small(rng)
    h = keras_xlstm.ops.mlstm(q, *rest[:4], chunk_size=16, implementation="triton")
    (gradient,) = torch.autograd.grad((h**2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), q)


@runs
def test_recomputed_activations(rng):
    inputs = _small(rng)[:5]

    def run(*a):
        return keras_xlstm.ops.mlstm(*a, chunk_size=16, implementation="triton")

    want = torch.autograd.grad((run(*inputs) ** 2).sum(), inputs)
    h = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    got = torch.autograd.grad((h**2).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@runs
def test_compiled_whole(rng):
    inputs = _small(rng)[:5]

    def run(*a):
        return keras_xlstm.ops.mlstm(*a, implementation="triton") * 2

    explained = torch._dynamo.explain(run)(*inputs)
    assert explained.graph_break_count == 0
    assert "keras_xlstm.mlstm_forward" in str(explained.graphs[0].graph)


def _losses(rng, jit_compile, use_kernel):
    x, y = rng.normal(size=(8, 20, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    keras.utils.set_random_seed(0)
    layer = keras_xlstm.layers.mLSTM(8, num_heads=2, use_kernel=use_kernel)
    model = keras.Sequential([keras.Input((20, 3)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]


@runs
def test_fit():
    seeded = np.random.default_rng
    want = _losses(seeded(0), False, False)
    np.testing.assert_allclose(_losses(seeded(0), False, True), want, rtol=1e-4)
    if GPU and shutil.which("g++"):  # torch.compile needs a compiler, and a minute on a CPU
        np.testing.assert_allclose(_losses(seeded(0), True, True), want, rtol=1e-4)


@runs
def test_gradients_under_torch_compile(rng):
    inputs = _small(rng)[:5]

    def run(*a):
        return keras_xlstm.ops.mlstm(*a, implementation="triton") ** 2

    want = torch.autograd.grad(run(*inputs).sum(), inputs)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def elsewhere(x):
    """The same numbers, not at a multiple of 16 bytes."""
    first = max(1, 4 // x.itemsize)
    memory = x.new_empty(x.numel() + first)[first:].view(x.shape).copy_(x.detach())
    assert memory.data_ptr() % 16
    return memory.requires_grad_(x.requires_grad)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
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
    inputs = [x.detach() for x in _small(rng)[:5]]

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
def test_two_processes():
    command = [sys.executable, str(HERE / "two_processes.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "same gradients" in done.stdout, done.stderr[-3000:]


@runs
def test_export_is_native(rng):
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    layer = keras_xlstm.layers.mLSTM(4, num_heads=2)
    model = keras.Sequential([keras.Input((6, 3)), layer])
    assert_exports_natively(model, x)


@on_gpu
def test_steps_in_a_cuda_graph(rng):
    case = mLSTMCase(rng, T=1)
    inputs = [tensor(case.inputs[n]) for n in case.names]

    def run():
        return keras_xlstm.ops.mlstm(
            *inputs[:5], inputs[5:], return_state=True, implementation="triton"
        )

    assert_same_in_a_cuda_graph(run)
