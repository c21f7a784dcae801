"""PyTorch: the step of `generate` compiled by its blocks, and replayed as a CUDA graph.

Without a GPU a stand-in for the graph runs what was recorded again.
"""

import shutil

import keras
import numpy as np
import pytest
from tools import BACKEND, RefusedGraph, perturbed, stand_in_for_cuda

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import torch
from keras_xlstm.backends.torch import cuda_graph, decode_step

from keras_xlstm.models import generation, xLSTMLanguageModel

GPU = torch.cuda.is_available()
KINDS = {"paper": {"pattern": "1:1"}, "large": {"architecture": "large", "logit_soft_cap": 3.0}}
each = pytest.mark.parametrize("kind", KINDS)
PROMPTS = [[3], list(range(20)), [5, 4, 3]]


def model_of(kind, rng, **options):
    model = xLSTMLanguageModel(23, 16, 2, num_heads=2, **KINDS[kind], **options)
    return perturbed(model, rng, 0.2)


def generated(model, jit_compile, count=9, prompts=PROMPTS, **options):
    options = {"temperature": 0, **options}
    texts = model.generate(prompts, count, jit_compile=jit_compile, **options)
    return [text.tolist() for text in texts]


@pytest.fixture
def recordings(monkeypatch):
    """What is recorded, "advance" or "read", on a GPU by real recordings."""
    made = []
    run = cuda_graph.CapturedGraph._run

    def recorded(self, *arguments):
        made.append(arguments[0].__name__)
        run(self, *arguments)
        if not GPU:
            self._graph.replay = lambda: run(self, *arguments)

    monkeypatch.setattr(cuda_graph.CapturedGraph, "_run", recorded)
    if not GPU:
        stand_in_for_cuda(monkeypatch, decode_step)
    return made


@each
def test_a_recording_gives_the_eager_tokens(kind, rng, recordings):
    model = model_of(kind, rng)
    want = generated(model, False)
    assert not recordings
    assert generated(model, "auto") == want
    assert recordings == ["advance"]
    assert generated(model, "auto") == want  # from the second token on
    assert recordings == ["advance", "read"]
    drawn = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 1}
    assert generated(model, "auto", **drawn) == generated(model, False, **drawn)
    assert recordings.count("advance") == 2  # other options: another function
    perturbed(model, rng)  # the weights are read where they are
    assert generated(model, "auto") == generated(model, False)
    assert (recordings.count("advance"), recordings.count("read")) == (2, 1)


def test_texts_that_take_turns(rng, recordings):
    """One recording, one set of buffers: a text whose state was put aside goes on as it was."""
    model = model_of("paper", rng)
    prompts = [[[3, 4, 5]], [[9]], [[1, 2]]]
    want = [generated(model, False, prompts=p)[0][len(p[0]) :] for p in prompts]
    streams = [model.stream(p, 9, temperature=0) for p in prompts]
    got = [[], [], []]
    for index in [0, 0, 0, 1, 1, 0, 1, 2, 2, 2, 1, 0, 0, 2, 1, 0, 0, 1, 2, 2, 1, 1, 2, 2, 0, 1, 2]:
        got[index].append(int(next(streams[index])[0]))
    assert got == want
    assert recordings.count("advance") == 1


OPTIONS = {
    "temperature": 0.8,
    "seed": 1,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
    "num_samples": 2,
}


@each
def test_the_state_of_a_recorded_text(kind, rng, recordings):
    """In the middle, at the end with rows that stopped, and while another text has the buffers."""
    model = model_of(kind, rng)
    free = generated(model, False, **OPTIONS)
    found = {}
    for jit_compile in (False, "auto"):
        options = {**OPTIONS, "jit_compile": jit_compile, "stop_token": free[0][-5]}
        first, other = (model.stream(PROMPTS, 9, **options, return_state=True) for _ in range(2))
        middle = [first.state for _ in zip(range(5), first, strict=False)]
        states = [*middle, [next(other), next(other), first.state][2]]
        rest = model.stream([[]] * 6, 4, 0, state=states[-1], jit_compile=jit_compile)
        states += [np.stack(list(rest)), np.stack(list(first)), first.state]
        texts, state = model.generate(PROMPTS, 9, **options, return_state=True)
        found[jit_compile] = [texts, states, state]
    assert recordings
    got, want = (keras.tree.flatten(found[jit_compile]) for jit_compile in ("auto", False))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (x, y)))


def test_a_processor_runs_outside_of_the_recording(rng, recordings):
    model = model_of("paper", rng)
    steps = []

    def processor(step, logits):
        steps.append(step)
        logits[:, step] = -torch.inf
        return logits

    options = {**OPTIONS, "return_log_probs": True, "logits_processor": processor}
    want = model.generate(PROMPTS, 9, jit_compile=False, **options)
    got = model.generate(PROMPTS, 9, **options)
    assert steps == [*range(9), *range(9)]
    assert len(recordings) == 1
    for x, y in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_recording_per_batch_and_place(rng, recordings):
    model = model_of("large", rng)
    sizes = [PROMPTS[:n] for n in (1, 2, 3)]
    for prompts in [*sizes, *sizes]:
        assert generated(model, "auto", prompts=prompts) == generated(model, False, prompts=prompts)
    assert recordings.count("advance") == recordings.count("read") == 3
    kernel = model.get_layer("head").kernel
    kernel.value.data = kernel.value.data.flip(-1).clone()  # elsewhere in memory
    assert generated(model, "auto") == generated(model, False)
    assert recordings.count("advance") == 4


@pytest.mark.skipif(GPU, reason="a stand-in for a device that cannot record")
def test_what_cannot_be_recorded_runs_as_it_is(rng, recordings, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "graph", RefusedGraph)
    model = model_of("large", rng)
    with caplog.at_level("INFO", "keras_xlstm"):
        assert generated(model, "auto") == generated(model, False)
    assert caplog.text.count("no CUDA graph could be made. operation not permitted") == 1
    monkeypatch.setattr(generation.backends, "block_runners", lambda blocks: None)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph.*capturing"):
        generated(model, True)


@each
def test_numbers_become_tensors_by_kernels(kind, rng, recordings, monkeypatch):
    """A copy from the host is what a CUDA graph refuses first."""
    model = model_of(kind, rng)
    copied = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in ("as_tensor", "tensor", "from_numpy", "item", "tolist", "nonzero", "cpu"):
                copied.append(name)
            return func(*args, **(kwargs or {}))

    run = cuda_graph.CapturedGraph._run

    def watched(*arguments):
        with Watch():
            run(*arguments)

    monkeypatch.setattr(cuda_graph.CapturedGraph, "_run", watched)
    options = {**OPTIONS, "top_k": 9, "top_p": 0.9, "stop_token": 3, "return_state": True}
    model.generate(PROMPTS, 9, **options, return_log_probs=True)
    assert len(recordings) == 1
    assert not copied


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@each
def test_compiled_blocks(kind, rng, monkeypatch):
    """One block of each kind, for the step alone; what `model.compile` compiled does not read."""
    compiled = []

    def compile_(function):
        compiled.append(function.__name__)
        return torch._dynamo.optimize("eager")(function)  # the code generator takes a minute

    monkeypatch.setattr(torch, "compile", compile_)
    model = model_of(kind, rng)
    want = generated(model, "auto")
    assert not compiled
    assert generated(model, True) == want
    assert len(compiled) == {"paper": 2, "large": 1}[kind]
    model.compile("adam", jit_compile=True)
    runners = [block.runner for block in model.blocks]
    assert generated(model, "auto") == want
    assert generated(model, False) == want
    assert [block.runner for block in model.blocks] == runners
