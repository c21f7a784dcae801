"""Keras's own tests of recurrent layers, with ours in the place of LSTM, GRU and SimpleRNN.

KERAS_BACKEND=torch python tests/keras_suite/run.py [KERAS]

KERAS is a checkout of Keras at the version that is installed: the folder that holds `keras/src`.
From a git directory without files: `git archive v3.15.1 keras/src | tar x -C folder`. Without
it the tests that Keras's own wheel carries are taken. Nothing of Keras is copied to the disk.

Every test runs in two ways, for sLSTM and for mLSTM:

- swapped: the word alone is changed. Such a test also fails for numbers that LSTM computed, for
  arguments that LSTM alone has and for its two states: that is the substitution, not a fault, and
  says nothing of what ours would have given there.
- adapted: arguments are said in our words, and of numbers the pattern is compared: places where
  LSTM's outputs are equal (a state carried on, a step repeated under a mask, unrolled or not) must
  be equal in ours, and zeros must be zeros.

A failure that the substitution does not explain and `EXPECTED` does not list ends the run with 1,
and so does an entry of `EXPECTED` that no longer fails.
"""

import argparse
import collections
import functools
import importlib.util
import io
import os
import pathlib
import re
import sys
import types
import unittest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Nearly all of the time is XLA compiling what runs once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_xlstm.layers import mLSTM, sLSTM, sLSTMCell  # noqa: E402

FILES = ["lstm", "rnn", "bidirectional", "time_distributed", "stacked_rnn_cells"]
LAYERS = {"sLSTM": sLSTM, "mLSTM": mLSTM}

# What no substitution can bring: a pattern in an error, and the reason.
SUBSTITUTION = [
    (
        r"Unrecognized keyword arguments passed to \w+: \{'(implementation|unroll|use_cudnn|"
        r"unit_forget_bias|recurrent_initializer|recurrent_dropout|dropout|reset_after|state_size)'"
        r"|has no attribute 'use_cudnn'",
        "arguments of the layer that stood there",
    ),
    (
        r"must be (a list of )?the \d tensors|(too many|not enough) values to unpack",
        "how many states the layer that stood there has",
    ),
    (r"Unexpected number of trainable_weights", "how many weights the layer that stood there has"),
    (r"False is not true$", "cuDNN's way for two directions, of LSTM and GRU alone"),
]
# In a test that is only swapped. Shapes that differ are no numbers.
NUMBERS = r"^AssertionError: +Not equal to tolerance(?!.*\(shapes)"

# (way, test): why, where none of the above says it.
EXPECTED = {
    ("swapped", "bidirectional_test::test_output_shape"): (
        "ours, on purpose: sequences of integers are refused, because they are token ids that "
        "nothing embeds more often than numbers"
    ),
    ("adapted", "stacked_rnn_cells_test::test_correctness_single_state_stack"): (
        "the substitution: how many states the layer that stood there has"
    ),
    ("adapted", "stacked_rnn_cells_test::test_correctness_two_states_stack"): (
        "the substitution: two states that are equal in the cell that stood there"
    ),
}
if keras.backend.backend() != "torch":  # mixed precision, which the check leaves out on torch
    EXPECTED["adapted", "time_distributed_test::test_basics"] = (
        "Keras's: TimeDistributed declares its own dtype and returns that of the layer within, as "
        "it does around LSTM"
    )
# Kernels and biases of which every unit is equal.
EQUAL = {
    f"{name}_initializer": keras.initializers.Constant(value)
    for name, value in (("kernel", 0.01), ("recurrent", 0.02), ("bias", 0.03))
}


# ------------------------------------------------------------------ substitution


@keras.saving.register_keras_serializable(package="keras_suite")
class OneStep(keras.layers.Wrapper):
    """Reads a row as a sequence of one step: stands where a Dense stood in TimeDistributed."""

    def call(self, inputs):
        return self.layer(inputs[:, None])

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build((input_shape[0], 1, input_shape[-1]))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.layer.units)


def adapted(layer):
    """`layer`, called with the arguments of LSTM, GRU, SimpleRNN or their cells."""

    def make(*args, **kwargs):
        for name in ("implementation", "unroll", "use_cudnn", "reset_after", "state_size"):
            kwargs.pop(name, None)
        bias = keras.initializers.get(kwargs.get("bias_initializer", "zeros"))
        forget = "ones" if kwargs.pop("unit_forget_bias", True) else bias
        if layer is mLSTM:
            for name in ("recurrent_initializer", "recurrent_regularizer", "recurrent_dropout"):
                kwargs.pop(name, None)
            # Of equal units a norm would make zeros.
            kwargs |= {"use_bias": True, "use_head_norm": False}
            kwargs |= {"input_gate_bias_initializer": bias, "forget_gate_bias_initializer": forget}
        else:
            kwargs["forget_bias_initializer"] = forget
        if layer is sLSTMCell:
            kwargs.pop("dropout", None)
            kwargs.pop("recurrent_dropout", None)
        return layer(*args, **kwargs)

    return make


