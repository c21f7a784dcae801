"""The functional ops against the float64 oracle: outputs, every gradient, states."""

import keras
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from tools import BACKEND, TOLERANCE, array, assert_close, error, tensor, vjp

import keras_xlstm

MASKS = ("left", "right", "holes", "rows")


def make_mask(kind, B, T, rng):
    if kind is None:
        return None
    t = np.arange(T)[None]
    lengths = rng.integers(1, T + 1, (B, 1))
    mask = {
        "left": t >= T - lengths,
        "right": t < lengths,
        "holes": rng.random((B, T)) < 0.6,
        "rows": np.broadcast_to(np.arange(B)[:, None] % 2 == 0, (B, T)),
    }[kind]
    return np.array(mask)


def make_segments(kind, B, T, rng):
    if kind is None:
        return None
    ids = np.cumsum(rng.random((B, T)) < min(0.5, 4 / T), axis=1)
    return ids % 2 if kind == "returning" else ids  # an id that comes back is a new segment


def flags(mask, segment_ids):
    """Those that are there, by name: arguments of a compiled function, not constants in it."""
    given = {"mask": mask, "segment_ids": segment_ids}
    given = {name: tensor(a, a.dtype.name) for name, a in given.items() if a is not None}
    return given.keys(), given.values()


class mLSTMCase:
    names = ("q", "k", "v", "i", "f", "C", "n", "m")

    def __init__(self, rng, B=3, T=20, H=2, K=5, V=7, state=True, gate_scale=1.0):
        self.inputs = {n: rng.normal(size=(B, T, H, d)) for n, d in zip("qkv", (K, K, V))}
        self.inputs |= {n: gate_scale * rng.normal(size=(B, T, H)) for n in "if"}
        self.inputs["f"] += 2.0
        shapes = {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
        scale = 1.0 if state else 0.0
        self.inputs |= {n: scale * rng.normal(size=s) for n, s in shapes.items()}
        self.cotangents = [rng.normal(size=s) for s in ((B, T, H, V), shapes["C"], shapes["n"])]

    def run(self, dtype, mask=None, segment_ids=None, compiled=True, xla=True, **options):
        inputs = [tensor(self.inputs[n], dtype) for n in self.names]
        work = "float64" if dtype == "float64" else "float32"
        inputs[5:] = [tensor(self.inputs[n], work) for n in "Cnm"]

        def call(q, k, v, i, f, C, n, m, *given):
            given = dict(zip(names, given, strict=True))
            h, (C, n, m) = keras_xlstm.ops.mlstm(
                q, k, v, i, f, (C, n, m), return_state=True, **given, **options
            )
            return h, C, n, m

        cotangents = [tensor(c, work) for c in self.cotangents] + [None]
        names, given = flags(mask, segment_ids)
        got = vjp(call, inputs, cotangents, compiled, xla, given)
        rounded = [np.asarray(array(ops.cast(x, "float64")), np.float64) for x in inputs]
        options = {k: v for k, v in options.items() if k in ("input_gate", "eps")}
        want = oracle.mlstm(
            *rounded[:5], rounded[5:], mask, segment_ids, gradients=self.cotangents, **options
        )
        return got, want

    def check(self, dtype="float32", factor=1.0, least=0.0, **options):
        ((h, C, n, m), gradients), (want_h, want_state, want_gradients) = self.run(dtype, **options)
        tolerance = TOLERANCE[dtype] * factor
        assert keras.backend.standardize_dtype(h.dtype) == dtype
        assert_close(ops.cast(h, "float64"), want_h, tolerance, "h")
        # m may differ in its last digit, where that is worth more than C's: compare in one scale.
        scale = np.exp(array(m) - want_state[2])
        states = (array(C) * scale[..., None, None], array(n) * scale[..., None], m)
        for name, a, b in zip("Cnm", states, want_state, strict=True):
            assert_close(a, b, tolerance, f"last {name}", least if name == "m" else 0.0)
        for name, a in zip(self.names, gradients, strict=True):
            name, want = f"gradient of {name}", want_gradients[name]
            assert_close(ops.cast(a, "float64"), want, tolerance, name, least)


class sLSTMCase:
    names = ("x", "R", "bias", "h", "c", "n", "m")

    def __init__(self, rng, B=3, T=20, H=2, D=6, state=True, gate_scale=1.0):
        self.inputs = {
            "x": rng.normal(size=(B, T, 4, H, D)),
            "R": rng.normal(size=(H, D, 4, D)) / np.sqrt(D),
            "bias": rng.normal(size=(4, H, D)),
        }
        self.inputs["x"][:, :, :2] *= gate_scale
        scale = 1.0 if state else 0.0
        self.inputs |= {n: scale * rng.normal(size=(B, H, D)) for n in "hcm"}
        self.inputs["n"] = scale * (rng.random((B, H, D)) + 0.5)
        self.cotangents = [rng.normal(size=(B, T, H, D))]
        self.cotangents += [rng.normal(size=(B, H, D)) for _ in "hcn"]

    def run(self, dtype, mask=None, segment_ids=None, compiled=True, xla=True, **options):
        inputs = [tensor(self.inputs[n], dtype) for n in self.names]
        work = "float64" if dtype == "float64" else "float32"
        inputs[3:] = [tensor(self.inputs[n], work) for n in "hcnm"]

        def call(x, R, bias, h, c, n, m, *given):
            given = dict(zip(names, given, strict=True))
            h, state = keras_xlstm.ops.slstm(
                x, R, bias, (h, c, n, m), return_state=True, **given, **options
            )
            return h, *state

        cotangents = [tensor(c, work) for c in self.cotangents] + [None]
        names, given = flags(mask, segment_ids)
        got = vjp(call, inputs, cotangents, compiled, xla, given)
        rounded = [np.asarray(array(ops.cast(x, "float64")), np.float64) for x in inputs]
        want = oracle.slstm(
            *rounded[:3], rounded[3:], mask, segment_ids,
            forget_gate=options.get("forget_gate", "sigmoid"),
            clip=options.get("recurrent_gradient_clip"), scale=options.get("recurrent_scale"),
            gradients=self.cotangents,
        )  # fmt: skip
        return got, want

    def check(self, dtype="float32", factor=1.0, least=0.0, **options):
        ((h, *state), gradients), (want_h, want_state, want_gradients) = self.run(dtype, **options)
        tolerance = TOLERANCE[dtype] * factor
        assert keras.backend.standardize_dtype(h.dtype) == dtype
        assert_close(ops.cast(h, "float64"), want_h, tolerance, "h")
        scale = np.exp(array(state[3]) - want_state[3])
        state[1:3] = (array(s) * scale for s in state[1:3])
        for name, a, b in zip("hcnm", state, want_state, strict=True):
            assert_close(a, b, tolerance, f"last {name}", least if name == "m" else 0.0)
        for name, a in zip(self.names, gradients, strict=True):
            name, want = f"gradient of {name}", want_gradients[name]
            assert_close(ops.cast(a, "float64"), want, tolerance, name, least)


CASES = {"mlstm": mLSTMCase, "slstm": sLSTMCase}
both = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_outputs_gradients_and_states(case, dtype, state, rng):
    case(rng, state=state).check(dtype)


@both
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257])
def test_any_length(case, T, rng):
    case(rng, B=2, T=T, H=1).check(xla=T in (1, 65))


