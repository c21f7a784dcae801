"""The native form of both ops, and what is picked by itself, against the float64 oracle."""

import itertools

import numpy as np
import oracle
import pytest
from cases import CASES, make_flags
from contract.mlstm import mLSTM
from contract.slstm import sLSTM
from tools import BACKEND, array, assert_close, error, some

import keras_xlstm

DTYPES = ("float32", "float64", "float16", "bfloat16")
# As a graph: XLA on TensorFlow takes ten times as long to compile, and has tests of its own.
GRAPH = {"xla": False}


class TestMLSTM(mLSTM):
    options, dtypes, exact = {**GRAPH, "chunk_size": 8}, DTYPES, "float64"
    sizes, cuts, heads = {"T": 21}, (1, 7, 16), ({"K": 1, "V": 3},)
    extreme_sizes, extreme_options = {"T": 40}, {"chunk_size": 64}

    @pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
    def test_chunks_of_any_length(self, length, rng):
        self.check(self.case(rng, B=2, T=length, H=1), "float32", chunk_size=None)

    @pytest.mark.parametrize(("chunk_size", "length"), some(
        [(1, 17), (4, 15), (4, 16), (16, 1), (16, 16), (16, 17), (16, 33)],
        itertools.product([1, 4, 16], [1, 15, 16, 17, 33]),
    ))  # fmt: skip
    def test_chunk_size_does_not_matter(self, chunk_size, length, rng):
        self.check(self.case(rng, T=length, H=1), chunk_size=chunk_size)


class TestSLSTM(sLSTM):
    options, dtypes, exact, cuts = GRAPH, DTYPES, "float64", (1, 7, 16)


both = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@both
def test_uncompiled(case, rng):
    case(rng, T=9).check("float64", compiled=False)


@both
def test_what_is_picked_by_itself(case, rng):
    case(rng).check("float32", xla=False)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow's graphs reorder sums")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_extreme_gates_in_a_forward_pass_alone(chunk_size, seed):
    """Large numbers that cancel must meet each other first. A backward pass would keep the sums
    apart."""
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    inputs = CASES["mlstm"](rng, T=40).fresh().extreme(rng).tensors()[:5]

    def call(*inputs):
        return keras_xlstm.ops.mlstm(*inputs, chunk_size=chunk_size, implementation="native")

    want = oracle.mlstm(*(np.asarray(array(x), np.float64) for x in inputs), None, None, None)[0]
    assert_close(array(tf.function(call, autograph=False)(*inputs)), want, 1e-5)


@both
def test_states_of_zeros_are_none(case, rng):
    """The papers' start: the same to the last bit."""
    inputs = case(rng).fresh().tensors()
    op = getattr(keras_xlstm.ops, case.op)
    first = inputs[: case.given]
    assert error(op(*first), array(op(*first, inputs[case.given :]))) == 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere all of it is compiled, or nothing")
@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_what_xla_compiles(case, dtype, rng):
    case(rng, T=70).check(dtype)
    if dtype == "float64":
        case(rng, T=1).check(dtype)
        case(rng).check(dtype, **make_flags("holes", "returning", 3, 20, rng))


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has symbolic sizes")
@both
def test_symbolic_sizes(case, rng):
    import jax
    from jax import export

    c = case(rng, T=33)
    op = getattr(keras_xlstm.ops, case.op)
    inputs = c.tensors()[: case.given]
    b, t = export.symbolic_shape("b, t")
    specs = [
        jax.ShapeDtypeStruct((b, t, *x.shape[2:]) if j < case.timed else x.shape, x.dtype)
        for j, x in enumerate(inputs)
    ]
    exported = export.export(jax.jit(lambda *a: op(*a)))(*specs)
    assert_close(exported.call(*inputs), array(op(*inputs)), 1e-5)
