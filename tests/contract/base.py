"""What both ops compute, by whatever implementation."""

import keras
import numpy as np
import pytest
from cases import MASKS, make_flags, make_mask
from keras import ops
from tools import TOLERANCE, array, assert_close, some, tensor, vjp

import keras_xlstm

HALVES = ("float16", "bfloat16")


# Every kind of masks and of segments, with and without the other: what runs is told where to hold
# and where to start afresh, not why.
FLAGS = [
    ("left", None), ("right", "returning"), ("holes", "growing"), ("rows", "growing"),
    (None, "growing"), (None, "returning"),
]  # fmt: skip
ALL_FLAGS = [(mask, segments) for mask in MASKS for segments in (None, "growing", "returning")]


class Contract:
    """An op's subclass says what its `Case` is; an implementation's, what is below."""

    Case = None
    implementation = "native"
    options = {}  # noqa: RUF012  of every run
    sizes = {}  # noqa: RUF012  of every case that does not say otherwise
    dtypes = ("float32",)
    exact = None  # the dtype of cases that are not about rounding; the first
    # What an argument of a test varies over.
    lengths = (1, 2, 17)
    seeds = some([(0,)], [(n,) for n in range(3)])
    cuts = (7,)
    unfit = ()  # what an implementation refuses: sizes, and the error's words
    extreme_factor = 1.0  # of the tolerance, at gates of +-1e4
    extreme_sizes, extreme_options = {}, {}

    def pytest_generate_tests(self, metafunc):
        varied = {
            "dtype": self.dtypes, "carried": (True, False), "T": self.lengths, "cut": self.cuts,
            "seed": self.seeds, "size": self.heads, "changed": self.variants,
            "mask, segments": some(FLAGS, ALL_FLAGS), "hidden": ("holes", "rows"),
            "unfit, words": self.unfit,
        }  # fmt: skip
        for names, values in varied.items():
            if set(names.split(", ")) <= set(metafunc.fixturenames):
                metafunc.parametrize(names, values, ids=None if names == "seed" else str)

    def case(self, rng, **sizes):
        return self.Case(rng, **{**self.sizes, **sizes})

    def check(self, case, dtype=None, **options):
        case.check(dtype or self.exact or self.dtypes[0], **self.given(options))

    def given(self, options=()):
        return {"implementation": self.implementation, **self.options, **dict(options)}

    def op(self, *inputs, **options):
        """Outputs and states, flat, of a call that nothing compiles."""
        options = {k: v for k, v in self.given(options).items() if k not in ("compiled", "xla")}
        return self.Case.call(self.Case, *inputs, **options)

    # -------------------------------------------------------------------- against the oracle

    def test_outputs_gradients_and_states(self, dtype, carried, rng):
        self.check(self.case(rng, state=carried), dtype)

    def test_any_length(self, T, rng):
        self.check(self.case(rng, B=2, T=T, H=1), self.dtypes[0])

    def test_sizes(self, size, dtype, rng):
        self.check(self.case(rng, **{"B": 2, **size}), dtype)

    def test_masks_and_segments(self, mask, segments, rng):
        case = self.case(rng, B=4, H=1)
        self.check(case, **make_flags(mask, segments, *case.extent, rng))

    def test_one_masked_step(self, rng):
        """The state goes through as it is, and so do all its gradients."""
        self.check(self.case(rng, B=2, T=1), mask=np.array([[True], [False]]))

    def test_a_step_may_reset(self, rng):
        """A row may begin a document in its only step, or hold."""
        ids, mask = np.array([[0], [1], [0]]), np.array([[True], [True], [False]])
        self.check(self.case(rng, B=3, T=1), segment_ids=ids)
        self.check(self.case(rng, B=3, T=1), segment_ids=ids, mask=mask)

    def test_extreme_gates(self, seed):
        """Pre-activations of +-1e4 in any mixture: finite everywhere, and still right."""
        rng = np.random.default_rng(seed)
        case = self.case(rng, **self.extreme_sizes).extreme(rng)
        self.check(case, self.dtypes[0], factor=self.extreme_factor, **self.extreme_options)

    def test_a_row_that_starts_fresh(self, rng):
        """It is not touched by rows that do not, at any gate."""
        case = self.case(rng).fresh(0)
        case.gates()[0][:, 0] -= 800.0
        self.check(case, self.dtypes[0])

    def test_other_rows(self, rng):
        """NaN and inf in inputs, states and incoming gradients of one row are nothing to the others."""
        case = self.case(rng, B=4, H=1)
        for x in (*(case.inputs[n] for n in case.of_rows), *case.cotangents):
            poison(x, 1, rng)
        others, mask = [0, 2, 3], make_mask("holes", *case.extent, rng)
        for name, got, want in self.results(case, self.dtypes[0], mask=mask):
            if name not in ("gradient of R", "gradient of bias"):
                got = array(ops.cast(got, "float64"))[others]
                assert_close(got, want[others], max(1e-4, 2 * TOLERANCE[self.dtypes[0]]), name)

    cancelling = ()  # gradients that are small differences of what float32 cannot hold exactly

    def test_the_edge_of_float16(self, rng):
        """What float16 can hold comes out finite, whatever the gates."""
        if "float16" not in self.dtypes:
            pytest.skip("not one of its dtypes")
        case, largest = self.case(rng, B=2, H=1).at_the_edge(rng), 65504.0
        for name, got, want in self.results(case, "float16"):
            if name.removeprefix("gradient of ") in self.cancelling:
                continue
            half = keras.backend.standardize_dtype(got.dtype) == "float16"
            held = np.abs(want) < (0.99 * largest if half else 1e37)
            assert np.isfinite(array(ops.cast(got, "float32")))[held].all(), name

    def results(self, case, dtype, **options):
        """(name, got, the oracle's) of outputs, states and gradients."""
        with np.errstate(all="ignore"):  # the oracle is given NaN, too
            (outputs, gradients), (h, states, wanted) = case.run(dtype, **self.given(options))
        yield from zip(("h", *case.names[case.given :]), outputs, (h, *states), strict=True)
        for name, got in zip(case.names, gradients, strict=True):
            yield f"gradient of {name}", got, wanted[name]

    # ------------------------------------------------------------------- one call and another

    def test_without_states(self, rng):
        """From an empty state, without what may be left out; h alone is returned."""
        case, dtype = self.case(rng).fresh(), self.dtypes[0]
        for name in case.names[case.required : case.given]:
            case.inputs[name][:] = 0.0
        case.cotangents[1:] = [np.zeros_like(x) for x in case.cotangents[1:]]
        inputs = case.tensors(dtype)
        op, options = getattr(keras_xlstm.ops, case.op), self.given()
        how = {name: options.pop(name) for name in ("compiled", "xla") if name in options}
        cotangents = [tensor(case.cotangents[0], case.state_dtype(dtype))]
        (h,), gradients = vjp(
            lambda *first: (op(*first, **options),), inputs[: case.required], cotangents, **how
        )
        want, _, wanted = case.expected(inputs, **options)
        assert_close(ops.cast(h, "float64"), want, TOLERANCE[dtype], "h")
        for name, got in zip(case.names[: case.required], gradients, strict=True):
            name, want = f"gradient of {name}", wanted[name]
            assert_close(ops.cast(got, "float64"), want, TOLERANCE[dtype], name)

    def test_nothing_reaches_past_a_mask(self, hidden, rng):
        """NaN and inf in masked steps change no bit of outputs, states and gradients."""
        case = self.case(rng, B=3)
        mask = make_mask(hidden, *case.extent, rng)
        found = []
        for _ in range(2):
            got, _ = case.run(self.dtypes[0], mask=mask, **self.given())
            found.append([array(ops.cast(x, "float32")) for x in (*got[0], *got[1])])
            for name in case.names[: case.timed]:
                poison(case.inputs[name], ~mask, rng)
        for clean, poisoned in zip(*found, strict=True):
            np.testing.assert_array_equal(clean, poisoned)

    def test_split_anywhere(self, cut, rng):
        """Two passes with the state carried are one pass, in outputs, states and gradients."""
        case, dtype = self.case(rng), self.exact or self.dtypes[0]
        options = self.given()
        how = {name: options.pop(name) for name in ("compiled", "xla") if name in options}

        def once(*inputs):
            return case.call(*inputs, **options)

        def twice(*inputs):
            first, *states = once(*case.steps(inputs, 0, cut))
            second, *states = once(*case.steps([*inputs[: case.given], *states], cut, None))
            return ops.concatenate([first, second], axis=1), *states

        cotangents = [tensor(x, case.state_dtype(dtype)) for x in case.cotangents] + [None]
        one, two = (vjp(run, case.tensors(dtype), cotangents, **how) for run in (once, twice))
        for a, b in zip([*two[0], *two[1]], [*one[0], *one[1]], strict=True):
            assert_close(a, array(b), TOLERANCE[dtype])

    def test_steps_are_the_sequence(self, rng):
        case = self.case(rng)
        case.gates()[0][:, case.extent[1] // 2] -= 1e4
        self.steps_are_the_sequence(case)

    def steps_are_the_sequence(self, case, **options):
        dtype = self.exact or self.dtypes[0]
        inputs = case.tensors(dtype)
        for states in (inputs[case.given :], [ops.zeros_like(s) for s in inputs[case.given :]]):
            want, *want_states = self.op(*inputs[: case.given], *states, **options)
            out = []
            for t in range(case.extent[1]):
                step = case.steps([*inputs[: case.given], *states], t, t + 1)
                h, *states = self.op(*step, **options)
                out.append(array(ops.cast(h, "float32" if dtype in HALVES else dtype)))
            pairs = zip((np.concatenate(out, 1), *states), (want, *want_states), strict=True)
            for a, b in pairs:
                assert_close(a, array(ops.cast(b, "float64")), TOLERANCE[dtype])

    def test_causal_and_rows_independent(self, rng):
        case = self.case(rng)
        at = case.extent[1] * 2 // 3
        before, after = [], []
        for found in (before, after):
            found += [array(self.op(*case.tensors(self.dtypes[0])[: case.given])[0])]
            for name in case.names[: case.timed]:
                case.inputs[name][0, at:] += rng.normal(size=case.inputs[name][0, at:].shape)
        (before,), (after,) = before, after
        np.testing.assert_array_equal(before[0, :at], after[0, :at])
        np.testing.assert_array_equal(before[1:], after[1:])
        # In 16 bits a few may come out equal.
        assert (before[0, at:] != after[0, at:]).mean() > 0.99


def poison(x, where, rng):
    x[where] = rng.choice([np.nan, np.inf, -np.inf], x[where].shape)
