"""`compile(jit_compile=True)` on TensorFlow: one block of each kind is compiled for all."""

import keras
import numpy as np
import pytest
from tools import BACKEND, array, assert_close

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow compiles these blocks", allow_module_level=True)

import tensorflow as tf

from keras_xlstm import export
from keras_xlstm.layers.block import run_plain
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

TOKENS = np.random.default_rng(0).integers(0, 12, (6, 9))
MASK = np.arange(9)[None] < np.array([9, 5, 9, 1, 7, 9])[:, None]
SEGMENTS = np.tile(np.repeat([0, 1, 2], 3), (6, 1))


def compiled(jit_compile, rate=0.5, **options):
    keras.utils.set_random_seed(3)
    settings = {"num_blocks": 2, "pattern": "1:1", "dtype": "float64", **options}
    model = xLSTMLanguageModel(12, units=8, num_heads=2, **settings)
    for i, variable in enumerate(model.trainable_variables):  # gates start as zeros
        variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=i))
    recompile(model, jit_compile, rate)
    return model


def recompile(model, jit_compile, rate=0.5):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss, jit_compile=jit_compile)


def results(model, inputs=TOKENS, batch_size=3, more=False):
    """Losses and weights after training, and what `evaluate` and `predict` then say: programs
    more, so in few tests."""
    options = {"batch_size": batch_size, "verbose": 0}
    losses = model.fit(inputs, TOKENS, epochs=2, shuffle=False, **options).history["loss"]
    found = [losses, *model.get_weights()]
    if more:
        found += [[model.evaluate(inputs, TOKENS, **options)], model.predict(inputs, **options)]
    return found


def assert_alike(one, other, tolerance=1e-6):
    """In float64, but Keras gives losses in float32."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert_close(np.asarray(a, "float64"), np.asarray(b, "float64"), tolerance, least=1e-2)


def programs(function, *arguments):
    """Calls in the graph of `function` that XLA compiles, and of how many different functions."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    musts = {f.signature.name for f in graph.library.function if f.attr["_XlaMustCompile"].b}
    calls = [node.attr["f"].func.name for node in graph.node]
    calls = [name for name in calls if name in musts]
    return len(calls), len(set(calls))


def gradient_of(model):
    """The gradient of the loss by all weights, as a graph."""

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=x, y_pred=model(x, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    return gradient


@pytest.mark.parametrize("num_blocks", [4, 8])
def test_programs_do_not_grow_with_the_blocks(num_blocks):
    """Forward and backward of two kinds: four, called by every block. XLA compiles what has another
    name anew."""
    model = compiled(True, num_blocks=num_blocks)
    gradient = gradient_of(model)
    assert programs(gradient, tf.constant(TOKENS)) == (2 * num_blocks, 4)
    recompile(model, False)
    # The recurrences, each by itself.
    assert programs(gradient_of(model), tf.constant(TOKENS)) == (2 * num_blocks, 4)
    names = {type(block).__name__ for block in model.blocks}
    assert names == {"mLSTMBlock", "sLSTMBlock"}


def test_a_block_is_traced_once_for_all(monkeypatch):
    model = compiled(True, num_blocks=4)
    traced = []
    for block in model.blocks:
        own = block._run
        monkeypatch.setattr(block, "_run", lambda *a, own=own: [traced.append(1), own(*a)][1])
    model.fit(TOKENS[:4], TOKENS[:4], batch_size=4, epochs=3, verbose=0)
    model.evaluate(TOKENS[:4], TOKENS[:4], batch_size=4, verbose=0)
    model.predict(TOKENS[:4], batch_size=4, verbose=0)
    assert len(traced) == 2


def masked(x=TOKENS):
    return {"token_ids": x, "padding_mask": MASK}


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (TOKENS, {}),
        (masked(), {}),
        ({**masked(), "segment_ids": SEGMENTS}, {}),
        (TOKENS, {"remat": True, "dropout": 0.5, "embedding_dropout": 0.2, "seed": 1}),
        (TOKENS, {"dropout": 0.5, "embedding_dropout": 0.2, "seed": 1}),
        (TOKENS, {"architecture": "large", "pattern": None, "logit_soft_cap": 5.0}),
        (TOKENS, {"use_kernel": False, "tie_embeddings": True}),
    ],
    ids=["plain", "mask", "segments", "remat", "dropout", "large", "native"],
)
def test_as_without(inputs, options):
    """In float64 rounding is all that may differ."""
    more = isinstance(inputs, dict) and "segment_ids" in inputs
    models = (compiled(jit, **options) for jit in (True, False))
    assert_alike(*(results(model, inputs, more=more) for model in models))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("mixed_bfloat16", 6e-2)])
