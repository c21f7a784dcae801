"""The native forms compiled by XLA on TensorFlow: against the float64 oracle, and where layers
meet them: fit, tf.data, unknown sizes, files."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from cases import CASES
from contract.mlstm import mLSTM
from contract.slstm import sLSTM
from tools import BACKEND, TOLERANCE, array, assert_close, tensor

if BACKEND != "tensorflow":
    pytest.skip("XLA as an implementation belongs to TensorFlow", allow_module_level=True)

import tensorflow as tf

from keras_xlstm import backends, layers, models, ops

both = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
XLA = {"implementation": "xla"}
U = 8


class OnXLA:
    """XLA compiles what the native form computes, which test_native.py holds to every case."""

    implementation, dtypes, exact, lengths = "xla", tuple(TOLERANCE), "float64", (1, 2, 65)
    every_run = (
        "outputs", "any_length", "left-None", "holes-growing", "None-returning", "extreme_gates[0]",
        "without_states", "nothing_reaches", "other_rows", "edge",
    )  # fmt: skip


class TestMLSTM(OnXLA, mLSTM):
    options, sizes, heads = {"chunk_size": 8, "xla": False}, {"T": 21}, ({"K": 1, "V": 3},)
    extreme_sizes, extreme_options = {"T": 40}, {"chunk_size": 64}


class TestSLSTM(OnXLA, sLSTM):
    options = {"xla": False}  # noqa: RUF012


@both
def test_inside_a_compiled_function_and_eagerly(case, rng):
    case(rng, T=9).check(xla=True, **XLA)
    case(rng, T=9).check(compiled=False, **XLA)


@both
def test_inside_a_function_of_the_user(case, rng, caplog):
    """tf.function with its defaults: AutoGraph does not complain of our code."""
    inputs = case(rng, T=5).tensors()
    op = getattr(ops, case.op)

    @tf.function
    def function():
        return op(*inputs[: case.given])

    tf.get_logger().addHandler(caplog.handler)
    try:
        got = function()
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert_close(got, array(op(*inputs[: case.given])), TOLERANCE["float32"])
    assert "AutoGraph" not in caplog.text


@pytest.mark.parametrize(("implementation", "jit_compile"), [
    ("native", False), ("native", True), ("xla", False),
])  # fmt: skip
@both
def test_unknown_batch_and_length(case, implementation, jit_compile, rng):
    inputs = case(rng, T=70).tensors()[: case.given]
    op = getattr(ops, case.op)
    specs = [
        tf.TensorSpec([None, None, *x.shape[2:]] if j < case.timed else x.shape, x.dtype)
        for j, x in enumerate(inputs)
    ]

    def run(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            h = op(*arguments, implementation=implementation)
            loss = tf.reduce_sum(h**2)
        return h, *tape.gradient(loss, arguments)

    got = tf.function(run, input_signature=specs, jit_compile=jit_compile)(*inputs)
    for a, b in zip(got, run(*inputs), strict=True):
        assert_close(a, array(b), 1e-5)


@both
def test_second_derivatives_are_refused(case, rng):
    x, *rest = case(rng, T=5).tensors()[: case.given]
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(getattr(ops, case.op)(x, *rest, **XLA) ** 2)
        gradient = inner.gradient(loss, x)
    with pytest.raises(NotImplementedError, match="asked for by name"):
        outer.gradient(gradient, x)


def compiled_calls(function, *arguments):
    """How many calls in the graph of `function` XLA compiles by itself."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    names = {
        f.signature.name
        for f in graph.as_graph_def().library.function
        if f.attr["_XlaMustCompile"].b
    }
    return sum(node.attr["f"].func.name in names for node in graph.as_graph_def().node)