class Pattern:
    """Compares which of the numbers are equal, not the numbers. For the class of a test."""

    def setUp(self):
        super().setUp()
        self._seen = {}

    def assertAllClose(self, actual, desired, *args, **kwargs):
        actual, desired = self.convert_to_numpy(actual), self.convert_to_numpy(desired)
        assert actual.shape == desired.shape
        assert np.isfinite(actual).all()
        for got, want in zip(actual.ravel(), desired.ravel(), strict=True):
            first = 0.0 if want == 0 else self._seen.setdefault(float(want), got)
            np.testing.assert_allclose(got, first, atol=1e-5, err_msg=f"where LSTM has {want}")

    def run_layer_test(self, layer_cls, init_kwargs, **kwargs):
        counts = [name for name in kwargs if name.startswith("expected_num_")]
        for name in counts:
            kwargs.pop(name)
        super().run_layer_test(layer_cls, init_kwargs, **kwargs)


def floats(values, dtype=None):
    """np.array, with floats in the place of integers, which ours refuse."""
    array = np.array(values, dtype=dtype)
    return array.astype("float32") if array.dtype.kind == "i" else array


def substituted(path, layer, way):
    """The test classes of a file of Keras, with `layer` put in."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    change = adapted if way == "adapted" else lambda layer: layer
    ours, cell = change(layer), change(sLSTMCell)
    names = dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), ours)
    names |= dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell"), cell)
    if path.stem == "time_distributed_test":
        names["Dense"] = lambda units, activation=None, **kwargs: OneStep(ours(units, **kwargs))
    module.layers = types.SimpleNamespace(**{**vars(module.layers), **names})
    for name in ("OneStateRNNCell", "TwoStatesRNNCell"):
        if hasattr(module, name):
            setattr(module, name, functools.partial(cell, **EQUAL) if way == "adapted" else cell)
    if way == "adapted":
        module.np = types.SimpleNamespace(**{**vars(np), "array": floats})
    cases = [c for c in vars(module).values() if isinstance(c, type)]
    cases = [c for c in cases if issubclass(c, unittest.TestCase)]
    bases = (Pattern,) if way == "adapted" else ()
    return [type(c.__name__, (*bases, c), {}) for c in cases]


# ------------------------------------------------------------------ the run


def reason(error, way):
    """What the substitution explains, or None; and what the error says."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    last = max(n for n, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line))
    said = " ".join(lines[last:])
    patterns = [*SUBSTITUTION]
    if way == "swapped":
        patterns.append((NUMBERS, "numbers of the layer that stood there"))
    found = (f"the substitution: {why}" for pattern, why in patterns if re.search(pattern, said))
    return next(found, None), said


def run(path, name, way, counts, unexplained):
    suite = unittest.TestSuite()
    for case in substituted(path, LAYERS[name], way):
        suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(case))
    keras.utils.set_random_seed(0)
    result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(suite)
    failed = {}
    for test, error in [*result.failures, *result.errors]:
        failed.setdefault(f"{path.stem}::{test._testMethodName}", error)
    counts["passed"] += result.testsRun - len(failed) - len(result.skipped)
    counts["skipped: needs a GPU"] += len(result.skipped)
    for test, error in failed.items():
        why, said = reason(error, way)
        why = EXPECTED.get((way, test), why)
        counts[why or "UNEXPLAINED"] += 1
        if why is None:
            unexplained.append(f"{way} {name} {test}\n{error}")
        print(f"  {way:8} {name} {test}: {why or said[:300]}", flush=True)
    return set(failed)


def main(folder):
    text = (folder / "keras/src/version.py").read_text()
    version = re.search(r'__version__ = "(.*)"', text)[1]
    if version != keras.__version__:
        sys.exit(
            f"{folder} is Keras {version}, and {keras.__version__} is installed. "
            f"Check out v{keras.__version__} there."
        )
    print(f"Keras {keras.__version__}, {keras.backend.backend()}")
    unexplained, stale = [], []
    for way in ("swapped", "adapted"):
        for name in LAYERS:
            counts, failed = collections.Counter(), set()
            for file in FILES:
                path = folder / f"keras/src/layers/rnn/{file}_test.py"
                failed |= run(path, name, way, counts, unexplained)
            stale += [
                f"{way} {name} {k[1]}" for k in EXPECTED if k[0] == way and k[1] not in failed
            ]
            total = f"{sum(counts.values())} tests"
            said = "; ".join(f"{n} {what}" for what, n in counts.most_common())
            print(f"{way} {name}: {total}: {said}", flush=True)
    for text in unexplained:
        print(f"\n===== {text}")
    for entry in stale:
        print(f"\n===== {entry} is expected to fail, and passed")
    return bool(unexplained or stale)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    wheel = pathlib.Path(importlib.util.find_spec("keras").origin).parent.parent
    parser.add_argument("keras", nargs="?", type=pathlib.Path, default=wheel)
    sys.exit(main(parser.parse_args().keras))
