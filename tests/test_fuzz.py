"""Hypothesis against the oracle: values, masks, segments and options of the ops; blocks by halves.

Hundreds of cases here, thousands by `make fuzz`: FUZZ_EXAMPLES says how many for each test. What
compiles once for every shape and option draws those from a short list, unless there are thousands.
"""

import functools
import itertools
import os

import keras
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import CASES as BLOCKS
from test_ops import mLSTMCase, sLSTMCase
from test_poison import IMPLEMENTATIONS, interpreter  # noqa: F401  a fixture
from tools import BACKEND, array, assert_close, tensor, vjp

import keras_xlstm

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FLAGS = [("mask", "segment_ids"), (), ("mask",), ("segment_ids",)]
SIZES = [{"B": 3, "T": 9, "H": 2}, {"B": 2, "T": 21, "H": 1}, {"B": 1, "T": 1, "H": 3}]
MLSTM = [
    {"input_gate": gate, "eps": eps, "chunk_size": chunk}
    for gate, eps, chunk in itertools.product(["exp", "sigmoid"], [1e-6, 0.1], [None, 16, 4])
]
SLSTM = [
    {"forget_gate": gate, "recurrent_gradient_clip": clip}
    for gate, clip in itertools.product(["sigmoid", "exp"], [None, 0.1])
]
EXTREMES = st.sampled_from([0.0, 1.0, -1.0, 20.0, -20.0, 1e3, -1e3])
IDS = st.sampled_from([0, 1, 2, -1, 2**31 - 1, -(2**31)])


def examples(torch, others):
    count = EXAMPLES or (torch if BACKEND == "torch" else others)
    # The same cases in every run of `make test`; others in every `make fuzz`.
    return settings(max_examples=count, deadline=None, derandomize=not EXAMPLES, database=None)