@pytest.mark.parametrize("T", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_chunk_size_does_not_matter(T, chunk_size, rng):
    mLSTMCase(rng, T=T, H=1).check("float64", chunk_size=chunk_size, xla=T > chunk_size == 4)


@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "growing", "returning"])
def test_masks_and_segments(case, mask, segments, rng):
    B, T = 4, 21
    options = {
        "mask": make_mask(mask, B, T, rng),
        "segment_ids": make_segments(segments, B, T, rng),
    }
    options |= {"chunk_size": 8} if case is mLSTMCase else {}
    case(rng, B=B, T=T, H=1).check("float64", xla=mask == "holes", **options)


@both
def test_one_masked_step(case, rng):
    """The state goes through as it is, and so do all its gradients."""
    case(rng, B=2, T=1).check("float64", mask=np.array([[True], [False]]))


@both
@pytest.mark.parametrize("segments", ["growing", "returning"])
def test_segments(case, segments, rng):
    options = {"chunk_size": 16} if case is mLSTMCase else {}
    ids = make_segments(segments, 3, 50, rng)
    case(rng, T=50, H=1).check(segment_ids=ids, **options)


def test_sigmoid_input_gate(rng):
    mLSTMCase(rng).check("float64", input_gate="sigmoid")


def test_eps(rng):
    mLSTMCase(rng).check("float64", eps=0.1)
    mLSTMCase(rng).check("float64", eps=0.0)


def test_exponential_forget_gate(rng):
    case = sLSTMCase(rng)
    mask = make_mask("holes", 3, 20, rng)
    case.check("float64", forget_gate="exp")
    case.check("float64", forget_gate="exp", mask=mask)


def test_recurrent_gradient_clip(rng):
    sLSTMCase(rng).check("float64", recurrent_gradient_clip=0.05)