def test_other_dtypes(dtype, tolerance):
    """XLA rounds to bfloat16 elsewhere than TensorFlow does: outputs of either, and of a step that
    is compiled as a whole, differ by 2.4 % from those in float32."""
    found = []
    for jit in (True, False):
        model = compiled(jit, rate=0.05, dtype=dtype)
        outputs = model.predict(TOKENS, batch_size=3, verbose=0)
        options = {"batch_size": 3, "shuffle": False, "verbose": 0}
        found.append([outputs, model.fit(TOKENS, TOKENS, **options).history["loss"]])
    assert_alike(*found, tolerance)


def test_gradients():
    one, other = (gradient_of(compiled(jit))(tf.constant(TOKENS)) for jit in (True, False))
    assert_alike([tf.convert_to_tensor(g) for g in one], [tf.convert_to_tensor(g) for g in other])


def test_sizes_that_are_unknown_while_traced():
    """A ragged last batch, and one length after another, in one trace."""
    data = tf.data.Dataset.from_tensor_slices((TOKENS, TOKENS))
    data = data.padded_batch(4, padded_shapes=((None,), (None,)))
    assert data.element_spec[0].shape.as_list() == [None, None]
    found = []
    for jit in (True, False):
        model = compiled(jit)
        losses = model.fit(data, epochs=2, verbose=0).history["loss"]
        for T in (5, 2, 1):
            x = data.map(lambda x, y, T=T: (x[:, : tf.constant(T)], y[:, : tf.constant(T)]))
            losses.append(model.evaluate(x, verbose=0))
        found.append([losses, *model.get_weights()])
    assert_alike(*found)


def test_dropout_differs_between_blocks_and_steps():
    """Nothing is learnt at a rate of 0: what changes between steps is dropout."""
    model = compiled(True, rate=0.0, dropout=0.5, seed=1)
    losses = [model.train_on_batch(TOKENS, TOKENS) for _ in range(4)]
    assert len(np.unique(losses)) == 4
    seeds = [array(block.seed_generator.state) for block in model.blocks]
    assert len({tuple(seed) for seed in seeds}) == len(model.blocks)
    other = compiled(False, rate=0.0, dropout=0.5, seed=1)
    np.testing.assert_allclose(losses, [other.train_on_batch(TOKENS, TOKENS) for _ in range(4)])
    for seed, block in zip(seeds, other.blocks, strict=True):
        np.testing.assert_array_equal(seed, array(block.seed_generator.state))


def test_frozen_and_adapted():
    """Of blocks of a kind, some frozen, and one with weights that the others have not."""
    found = []
    for jit in (True, False):
        model = compiled(jit, rate=0.05, num_blocks=4, slstm_at=[], pattern=None)
        model.blocks[0].trainable = model.blocks[1].trainable = False
        model.blocks[3].up_projection.enable_lora(2)
        model.blocks[3].up_projection.lora_kernel_b.assign(np.full((2, 128), 0.1))
        recompile(model, jit)
        frozen = [v for block in model.blocks[:2] for v in block.get_weights()]
        found.append(results(model))
        assert_alike(frozen, [v for block in model.blocks[:2] for v in block.get_weights()], 0)
    assert_alike(*found, 1e-3)  # Keras multiplies the updates in float32