def configurations(case, implementation):
    """(sizes, options, which flags), all of them or a few that meet every option."""
    known = MLSTM if case is mLSTMCase else SLSTM
    if implementation in ("triton", "pallas") and case is mLSTMCase:
        known = [{**options, "chunk_size": 16} for options in known]
    found = list(itertools.product(SIZES, known, FLAGS))
    if EXAMPLES or BACKEND == "torch":
        return found
    few = 1 if implementation == "pallas" else 4
    return [found[i * len(found) // few + i] for i in range(few)]


@functools.cache
def runner(case, flags, options, implementation):
    """Outputs and all gradients as one function, which a framework compiles once for a shape."""
    is_mlstm = case is mLSTMCase
    op = keras_xlstm.ops.mlstm if is_mlstm else keras_xlstm.ops.slstm
    size = 5 if is_mlstm else 3

    def call(*arguments):
        inputs, given = arguments[: len(case.names)], arguments[len(case.names) :]
        h, state = op(
            *inputs[:size], inputs[size:], return_state=True, implementation=implementation,
            **dict(zip(flags, given, strict=True)), **dict(options),
        )  # fmt: skip
        return h, *state

    def run(inputs, given, cotangents):
        return vjp(call, inputs, [*cotangents, None], compiled=False, given=given)

    if BACKEND == "jax":
        import jax

        return jax.jit(run)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(run, autograph=False)
    return run


def drawn(draw, case, sizes):
    """A case with gates at extremes, steps of zeros and rows that start fresh."""
    c = case(np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed")), **sizes)
    gates = [c.inputs[n] for n in "if"] if case is mLSTMCase else [c.inputs["x"]]
    # A few steps, whole: of every gate of a step, or of one row's.
    for gate in gates:
        for t in draw(st.lists(st.integers(0, sizes["T"] - 1), max_size=3, unique=True), "steps"):
            part = gate[:, t, :2] if case is sLSTMCase else gate[:, t]
            part += draw(EXTREMES, "added")
    for name in case.names[:2] if case is mLSTMCase else case.names[:1]:
        if draw(st.booleans(), f"zeros in {name}"):
            c.inputs[name][:, draw(st.integers(0, sizes["T"] - 1), "at")] = 0.0
    if draw(st.booleans(), "row 0 starts fresh"):
        for name in case.names[5 if case is mLSTMCase else 3 :]:
            c.inputs[name][0] = 0.0
    return c


def drawn_flags(draw, flags, B, T):
    def table(elements, name):
        row = st.lists(elements, min_size=T, max_size=T)
        return np.array(draw(st.lists(row, min_size=B, max_size=B), name))

    made = {}
    if "mask" in flags:
        made["mask"] = table(st.booleans(), "mask")
    if "segment_ids" in flags:
        made["segment_ids"] = table(IDS, "segment_ids").astype("int32")
    return made


def check(case, implementation, draw):
    sizes, options, flags = draw(st.sampled_from(configurations(case, implementation)), "config")
    c = drawn(draw, case, sizes)
    made = drawn_flags(draw, flags, sizes["B"], sizes["T"])
    kernel = implementation in ("triton", "pallas")
    dtype = "float32" if kernel else "float64"
    inputs, cotangents = (
        [tensor(x, dtype) for x in arrays]
        for arrays in ([c.inputs[name] for name in c.names], c.cotangents)
    )
    run = runner(case, tuple(made), tuple(options.items()), implementation)
    outputs, gradients = run(inputs, [tensor(x, x.dtype.name) for x in made.values()], cotangents)
    given = [np.asarray(array(x), np.float64) for x in inputs]
    known = {k: v for k, v in options.items() if k != "chunk_size"}
    if case is sLSTMCase:
        known["clip"] = known.pop("recurrent_gradient_clip")
    size = 5 if case is mLSTMCase else 3
    h, state, wanted = getattr(oracle, "mlstm" if case is mLSTMCase else "slstm")(
        *given[:size], given[size:], made.get("mask"), made.get("segment_ids"),
        gradients=[array(x) for x in cotangents], **known,
    )  # fmt: skip
    # float32's m near 1e3 has a last digit of 6e-5, and weights are exponents of it. The mLSTM's
    # gradient takes m for a constant, which is exact to eps.
    tolerance = 2e-3 if kernel else 1e-7
    for name, got, want in zip(("h", *c.names[size:]), outputs, (h, *state), strict=True):
        assert_close(got, want, tolerance, f"{name} out", least=1e-3)
    for name, got in zip(c.names, gradients, strict=True):
        assert_close(got, wanted[name], tolerance, f"gradient of {name}", least=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [mLSTMCase, sLSTMCase], ids=["mlstm", "slstm"])
def test_ops(case, implementation):
    @examples(torch=8 if implementation == "triton" else 60, others=60)
    @given(data=st.data())
    def run(data):
        check(case, implementation, data.draw)

    run()


@functools.cache
def block_of(name):
    Block, options = BLOCKS[name]
    block = Block(num_heads=2, return_state=True, **options)
    block.build((None, None, 16))
    return block


@pytest.mark.skipif("triton" in IMPLEMENTATIONS, reason="the kernels are above")
@examples(torch=10, others=6)
@given(data=st.data())
def test_blocks_in_two_parts(data):
    """Any mask and any segments: two calls with the state carried are one call, and whatever
    stands at masked steps changes no other."""
    draw, (B, T, cut) = data.draw, (2, 8, 4)
    block = block_of(draw(st.sampled_from(list(BLOCKS)[: None if EXAMPLES else 5]), "block"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    mask = drawn_flags(draw, ("mask",), B, T)["mask"]
    x = rng.normal(size=(B, T, 16)).astype("float32")
    want, *want_state = block(x, mask=mask)
    x[~mask] = draw(st.sampled_from([np.nan, np.inf, 1e30]), "padding")
    first, *state = block(x[:, :cut], mask=mask[:, :cut])
    second, *state = block(x[:, cut:], mask=mask[:, cut:], initial_state=state)
    got = keras.ops.concatenate([first, second], axis=1)
    got, want = (np.where(mask[..., None], array(y), 0.0) for y in (got, want))
    assert_close(got, want, 1e-5, least=1e-3)
    for a, b in zip(state, want_state, strict=True):
        assert_close(a, array(b), 1e-5, least=1e-3)