def test_recurrent_scale(rng):
    scale = rng.random((3, 2, 6))
    mask = make_mask("holes", 3, 20, rng)
    sLSTMCase(rng).check("float64", recurrent_scale=scale, mask=mask)


@both
def test_uncompiled(case, rng):
    case(rng, T=9).check("float64", compiled=False)


def with_extreme_gates(seed, **sizes):
    """An mLSTM's case for kernels: gates of +-1e4 in any mixture; no cotangents of states."""
    rng = np.random.default_rng(seed)
    case = mLSTMCase(rng, **{"T": 40, "H": 2, **sizes})
    case.cotangents[1:] = [np.zeros_like(x) for x in case.cotangents[1:]]
    for gate in "if":
        case.inputs[gate] += 1e4 * (rng.integers(0, 3, case.inputs[gate].shape) - 1)
    return case


def assert_a_step_resets(case, implementation):
    """A single step whose row may begin a document, beside the native form."""
    inputs = [tensor(case.inputs[n]) for n in case.names]
    ids = tensor(np.array([[0], [1], [0]]), "int32")
    kernel, native = (
        keras_xlstm.ops.mlstm(
            *inputs[:5], inputs[5:], segment_ids=ids, return_state=True, implementation=name
        )
        for name in (implementation, "native")
    )
    for a, b in zip(keras.tree.flatten(kernel), keras.tree.flatten(native), strict=True):
        assert_close(a, array(b), 2e-5)


@both
@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates(case, seed):
    """Pre-activations of +-1e4 in any mixture: finite everywhere, and still right."""
    rng = np.random.default_rng(seed)
    c = case(rng, T=40, H=2)
    c.cotangents[1:] = [np.zeros_like(x) for x in c.cotangents[1:]]  # of states: see above
    if case is mLSTMCase:
        for gate in "if":
            c.inputs[gate] += 1e4 * (rng.integers(0, 3, c.inputs[gate].shape) - 1)
    else:
        shape = c.inputs["x"][:, :, :2].shape
        c.inputs["x"][:, :, :2] += 1e4 * (rng.integers(0, 3, shape) - 1)
    # sLSTM's m itself is a float32 near 1e4 here: its last digit is worth 1e-3.
    # mLSTM's gradient of f is a difference of larger terms: 3.5e-5 was seen on TensorFlow.
    c.check("float32", factor=5.0 if case is mLSTMCase else 50.0)


@both
def test_official_zero_state_is_a_fresh_start(case, rng):
    c = case(rng, state=False)
    first = [tensor(c.inputs[n]) for n in c.names]
    op = getattr(keras_xlstm.ops, "mlstm" if case is mLSTMCase else "slstm")
    size = 5 if case is mLSTMCase else 3
    with_zeros = op(*first[:size], first[size:])
    assert error(op(*first[:size]), array(with_zeros)) == 0
    # A row of the batch that starts fresh is not touched by one that does not, at any gate.
    c = case(np.random.default_rng(1))
    for n in c.names[size:]:
        c.inputs[n][0] = 0.0
    c.inputs["i" if case is mLSTMCase else "x"][:, 0] -= 800.0
    c.check("float32")


@both
def test_nothing_reaches_past_a_mask(case, rng):
    """NaN in masked steps reaches no output, state or gradient."""
    B, T = 3, 20
    mask = make_mask("holes", B, T, rng)
    c = case(rng, B=B, T=T)
    clean = c.run("float32", mask=mask)[0]
    for name in c.names[: 5 if case is mLSTMCase else 1]:
        c.inputs[name][~mask] = np.nan
    poisoned = c.run("float32", mask=mask)[0]
    for a, b in zip([*clean[0], *clean[1]], [*poisoned[0], *poisoned[1]], strict=True):
        np.testing.assert_array_equal(array(a), array(b))


@both
@pytest.mark.parametrize("cut", [1, 7, 16])
def test_split_anywhere(case, cut, rng):
    """Two passes with the state carried are one pass, in outputs, states and gradients."""
    c = case(rng, T=20)
    inputs = [tensor(c.inputs[n], "float64") for n in c.names]
    op = keras_xlstm.ops.mlstm if case is mLSTMCase else keras_xlstm.ops.slstm
    timed = 5 if case is mLSTMCase else 1

    def once(*arguments):
        size = 5 if case is mLSTMCase else 3
        h, state = op(*arguments[:size], arguments[size:], return_state=True)
        return h, *state

    def twice(*arguments):
        size = 5 if case is mLSTMCase else 3
        early = [a[:, :cut] if j < timed else a for j, a in enumerate(arguments[:size])]
        late = [a[:, cut:] if j < timed else a for j, a in enumerate(arguments[:size])]
        first, state = op(*early, arguments[size:], return_state=True)
        second, state = op(*late, state, return_state=True)
        return ops.concatenate([first, second], axis=1), *state

    cotangents = [tensor(x, "float64") for x in c.cotangents] + [None]
    a, b = (vjp(run, inputs, cotangents, xla=cut == 7) for run in (once, twice))
    for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True):
        assert_close(x, array(y), 1e-10)