def test_what_is_picked(rng):
    """XLA where it pays: in a graph, for a length that is known."""
    for layer in (
        layers.mLSTM(U, num_heads=2, return_sequences=True),
        layers.sLSTM(U, num_heads=2),
    ):
        layer.build((None, None, U))
        for T, compiled in ((None, 0), (1, 0), (5, 1)):
            spec = tf.TensorSpec((None, T, U))
            assert compiled_calls(layer, spec) == compiled, (layer.name, T)
            with backends.use("xla"):
                assert compiled_calls(layer, spec) == 1
            with backends.use("native"):
                assert compiled_calls(layer, spec) == 0
    # Read once after the last step there is no loop to compile, unless it is asked for.
    layer = layers.mLSTM(U, num_heads=2)
    layer.build((None, None, U))
    assert compiled_calls(layer, tf.TensorSpec((None, 5, U))) == 0
    with backends.use("xla"):
        assert compiled_calls(layer, tf.TensorSpec((None, 5, U))) == 1
    layer = layers.sLSTM(U, num_heads=2)
    # Eagerly the native form runs: nothing to compile for a new length.
    x = tensor(rng.normal(size=(2, 6, U)))
    with backends.use("native"):
        want = array(layer(x))
    np.testing.assert_array_equal(array(layer(x)), want)


def small_model(T, use_kernel="auto"):
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((T, 3)),
        layers.mLSTM(U, num_heads=2, return_sequences=True, use_kernel=use_kernel),
        layers.sLSTM(U, num_heads=2, use_kernel=use_kernel),
        keras.layers.Dense(1),
    ])  # fmt: skip


@pytest.mark.parametrize("T", [12, None])
def test_fit_on_a_ragged_last_batch(T, rng):
    """The same losses and weights in the native form, op by op; XLA by itself; a compiled model."""
    x, y = rng.normal(size=(10, 12, 3)).astype("float32"), rng.normal(size=(10, 1))
    data = tf.data.Dataset.from_tensor_slices((x, y.astype("float32")))
    data = data.padded_batch(4, padded_shapes=((None, 3), (1,))) if T is None else data.batch(4)
    results = []
    ways = [(False, False), (True, False)] + ([("auto", True)] if T else [])
    for use_kernel, jit_compile in ways:
        model = small_model(T, use_kernel)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        loss = model.fit(data, epochs=2, verbose=0).history["loss"]
        results.append([loss, *model.get_weights()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(a, b, 1e-4, least=1e-2)


def test_fit_straight_from_tensorflow_datasets(tmp_path):
    """Batches of unknown size, of sequences whose length the features leave open."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `examples` is missing")

    class Walks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            x = tfds.features.Tensor(shape=(None, 3), dtype=np.float32)
            y = tfds.features.Tensor(shape=(1,), dtype=np.float32)
            features = tfds.features.FeaturesDict({"x": x, "y": y})
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("x", "y")
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key in range(10):
                x = np.random.default_rng(key).normal(size=(9 + key % 4, 3)).astype(np.float32)
                yield key, {"x": x, "y": x[:1, 0]}

    builder = Walks(data_dir=tmp_path)
    builder.download_and_prepare()
    data = builder.as_dataset(split="train", as_supervised=True)
    data = data.padded_batch(4, padded_shapes=((12, 3), (1,)))
    assert data.element_spec[0].shape.as_list() == [None, 12, 3]
    # The same in the same order, as arrays.
    x, y = (np.concatenate(arrays) for arrays in zip(*data.as_numpy_iterator(), strict=True))
    arrays = {"x": x, "y": y, "batch_size": 4}
    losses = []
    for jit_compile, source in ((False, arrays), (False, {"x": data}), (True, {"x": data})):
        model = small_model(12)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        history = model.fit(**source, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)


def test_remat(rng):
    """Recomputed in the backward pass, with the same gradient."""
    x, y = rng.normal(size=(4, 12, U)).astype("float32"), rng.normal(size=(4, 12, U))
    weights = []
    for remat in (False, True):
        keras.utils.set_random_seed(3)
        block = layers.mLSTMBlock(num_heads=2, remat=remat)
        model = keras.Sequential([keras.Input((12, U)), block])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        model.fit(x, y, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        assert_close(a, b, 1e-5, least=1e-2)


@pytest.mark.parametrize("T", [12, None])
def test_export(T, rng, tmp_path):
    model = small_model(T)
    x = rng.normal(size=(3, 12, 3)).astype("float32")
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert_close(loaded.serve(x), array(model(x)), 1e-5)


def densify(optimizer, captured):
    """Else Keras's Adam on TensorFlow squares the gradients of a token that occurs twice apart."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    step = optimizer._backend_update_step
    optimizer._backend_update_step = lambda gradients, *rest: step(
        [tf.convert_to_tensor(gradient) for gradient in gradients], *rest
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"jit_compile": False},
        {"run_eagerly": True},
        {"policy": "mixed_float16"},
        {"kind": "AdamW", "weight_decay": 0.1, "clipnorm": 0.5, "use_ema": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda options: ",".join(map(str, options.values())) or "plain",
)
def test_adam_by_one_operator_is_kerass(options, rng, monkeypatch):
    options = dict(options)
    policy, kind = options.pop("policy", "float32"), options.pop("kind", "Adam")
    how = {k: options.pop(k) for k in ("jit_compile", "run_eagerly") if k in options}
    x = rng.integers(0, 12, (4, 6))
    found = []
    for fused in (True, False):
        keras.utils.set_random_seed(0)
        model = models.xLSTMLanguageModel(12, units=8, num_blocks=1, dtype=policy)
        optimizer = getattr(keras.optimizers, kind)(
            keras.optimizers.schedules.CosineDecay(1e-2, 10), epsilon=1e-4, **options
        )
        with monkeypatch.context() as patch:
            if fused:
                patch.delattr(keras.optimizers.Adam, "update_step")  # Keras's own would need it
            else:
                patch.setattr(backends, "fuse_optimizer", densify)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer, loss, **how)
            model.fit(x, x, batch_size=2, epochs=2, verbose=0, shuffle=False)
        values = [*model.trainable_variables, *optimizer.variables]
        found.append([keras.ops.cast(value, "float32") for value in values])
    # The operator takes beta_2 in float32: as if the rate were 6e-6 higher. Training makes 4e-5 of
    # it here, in float16 3e-4 on one processor and 2.5e-3 on another (in moments of 1e-6); in
    # a deeper model Keras's own, at such a rate, differs as much.
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 5e-3 if policy == "mixed_float16" else 2e-4)


