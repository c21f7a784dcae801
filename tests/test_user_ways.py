"""Ordinary ways of using the layers and models, from public reports of Keras's users."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from tools import BACKEND, array, assert_close, jit, some, vjp

from keras_xlstm import backends
from keras_xlstm import ops as xlstm_ops
from keras_xlstm.layers import (
    mLSTM,
    mLSTMBlock,
    sLSTM,
    sLSTMBlock,
    sLSTMCell,
    state_from_lstm,
    xLSTMLargeBlock,
)
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

B, T, F, U, V = 3, 6, 5, 4, 11
BLOCKS = (mLSTMBlock, sLSTMBlock, xLSTMLargeBlock)
layers = pytest.mark.parametrize("Layer", [sLSTM, mLSTM])
blocks = pytest.mark.parametrize("Block", BLOCKS)


# What is on a GPU is not looked at before a call; docs/states.md says so.
on_host = pytest.mark.skipif(
    backends.host_values(ops.zeros((1,))) is None, reason="tensors are on a GPU"
)


def data(rng, *shape):
    return rng.normal(size=shape or (B, T, F)).astype("float32")


# ------------------------------------------------------------------------- the states of an LSTM


def of_lstm(rng):
    return data(rng, B, U), data(rng, B, U)


def contradictions(rng):
    h, c = of_lstm(rng)
    zeros, ones = np.zeros_like(c), np.ones_like(c)
    return {
        "contradicts itself": [h, c, zeros, zeros],
        "must not be negative": [h, c, -ones, zeros],
        "finite": [h, c * np.nan, ones, zeros],
    }


@on_host
@pytest.mark.parametrize("what", ["contradicts itself", "must not be negative", "finite"])
def test_contradicting_states_are_refused(what, rng):
    state, x = contradictions(rng)[what], data(rng)
    with pytest.raises(ValueError, match=what):
        sLSTM(U)(x, initial_state=state)
    with pytest.raises(ValueError, match=what):
        keras.layers.Bidirectional(sLSTM(U))(
            x,
            initial_state=[*state_from_lstm(*state[:2]), *state]
            if what != "finite"
            else [*state, *state],
        )
    heads = [s.reshape(B, 1, U) for s in state]
    if what != "finite":  # the functions take NaN for what it is, one row's alone
        with pytest.raises(ValueError, match=what):
            xlstm_ops.slstm(data(rng, B, T, 4, 1, U), data(rng, 1, U, 4, U), initial_state=heads)
    with pytest.raises(ValueError, match=what):
        keras.layers.RNN(sLSTMCell(U))(x, initial_state=state)
    first = state_from_lstm(np.zeros((B, U), "float32"), np.zeros((B, U), "float32"))
    with pytest.raises(ValueError, match=what):
        keras.layers.RNN([sLSTMCell(U), sLSTMCell(U)])(x, initial_state=[first, state])


@on_host
def test_contradicting_states_show_where_values_are_not_at_hand(rng):
    h, c, n, m = contradictions(rng)["contradicts itself"]
    x = data(rng)
    given = [keras.Input((T, F)), *(keras.Input((U,)) for _ in "hcnm")]
    model = keras.Model(given, sLSTM(U)(given[0], initial_state=given[1:]))
    if BACKEND == "torch":  # eager
        with pytest.raises(ValueError, match="contradicts itself"):
            model.predict([x, h, c, n, m], verbose=0)
    else:
        assert np.isnan(model.predict([x, h, c, n, m], verbose=0)).all()


@on_host
def test_matrix_memory_without_a_normaliser_is_refused(rng):
    C, zeros = data(rng, B, 2, 2, 2), np.zeros((B, 2, 2), "float32")
    with pytest.raises(ValueError, match="contradicts itself"):
        mLSTM(U, num_heads=2)(data(rng), initial_state=[C, zeros, zeros[..., 0]])
    fresh = [C * 0, zeros, zeros[..., 0]]
    layer = mLSTM(U, num_heads=2)
    assert_close(layer(data(np.random.default_rng(1)), initial_state=fresh),
                 array(layer(data(np.random.default_rng(1)))), 1e-6)  # fmt: skip


def test_state_of_an_lstm_is_remembered(rng):
    """With shut input gates and open forget gates, h stays sigmoid(o) c."""
    h, c = of_lstm(rng)
    x = np.zeros((B, 1, 4, 1, U), "float32")
    x[:, :, 0], x[:, :, 1] = -50, 50
    state = [ops.reshape(s, (B, 1, U)) for s in state_from_lstm(h, c)]
    got = xlstm_ops.slstm(x, np.zeros((1, U, 4, U), "float32"), initial_state=state)
    assert_close(array(got)[:, 0, 0], 0.5 * c, 1e-5)
    cell = sLSTMCell(U)
    got = keras.layers.RNN(cell)(data(rng), initial_state=state_from_lstm(h, c))
    assert np.isfinite(array(got)).all()


def test_dense_layers_that_make_a_state_learn(rng):
    features, x = keras.Input((F,)), keras.Input((T, F))
    h, c = (keras.layers.Dense(U, name=name)(features) for name in "hc")
    model = keras.Model([features, x], sLSTM(U)(x, initial_state=state_from_lstm(h, c)))
    model.compile("sgd", "mse", jit_compile=jit())
    before = {name: array(model.get_layer(name).kernel).copy() for name in "hc"}
    model.fit([data(rng, B, F), data(rng)], np.ones((B, U)), verbose=0)
    for name in "hc":
        moved = np.abs(array(model.get_layer(name).kernel) - before[name]).max()
        assert name == "h" or moved > 0  # the recurrent kernel starts from zeros: h is not read


# ------------------------------------------------------------------------- documents of sentences


@pytest.mark.parametrize("sentences", [4, None])
def test_documents_of_sentences(sentences, rng):
    ids = rng.integers(1, V, (B, 4, 7))
    ids[0, 2:], ids[1, 3], ids[2, 1, 3:] = 0, 0, 0
    words = keras.Input((sentences, 7), dtype="int32")
    x = keras.layers.Embedding(V, F, mask_zero=True)(words)
    x = keras.layers.TimeDistributed(sLSTM(U))(x)
    # From Keras 3.16 on the mask of sentences does not come by itself.
    mask = None if keras.__version__ < "3.16" else ops.any(words != 0, axis=-1)
    model = keras.Model(words, keras.layers.Dense(1)(mLSTM(U)(x, mask=mask)))
    model.compile("sgd", "mse", jit_compile=jit())
    assert np.isfinite(model.fit(ids, np.ones((B, 1)), verbose=0).history["loss"][0])
    assert all(np.isfinite(array(w)).all() for w in model.weights)
    got = model.predict(ids, verbose=0)
    # Two rows: of one, Keras's TimeDistributed of unknown length is wrong on TensorFlow, LSTM's too.
    alone = ids[[0, 0]] if sentences else ids[[0, 0], :2]
    np.testing.assert_allclose(got[[0, 0]], model.predict(alone, verbose=0), atol=1e-5)
    words_changed = ids.copy()
    words_changed[2, 1, 0] = 1 + ids[2, 1, 0] % (V - 1)
    assert np.abs(model.predict(words_changed, verbose=0) - got)[2].max() > 1e-7


def test_masks_of_parts(rng):
    """A step is real where any of its parts is, for every layer; what is behind sees a mask of
    steps."""
    parts = rng.random((B, T, 2)) > 0.6
    mask = parts.any(-1)
    x, wide = data(rng), data(rng, B, T, 2 * F + 6)
    made = [sLSTM(U, return_sequences=True), mLSTM(U, return_sequences=True)]
    for layer in made + [Block(num_heads=2) for Block in BLOCKS]:
        z = wide if isinstance(layer, BLOCKS) else x
        got, want = layer(z, mask=ops.array(parts)), layer(z, mask=ops.array(mask))
        np.testing.assert_array_equal(array(got)[mask], array(want)[mask])
        assert layer.compute_mask(z, ops.array(parts)).shape == (B, T)
    stack = xLSTMStack(16, 1)
    got, want = (stack({"sequences": wide, "padding_mask": p}) for p in (parts, mask))
    np.testing.assert_allclose(array(got)[mask], array(want)[mask], atol=1e-6)


# ------------------------------------------------------------------------- clones and sub-models


def small(**options):
    return xLSTMLanguageModel(V, 8, 2, num_heads=2, pattern="1:1", **options)


def test_clones(rng):
    model = small(logit_soft_cap=5.0, dropout=0.1)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clone = keras.models.clone_model(model)
    assert type(clone) is xLSTMLanguageModel
    assert clone.get_config() == model.get_config()
    assert [w.shape for w in clone.weights] == [w.shape for w in model.weights]
    assert not {id(w) for w in clone.weights} & {id(w) for w in model.weights}
    fresh = array(clone.get_layer("head").kernel) != array(model.get_layer("head").kernel)
    assert fresh.any()
    clone.set_weights(model.get_weights())
    ids = rng.integers(0, V, (B, T))
    inputs = {"token_ids": ids, "padding_mask": ids > 2}
    assert_close(array(clone(inputs))[ids > 2], array(model(inputs))[ids > 2], 1e-6)
    assert len(clone.generate([[1, 2]], 3, temperature=0)[0]) == 5
    clone.fit(ids, ids, verbose=0)


def test_clones_of_and_with_other_layers(rng):
    stack = xLSTMStack(8, 2, num_heads=2)
    assert type(keras.models.clone_model(stack)) is xLSTMStack
    seen = []

    def other(layer):
        seen.append(layer.name)
        config = layer.get_config()
        return type(layer).from_config({**config, "remat": True} if "remat" in config else config)

    clone = keras.models.clone_model(stack, clone_function=other)
    assert {"block_0", "block_1", "norm"} <= set(seen)
    assert all(block.remat for block in clone.blocks)
    inputs = keras.Input((None, 8), name="mine")
    on_mine = keras.models.clone_model(stack, input_tensors=inputs)
    assert on_mine.inputs[0] is inputs
    outer = keras.Sequential([keras.Input((T, 8)), stack, sLSTM(U)])
    for recursive in (False, True):
        clone = keras.models.clone_model(outer, recursive=recursive)
        assert type(clone.layers[0]) is xLSTMStack
        assert clone(data(rng, B, T, 8)).shape == (B, U)


def test_parts_of_models(rng, tmp_path):
    model = small()
    ids = rng.integers(0, V, (B, T))
    trunk = keras.Model(model.inputs, model.get_layer("block_0").output)
    head = keras.Model(model.get_layer("block_0").output, model.output)
    np.testing.assert_allclose(array(head(trunk(ids))), array(model(ids)), atol=1e-6)
    trunk.save(tmp_path / "trunk.keras")
    loaded = keras.models.load_model(tmp_path / "trunk.keras")
    np.testing.assert_allclose(array(loaded(ids)), array(trunk(ids)), atol=1e-6)
    wrapped = keras.Input((None,), dtype="int32")
    outer = keras.Model(wrapped, keras.layers.Dense(2)(model(wrapped)))
    assert outer.predict(ids, verbose=0).shape == (B, T, 2)


def test_run_inside_a_functional_model(rng):
    stack = xLSTMStack(8, 1, num_heads=2)
    x = keras.Input((None, 8))
    with pytest.raises(ValueError, match="needs a batch size"):
        stack.run(x, stack.get_initial_state(None))
    outputs, _ = stack.run(x, None)
    value = data(rng, B, T, 8)
    assert_close(keras.Model(x, outputs)(value), array(stack(value)), 1e-6)


# ------------------------------------------------------------------------- dtypes of states


@layers
def test_states_stay_float32_on_the_way_to_a_decoder(Layer, rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = keras.Input((T, F))
    _, *state = Layer(U, return_state=True)(x)
    assert {s.dtype for s in state} == {"float32"}
    both = keras.layers.Bidirectional(Layer(U, return_state=True))
    _, *state = both(x)  # Keras says bfloat16 of what is float32
    half = len(state) // 2
    join = keras.layers.Concatenate(dtype="float32")  # the line of docs/precision.md
    joined = [join([a, b]) for a, b in zip(state[:half], state[half:], strict=True)]
    model = keras.Model(x, joined)
    real = both(data(rng))[1:]
    assert {keras.backend.standardize_dtype(s.dtype) for s in real} == {"float32"}
    for got in model(data(rng)):
        assert keras.backend.standardize_dtype(got.dtype) == "float32"
        values = array(got)
        assert (values != array(ops.cast(ops.cast(got, "bfloat16"), "float32"))).any() or (
            values == 0
        ).all()


# ------------------------------------------------------------------------- losses of tokens

LOSS = keras.losses.SparseCategoricalCrossentropy


def expected(model, inputs, labels, counted):
    logits = np.asarray(array(model(inputs)), "float64")
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logp, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return -own[counted].mean()


def compiled(model, loss, jit_compile):
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
    return model


@on_host
@pytest.mark.parametrize("wrong", [-100, V])
def test_labels_beyond_the_vocabulary_are_refused(wrong, rng):
    model = compiled(small(), LOSS(from_logits=True), False)
    ids = rng.integers(0, V, (B, T))
    labels = ids.copy()
    labels[0, 0] = wrong
    for given in (labels, labels.astype("float32"), ops.convert_to_tensor(labels)):
        for method in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
            with pytest.raises(ValueError, match="Labels must be token ids from 0 to 10"):
                method(ids, given)
    with pytest.raises(ValueError, match="Labels must be"):
        model.fit(ids, y=ids, validation_data=(ids, labels), verbose=0)
    compiled(model, LOSS(from_logits=True, ignore_class=wrong), False)
    assert np.isfinite(model.evaluate(ids, labels, verbose=0))
    compiled(model, "mse", False)  # another loss has no vocabulary
    model.evaluate(ids, np.full((B, T, V), -100.0), verbose=0)


@pytest.mark.parametrize(("output_mask", "ignored", "jit_compile"), some(
    [(True, None, True), (True, -100, False), (False, -100, True), (False, None, False)],
    itertools.product([True, False], [None, -100], [True, False]),
))  # fmt: skip
def test_padding_and_ignored_labels_are_left_out_of_the_loss(
    output_mask, ignored, jit_compile, rng
):
    if jit_compile and BACKEND == "torch":
        pytest.skip("torch.compile takes minutes")
    model = small(output_mask=output_mask)
    ids = rng.integers(0, V, (B, T))
    mask = np.arange(T) < [[T], [2], [4]]
    inputs, labels = {"token_ids": ids, "padding_mask": mask}, ids.copy()
    counted = mask.copy() if output_mask else np.ones_like(mask)
    if ignored is not None:
        labels[:, 1] = ignored
        counted[:, 1] = False
    compiled(model, LOSS(from_logits=True, ignore_class=ignored), jit_compile)
    want = expected(model, inputs, labels, counted)
    assert abs(model.evaluate(inputs, labels, verbose=0) - want) < 1e-5
    before = [array(w).copy() for w in model.trainable_variables]
    assert abs(model.train_on_batch(inputs, labels) - want) < 1e-5
    if output_mask and ignored is None:  # as by weights
        other = small()
        for w, value in zip(other.trainable_variables, before, strict=True):
            w.assign(value)
        compiled(other, LOSS(from_logits=True), jit_compile)
        weights = mask * mask.size / mask.sum()
        other.train_on_batch(ids, labels, sample_weight=weights.astype("float32"))
        for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
            np.testing.assert_allclose(array(a), array(b), atol=2e-6)


def test_pooling_behind_a_stack_leaves_padding_out(rng):
    stack, x = xLSTMStack(8, 1, num_heads=2), data(rng, B, T, 8)
    mask = np.arange(T) < [[T], [2], [4]]
    pool = keras.layers.GlobalAveragePooling1D()
    got = array(pool(stack({"sequences": x, "padding_mask": mask})))
    assert_close(got[1], array(stack(x[1:2, :2])).mean(1)[0], 1e-5)


# ------------------------------------------------------------------------- recomputation


def gradients(layer, x, seed_state):
    layer.seed_generator.state.assign(seed_state)
    cotangent = np.random.default_rng(5).normal(size=layer(x).shape).astype("float32")
    layer.seed_generator.state.assign(seed_state)
    return vjp(lambda x: (layer(x, training=True),), [ops.convert_to_tensor(x)],
               [ops.convert_to_tensor(cotangent)], xla=False)  # fmt: skip


@pytest.mark.parametrize(("kind", "how"), some(
    [("slstm", "argument"), ("mlstm", "argument"), ("mLSTMBlock", "argument"), ("slstm", "full"),
     ("sLSTMBlock", "larger_than"), ("xLSTMLargeBlock", "list_of_layers"), ("mlstm", "full")],
    itertools.product(
        ["slstm", "mlstm", *(Block.__name__ for Block in BLOCKS)],
        ["argument", "full", "larger_than", "list_of_layers"],
    ),
))  # fmt: skip
def test_remat_gives_equal_gradients(kind, how, rng):
    make = {
        "slstm": lambda **o: sLSTM(U, dropout=0.3, recurrent_dropout=0.3, seed=1, **o),
        "mlstm": lambda **o: mLSTM(U, num_heads=2, dropout=0.3, seed=1, **o),
    }.get(kind) or (
        lambda **o: {b.__name__: b for b in BLOCKS}[kind](num_heads=2, dropout=0.3, seed=1, **o)
    )
    x = data(rng, B, T, 16)
    want_layer = make()
    want_layer.build(x.shape)
    if how == "argument":
        layer = make(remat=True)
    else:
        with keras.RematScope(how, output_size_threshold=1, layer_names=["here"]):
            layer = make(name="here")
    layer.build(x.shape)
    layer.set_weights(want_layer.get_weights())
    state = array(want_layer.seed_generator.state)
    (got, dgot), (want, dwant) = gradients(layer, x, state), gradients(want_layer, x, state)
    assert_close(got[0], array(want[0]), 1e-6)
    assert_close(dgot[0], array(dwant[0]), 1e-5)


def test_scopes_around_models_and_stateful_layers(rng):
    x, y = data(rng, B, T, 8), data(rng, B, 1)
    results = []
    for mode in ("full", None):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode):
            inside = [xLSTMStack(8, 1, num_heads=2), sLSTM(U, stateful=True)]
        model = keras.Sequential([keras.Input(batch_shape=x.shape), *inside, keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=jit())
        history = model.fit(x, y, epochs=3, batch_size=B, verbose=0, shuffle=False).history
        results.append((history["loss"], [array(s) for s in inside[1].states]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scope_around_cells(rng):
    with keras.RematScope("full"):
        cell = sLSTMCell(U)
    outer = keras.Sequential([keras.Input((T, F)), keras.layers.RNN(cell), keras.layers.Dense(1)])
    outer.compile("sgd", "mse", jit_compile=jit())
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=r"Use the layer sLSTM\(remat=True\)"):
            outer.fit(data(rng), data(rng, B, 1), verbose=0)
        return
    assert np.isfinite(outer.fit(data(rng), data(rng, B, 1), verbose=0).history["loss"][0])


def test_scope_around_language_models(rng):
    with keras.RematScope("full"):
        model = small()
    ids = rng.integers(0, V, (B, T))
    model.compile("sgd", LOSS(from_logits=True), jit_compile=jit())
    inputs = {"token_ids": ids, "padding_mask": ids > 2}
    want = expected(model, inputs, ids, ids > 2)
    assert abs(model.fit(inputs, ids, verbose=0).history["loss"][0] - want) < 1e-4


# ------------------------------------------------------------------------- names and refusals


def test_heads_of_one_unit_are_refused_where_a_norm_would_empty_them(rng):
    for layer in (mLSTM(1), mLSTM(4, num_heads=4), mLSTM(4, value_dim=1), sLSTMBlock(num_heads=F)):
        with pytest.raises(ValueError, match="A head of one unit is 0 after"):
            layer(data(rng))
    for layer in (mLSTM(1, use_head_norm=False), sLSTM(1), sLSTM(F, num_heads=F)):
        assert np.abs(array(layer(data(rng)))).max() > 0


@pytest.mark.parametrize("Layer", [sLSTM, sLSTMCell, mLSTM, *BLOCKS])
def test_both_names_of_the_forget_bias(Layer, rng):
    units = () if Layer in BLOCKS else (U,)
    ones = keras.initializers.Constant(1.25)
    made = [Layer(*units, **{name: ones}) for name in
            ("forget_gate_bias_initializer", "forget_bias_initializer")]  # fmt: skip
    assert made[0].get_config() | {"name": 0} == made[1].get_config() | {"name": 0}
    shape = (None, 16) if Layer is sLSTMCell else (None, None, 16)
    for layer in made:
        layer.build(shape)
        assert any((np.abs(array(w) - 1.25) < 1e-6).any() for w in layer.trainable_weights)
    with pytest.raises(ValueError, match="older name"):
        Layer(*units, forget_gate_bias_initializer=ones, forget_bias_initializer=ones)
    older = made[0].get_config()
    older["forget_bias_initializer"] = older.pop("forget_gate_bias_initializer")
    assert Layer.from_config(older).get_config() == made[0].get_config()