@both
def test_causal_and_rows_independent(case, rng):
    c = case(rng, T=20)
    names = c.names[: 5 if case is mLSTMCase else 3]
    op = keras_xlstm.ops.mlstm if case is mLSTMCase else keras_xlstm.ops.slstm
    options = {"chunk_size": 8} if case is mLSTMCase else {}
    before = array(op(*(tensor(c.inputs[n]) for n in names), **options))
    for n in names[: 5 if case is mLSTMCase else 1]:
        c.inputs[n][0, 13:] += rng.normal(size=c.inputs[n][0, 13:].shape)
    after = array(op(*(tensor(c.inputs[n]) for n in names), **options))
    np.testing.assert_array_equal(before[0, :13], after[0, :13])
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0, 13:] - after[0, 13:]).min() > 0


def test_one_step_at_a_time(rng):
    for case, op, size, timed in (
        (mLSTMCase(rng), keras_xlstm.ops.mlstm, 5, 5),
        (sLSTMCase(rng), keras_xlstm.ops.slstm, 3, 1),
    ):
        inputs = [tensor(case.inputs[n], "float64") for n in case.names]
        want, want_state = op(*inputs[:size], inputs[size:], return_state=True)
        state, out = inputs[size:], []
        for t in range(20):
            step = [a[:, t : t + 1] if j < timed else a for j, a in enumerate(inputs[:size])]
            h, state = op(*step, state, return_state=True)
            out.append(array(h))
        assert_close(np.concatenate(out, 1), array(want), 1e-12)
        for a, b in zip(state, want_state, strict=True):
            assert_close(a, array(b), 1e-12)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has unknown sizes at run time")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_unknown_batch_and_length(jit_compile, rng):
    import tensorflow as tf

    for case, op, size, timed in (
        (mLSTMCase(rng, T=70), keras_xlstm.ops.mlstm, 5, 5),
        (sLSTMCase(rng, T=70), keras_xlstm.ops.slstm, 3, 1),
    ):
        inputs = [tensor(case.inputs[n]) for n in case.names[:size]]
        specs = [
            tf.TensorSpec([None, None, *x.shape[2:]] if j < timed else x.shape, x.dtype)
            for j, x in enumerate(inputs)
        ]

        def run(*arguments, op=op):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                h = op(*arguments)
                loss = tf.reduce_sum(h**2)
            return h, *tape.gradient(loss, arguments)

        got = tf.function(run, input_signature=specs, jit_compile=jit_compile)(*inputs)
        for a, b in zip(got, run(*inputs), strict=True):
            assert_close(a, array(b), 1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has symbolic sizes")
def test_symbolic_sizes(rng):
    import jax
    from jax import export

    for case, op, size, timed in (
        (mLSTMCase(rng, T=33), keras_xlstm.ops.mlstm, 5, 5),
        (sLSTMCase(rng, T=33), keras_xlstm.ops.slstm, 3, 1),
    ):
        inputs = [tensor(case.inputs[n]) for n in case.names[:size]]
        b, t = export.symbolic_shape("b, t")
        specs = [
            jax.ShapeDtypeStruct((b, t, *x.shape[2:]) if j < timed else x.shape, x.dtype)
            for j, x in enumerate(inputs)
        ]
        exported = export.export(jax.jit(lambda *a, op=op: op(*a)))(*specs)
        assert_close(exported.call(*inputs), array(op(*inputs)), 1e-5)


@settings(max_examples=40 if BACKEND == "torch" else 6, deadline=None)
@given(data=st.data())
def test_any_shape_mask_and_segments(data):
    """Random sizes, options, masks and segments, in float64, against the oracle."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    B, T, H = (draw(st.integers(1, n), name) for n, name in ((3, "B"), (19, "T"), (2, "H")))
    options = {
        "mask": make_mask(draw(st.sampled_from([None, *MASKS])), B, T, rng),
        "segment_ids": make_segments(
            draw(st.sampled_from([None, "growing", "returning"])), B, T, rng
        ),
        "compiled": BACKEND == "jax",  # op by op it would compile each
    }
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
        sLSTMCase(rng, D=D, **sizes).check("float64", least=1e-4, **options)