def test_adam_of_few_digits_is_kerass_own(rng):
    x = rng.integers(0, 12, (2, 6))
    model = models.xLSTMLanguageModel(12, units=8, num_blocks=1, dtype="bfloat16")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    updated = []
    own = model.optimizer.update_step
    model.optimizer.update_step = lambda *rest: [updated.append(1), own(*rest)]
    model.fit(x, x, verbose=0)
    assert len(updated) >= len(model.trainable_variables)


@pytest.mark.parametrize("name", ["amsgrad", "SGD", "own"])
def test_other_optimizers_are_left_alone(name):
    class Own(keras.optimizers.Adam):
        pass

    kinds = {"SGD": keras.optimizers.SGD, "own": Own}
    optimizer = kinds[name]() if name in kinds else keras.optimizers.Adam(amsgrad=True)
    models.xLSTMLanguageModel(12, units=8, num_blocks=1).compile(optimizer, "mse")
    assert "_backend_update_step" not in vars(optimizer)


def test_a_loop_has_one_bound():
    """A graph may hold two in either order: to XLA's cache on disk these are different programs."""

    def add(x):
        return backends.tensorflow.scan(lambda carry, x: ((carry[0] + x[0],), ()), (x[0],), (x,))[0]

    graph = tf.function(add).get_concrete_function(tf.ones((5, 2))).graph.as_graph_def()
    (condition,) = (f for f in graph.library.function if "while_cond" in f.signature.name)
    assert [node.op for node in condition.node_def].count("Less") == 1


FIT = """
import numpy as np
from keras_xlstm.models import xLSTMStack
model = xLSTMStack(units=8, num_blocks=2, pattern="1:1")
model.compile("adam", "mse", jit_compile=True)
model.fit(np.ones((2, 80, 8)), np.ones((2, 80, 8)), verbose=0)
"""


def test_xla_finds_again_what_it_compiled(tmp_path):
    """TensorFlow's cache on disk knows a program by a hash of all of it."""
    flags = "--tf_xla_persistent_cache_device_types=CPU --tf_xla_persistent_cache_directory="
    env = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_XLA_FLAGS": f"{flags}{tmp_path}"}
    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", FIT], env=env, check=True, capture_output=True)
        found.append({path.name for path in tmp_path.iterdir()})
    assert found[0]
    assert found[0] == found[1]
