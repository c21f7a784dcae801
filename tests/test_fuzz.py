"""Hypothesis against the oracle: sizes, values, masks, segments and options of the ops; blocks by halves.

Hundreds of cases here, thousands by `make fuzz`: FUZZ_EXAMPLES says how many for each test. What
compiles once for every shape and option draws those from a short list, unless there are thousands.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
from blocks import CASES as BLOCKS
from cases import CASES, MASKS, make_flags, mLSTMCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import BACKEND, EXAMPLES, GPU, HAS_PALLAS, INTERPRETED, array, assert_close, tensor, vjp

both = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OWN = {"jax": ["pallas"] * bool(HAS_PALLAS), "tensorflow": ["xla"], "torch": ["triton"] * GPU}
IMPLEMENTATIONS = ["triton"] if INTERPRETED else ["native", *OWN[BACKEND]]
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


def examples(count):
    # The same cases in every run of `make test`; others in every `make fuzz`.
    count = EXAMPLES or count
    return settings(max_examples=count, deadline=None, derandomize=not EXAMPLES, database=None)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("KERAS_XLSTM_INTERPRET", "1")


@pytest.mark.skipif(INTERPRETED, reason="the kernels are below")
@examples(40 if BACKEND == "torch" else 6)
@given(data=st.data())
def test_any_shape_mask_and_segments(data):
    """Random sizes, options, masks and segments, in float64."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    B, T, H = (draw(st.integers(1, n), name) for n, name in ((3, "B"), (19, "T"), (2, "H")))
    mask = draw(st.sampled_from([None, *MASKS]))
    segments = draw(st.sampled_from([None, "growing", "returning"]))
    options = make_flags(mask, segments, B, T, rng)
    options["compiled"] = BACKEND == "jax"  # op by op it would compile each
    scale = draw(st.sampled_from([0.1, 1.0, 20.0]), "gate scale")
    sizes = {"B": B, "T": T, "H": H, "state": draw(st.booleans(), "state"), "gate_scale": scale}
    if draw(st.booleans(), "mlstm"):
        K, V = draw(st.integers(1, 6), "K"), draw(st.integers(1, 6), "V")
        options["chunk_size"] = draw(st.sampled_from([None, 1, 3, 8]), "chunk_size")
        options["input_gate"] = draw(st.sampled_from(["exp", "sigmoid"]), "input_gate")
        # The gradient of q or f can be a difference of large terms: 6e-11 was seen. And all but
        # zero, where one step alone is in the memory: then rounding is all there is.
        mLSTMCase(rng, K=K, V=V, **sizes).check("float64", factor=10.0, least=1e-3, **options)
    else:
        options["forget_gate"] = draw(st.sampled_from(["sigmoid", "exp"]), "forget_gate")
        options["recurrent_gradient_clip"] = draw(st.sampled_from([None, 0.1]), "clip")
        # The gradient of m is a difference of large terms, and may be all but zero: 6e-13 was seen,
        # right to 5e-18, and 3e-6, right to 4e-16, which is rounding of terms of about 1.
        D = draw(st.integers(1, 6), "D")
        CASES["slstm"](rng, D=D, **sizes).check("float64", least=1e-4, **options)


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

    def call(*arguments):
        inputs, given = arguments[: len(case.names)], arguments[len(case.names) :]
        more = dict(zip(flags, given, strict=True)) | dict(options)
        return case.call(case, *inputs, implementation=implementation, **more)

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
    # A few steps, whole: of every gate of a step, or of one row's.
    for gate in c.gates():
        for t in draw(st.lists(st.integers(0, sizes["T"] - 1), max_size=3, unique=True), "steps"):
            gate[:, t] += draw(EXTREMES, "added")
    for name in case.names[:2] if case is mLSTMCase else case.names[:1]:
        if draw(st.booleans(), f"zeros in {name}"):
            c.inputs[name][:, draw(st.integers(0, sizes["T"] - 1), "at")] = 0.0
    return c.fresh(0) if draw(st.booleans(), "row 0 starts fresh") else c


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
    inputs, cotangents = c.tensors(dtype), [tensor(x, dtype) for x in c.cotangents]
    run = runner(case, tuple(made), tuple(options.items()), implementation)
    outputs, gradients = run(inputs, [tensor(x, x.dtype.name) for x in made.values()], cotangents)
    h, state, wanted = c.expected(inputs, **made, **options)
    # float32's m near 1e3 has a last digit of 6e-5, and weights are exponents of it. The mLSTM's
    # gradient takes m for a constant, which is exact to eps.
    tolerance = 2e-3 if kernel else 1e-7
    for name, got, want in zip(("h", *c.names[c.given :]), outputs, (h, *state), strict=True):
        assert_close(got, want, tolerance, f"{name} out", least=1e-3)
    for name, got in zip(c.names, gradients, strict=True):
        assert_close(got, wanted[name], tolerance, f"gradient of {name}", least=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@both
def test_ops(case, implementation):
    @examples(8 if implementation == "triton" else 60)
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


@pytest.mark.skipif(INTERPRETED, reason="the kernels are above")
@examples(10 if BACKEND == "torch" else 6)
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