def test_quantised():
    model = compiled(True, dtype="float32")
    model.quantize("int8")
    recompile(model, True)
    got = model.predict(TOKENS, verbose=0)
    recompile(model, False)
    assert_close(got, model.predict(TOKENS, verbose=0), 1e-4)


def test_what_a_compiled_function_would_lose():
    """A penalty on activities within a block; and equal blocks of which one was changed."""
    found = []
    for jit in (True, False):
        # At a rate of 0.5 this penalty makes 1e-4 of float32's rounding in two epochs.
        model = compiled(jit, rate=0.1, num_blocks=4, dtype="float32")
        model.blocks[0].norm.activity_regularizer = keras.regularizers.L2(1.0)
        model.blocks[3].norm.epsilon = 0.3
        found.append(results(model))
    assert_alike(*found, 5e-5)
    plain = compiled(False, rate=0.1, num_blocks=4, dtype="float32")
    assert found[0][0][0] > results(plain)[0][0] + 0.1


def test_compiling_again():
    model, plain = compiled(True), compiled(False)
    assert all(block.runner is not run_plain for block in model.blocks)
    for jit in (True, False, True):
        recompile(model, jit)
        model.fit(TOKENS, TOKENS, shuffle=False, verbose=0)
        plain.fit(TOKENS, TOKENS, shuffle=False, verbose=0)
        assert_alike(model.get_weights(), plain.get_weights())
        assert [block.runner is not run_plain for block in model.blocks] == [jit] * 2


def test_what_keras_picks_by_itself():
    model = compiled("auto")
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    assert all((block.runner is not run_plain) == on_gpu for block in model.blocks)


def test_files_and_eager_calls(tmp_path):
    model = compiled(True)
    model.fit(TOKENS, TOKENS, verbose=0)
    want = array(model(TOKENS))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["jit_compile"] is True
    assert all(block.runner is not run_plain for block in loaded.blocks)
    assert_close(loaded.predict(TOKENS, verbose=0), want, 1e-9)


def test_generation_and_states():
    model, plain = compiled(True), compiled(False)
    options = {"max_new_tokens": 4, "temperature": 0}
    want = np.stack(plain.generate([[1, 2, 3]], **options))
    for jit in ("auto", True, False):
        got = model.generate([[1, 2, 3]], jit_compile=jit, **options)
        np.testing.assert_array_equal(got, want)
    state = model.get_initial_state(2)
    run = tf.function(model.run, autograph=False)
    for x in (TOKENS[:2, :5], TOKENS[:2, 5:6]):
        (one, state), (other, same) = run(x, state), plain.run(x, state)
        assert_alike([array(one)], [array(other)])
        assert_alike(*([array(s) for s in tf.nest.flatten(states)] for states in (state, same)))


def test_exported_without(tmp_path):
    model = compiled(True, dtype="float32")
    want = array(model(TOKENS))
    model.export(tmp_path / "keras", verbose=False)
    paths = export.export_model(model, tmp_path / "ours", "tf_saved_model", parts="sequence")
    for path in (tmp_path / "keras", paths["sequence"]):
        loaded = tf.saved_model.load(path)
        library = loaded.signatures["serving_default"].graph.as_graph_def().library
        assert not any(f.attr["_XlaMustCompile"].b for f in library.function)
    assert all(block.runner is not run_plain for block in model.blocks)
    variables = [v.value + 0.0 for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]

    @tf.function
    def stateless(x):
        return model.stateless_call([v * 0 for v in variables], others, x)[0]

    assert not array(stateless(tf.constant(TOKENS))).any()
    assert want.any()


def test_a_stack(rng):
    x = rng.normal(size=(6, 9, 8))
    found = []
    for jit in (True, False):
        keras.utils.set_random_seed(3)
        model = xLSTMStack(8, 3, num_heads=2, pattern="1:1", dtype="float64")
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit, steps_per_execution=2)
        losses = model.fit(x, x, batch_size=2, epochs=2, verbose=0, shuffle=False).history["loss"]
        found.append([losses, *model.get_weights()])
    assert_alike(*found)
