"""sLSTM, mLSTM and sLSTMCell as Keras layers: what `keras.layers.LSTM` promises, and more."""

import keras
import numpy as np
import oracle
import pytest
from cases import MASKS, make_mask
from keras import ops
from tools import BACKEND, array, assert_close, fit, jit, perturbed

from keras_xlstm import backends
from keras_xlstm.layers import MultiHeadNorm, mLSTM, sLSTM, sLSTMCell

LAYERS = {"slstm": sLSTM, "mlstm": mLSTM}
each = pytest.mark.parametrize("Layer", LAYERS.values(), ids=LAYERS)
B, T, F, U = 4, 9, 5, 8


def data(rng, *shape):
    return rng.normal(size=shape or (B, T, F)).astype("float32")


def built(Layer, rng, **options):
    layer = Layer(U, num_heads=2, **options)
    layer.build((B, None, F))
    return perturbed(layer, rng)


# ------------------------------------------------------------------------------------- maths


def test_slstm_is_the_equations(rng):
    layer = built(sLSTM, rng, return_sequences=True, return_state=True)
    x = data(rng)
    out, *state = layer(x)
    cell = layer.cell
    gates = (x.astype("float64") @ array(cell.gates.kernel)).reshape(B, T, 4, 2, U // 2)
    want, want_state = oracle.slstm(gates, array(cell.recurrent_kernel), array(cell.bias))
    assert_close(out, want.reshape(B, T, U), 1e-5)
    for a, b in zip(state, want_state, strict=True):
        assert_close(a, b.reshape(B, U), 1e-5)


@pytest.mark.parametrize("options", [
    {}, {"input_gate": "sigmoid"}, {"gate_soft_cap": 2.0}, {"key_dim": 3, "value_dim": 5},
    {"use_output_gate": False}, {"use_head_norm": False}, {"use_bias": True},
], ids=str)  # fmt: skip
def test_mlstm_is_the_equations(options, rng):
    layer = built(mLSTM, rng, return_sequences=True, return_state=True, **options)
    x = data(rng)
    out, *state = layer(x)

    def dense(layer, size=None):
        y = x.astype("float64") @ array(layer.kernel)
        y = y + array(layer.bias) if layer.use_bias else y
        return y if size is None else y.reshape(B, T, 2, size)

    cap = options.get("gate_soft_cap")
    i, f = (dense(g) for g in (layer.input_gate, layer.forget_gate))
    i, f = (i, f) if cap is None else (cap * np.tanh(i / cap), cap * np.tanh(f / cap))
    K, V = options.get("key_dim", 4), options.get("value_dim", 4)
    q, k, v = dense(layer.query, K), dense(layer.key, K), dense(layer.value, V)
    gate = "sigmoid" if "input_gate" in options else "exp"
    h, want_state = oracle.mlstm(q, k, v, i, f, input_gate=gate)
    if layer.use_head_norm:
        h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    h = h.reshape(B, T, 2 * V)
    if layer.use_head_norm:
        h = h * array(layer.head_norm.gamma)
    if layer.use_output_gate:
        h = h * oracle.sigmoid(dense(layer.output_gate))
    if layer.output_projection is not None:
        h = h @ array(layer.output_projection.kernel)
    assert_close(out, h, 2e-5)
    for a, b in zip(state, want_state, strict=True):
        assert_close(a, b, 2e-5)


def test_every_kernel_of_a_layer_is_drawn_anew(rng):
    layer = mLSTM(16, num_heads=2)
    layer.build((None, None, 16))
    kernels = [layer.query, layer.key, layer.value, layer.output_gate]
    assert len({array(k.kernel).tobytes() for k in kernels}) == 4
    layer = sLSTM(16, num_heads=2)
    layer.build((None, None, 16))
    R = array(layer.cell.recurrent_kernel)
    assert not np.allclose(R[0], R[1])
    np.testing.assert_allclose(R[0].reshape(8, 32) @ R[0].reshape(8, 32).T, np.eye(8), atol=1e-5)


def test_initial_values_are_as_documented():
    layer = sLSTM(8, num_heads=2)
    layer.build((None, None, 3))
    bias, R = array(layer.cell.bias), array(layer.cell.recurrent_kernel).reshape(2, 4, 16)
    np.testing.assert_allclose(bias[1], [[-2, 0, 2, 4]] * 2, atol=1e-6)
    assert not bias[[0, 2, 3]].any()
    for head in R:
        np.testing.assert_allclose(head @ head.T, np.eye(4), atol=1e-5)
    cell = sLSTMCell(8, num_heads=2)
    settings = cell.settings()
    assert {k: v for k, v in layer.get_config().items() if k in settings} == settings
    for num_heads, want in ((4, np.linspace(1, 6, 4)), (1, [3.5])):
        layer = mLSTM(8, num_heads=num_heads)
        layer.build((None, None, 3))
        np.testing.assert_allclose(array(layer.forget_gate.bias), want, rtol=1e-6)
    layer = sLSTM(2, num_heads=2)  # heads of one unit start as LSTM's do
    layer.build((None, None, 3))
    np.testing.assert_allclose(array(layer.cell.bias)[1], [[1], [1]])


def test_the_papers_initial_values_have_names():
    layer = sLSTM(
        8, num_heads=2, recurrent_initializer="zeros", forget_gate_bias_initializer="power_law"
    )
    layer.build((None, None, 3))
    want = 5 - 12 * (np.arange(4) / 3) ** 0.3
    np.testing.assert_allclose(array(layer.cell.bias)[1], [want, want], rtol=1e-6)
    assert not array(layer.cell.recurrent_kernel).any()
    layer = mLSTM(8, num_heads=4, forget_gate_bias_initializer="linspace")
    layer.build((None, None, 3))
    np.testing.assert_allclose(array(layer.forget_gate.bias), [3, 4, 5, 6], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_orthogonal_in_half_precision(dtype):
    """Keras's LSTM(8, dtype="bfloat16") is an error: no backend has that decomposition."""
    cell = sLSTMCell(8, dtype=dtype)
    cell.build((None, 3))
    assert cell.recurrent_kernel.dtype == dtype
    R = array(ops.cast(cell.recurrent_kernel, "float32")).reshape(8, 32)
    np.testing.assert_allclose(R @ R.T, np.eye(8), atol=0.02)


# ------------------------------------------------------------------------------- Keras surface


@each
@pytest.mark.parametrize("options", [
    {}, {"return_sequences": True}, {"return_state": True},
    {"return_sequences": True, "return_state": True, "go_backwards": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float64"]
)
def test_specs_config_and_dtypes(Layer, options, policy, rng):
    """Symbolic shapes and dtypes are the real ones; states stay float32; config round trip."""
    layer = Layer(U, num_heads=2, dtype=policy, dropout=0.1, kernel_regularizer="l2", **options)
    symbolic = layer(keras.Input((None, F)))
    real = layer(data(rng))
    for a, b in zip(keras.tree.flatten(symbolic), keras.tree.flatten(real), strict=True):
        assert a.dtype == keras.backend.standardize_dtype(b.dtype)
        assert len(a.shape) == len(b.shape)
        assert all(x in (None, y) for x, y in zip(a.shape, b.shape, strict=True))
        assert np.isfinite(array(ops.cast(b, "float32"))).all()
    state = "float64" if policy == "float64" else "float32"
    assert all(
        keras.backend.standardize_dtype(s.dtype) == state for s in keras.tree.flatten(real)[1:]
    )
    shapes = layer.compute_output_shape((B, T, F))
    shapes = shapes if options.get("return_state") else [shapes]
    assert [tuple(s) for s in shapes] == [tuple(r.shape) for r in keras.tree.flatten(real)]
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert again.get_config() == layer.get_config()


@each
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_fits(Layer, policy, rng):
    """Sequential, unknown time, dropout; every weight gets a gradient and moves."""
    keras.config.set_dtype_policy(policy)
    options = {"recurrent_dropout": 0.2} if Layer is sLSTM else {}
    layer = Layer(U, num_heads=2, dropout=0.2, **options)
    model = keras.Sequential(
        [keras.Input((None, F)), layer, keras.layers.Dense(1, dtype="float32")]
    )
    perturbed(layer, rng)
    before = [array(v) for v in layer.trainable_weights]
    xla = jit(xla=policy != "mixed_float16")
    loss = fit(model, data(rng), data(rng, B, 1), xla, epochs=2)
    assert np.isfinite(loss)
    for v, old in zip(layer.trainable_weights, before, strict=True):
        assert np.abs(array(v) - old).max() > 0, v.path
    assert model.predict(data(rng, 3, 17, F), verbose=0).shape == (3, 1)


@pytest.mark.skipif(BACKEND != "jax", reason="there, every other test is without")
@each
def test_fits_without_jit(Layer, rng):
    model = keras.Sequential([keras.Input((None, F)), Layer(U), keras.layers.Dense(1)])
    assert np.isfinite(fit(model, data(rng), data(rng, B, 1), jit_compile=False))


@each
def test_learns(Layer, rng):
    """The sign that stood at the one marked step, of twelve, is learnt."""
    x = np.zeros((512, 12, 2), "float32")
    x[..., 0] = rng.choice([-1, 1], (512, 12))
    steps = rng.integers(0, 12, 512)
    x[np.arange(512), steps, 1] = 1
    y = (x[np.arange(512), steps, 0] > 0).astype("float32")
    model = keras.Sequential([keras.Input((12, 2)), Layer(16, num_heads=2), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.03), keras.losses.BinaryCrossentropy(from_logits=True))
    history = model.fit(x, y, batch_size=64, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.1 < 0.5 < history[0]


@each
@pytest.mark.parametrize("mode", ["concat", "sum", None])
def test_bidirectional(Layer, mode, rng):
    layer = Layer(U, num_heads=2, return_sequences=True, use_kernel=False)
    inputs = keras.Input((None, F))
    wrapped = keras.layers.Bidirectional(layer, merge_mode=mode)
    outputs = wrapped(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, outputs)
    x = data(rng)
    x[0, 5:] = 0  # right padding
    y = keras.tree.flatten(model(x))
    assert wrapped.backward_layer.go_backwards
    assert wrapped.backward_layer.use_kernel is False
    if mode == "concat":
        alone = array(model(x[:1, :5]))
        np.testing.assert_allclose(array(y[0])[:1, :5], alone, atol=1e-5)
        assert not array(y[0])[0, 5:].any()  # Bidirectional asks for zeros there


@each
def test_time_distributed_and_subclassing(Layer, rng):
    x = data(rng, 2, 3, T, F)
    layer = Layer(U, num_heads=2)
    layer.build((2, None, F))
    out = keras.layers.TimeDistributed(layer)(x)
    np.testing.assert_allclose(array(out)[:, 1], array(layer(x[:, 1])), atol=1e-6)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer, self.head = Layer(U, num_heads=2), keras.layers.Dense(1)

        def call(self, x):
            return self.head(self.layer(x))

    assert np.isfinite(fit(Model(), data(rng), data(rng, B, 1), jit()))


@each
def test_encoder_decoder(Layer, rng):
    source, target = keras.Input((None, F)), keras.Input((None, F))
    _, *state = Layer(U, num_heads=2, return_state=True)(source)
    decoded = Layer(U, num_heads=2, return_sequences=True)(target, initial_state=state)
    model = keras.Model([source, target], keras.layers.Dense(1)(decoded))
    assert np.isfinite(fit(model, [data(rng), data(rng)], data(rng, B, T, 1), jit()))


@each
def test_go_backwards(Layer, rng):
    layer = built(Layer, rng, return_sequences=True)
    backwards = Layer.from_config({**layer.get_config(), "go_backwards": True})
    backwards.build((B, None, F))
    backwards.set_weights(layer.get_weights())
    x = data(rng)
    want = array(layer(x[:, ::-1].copy()))
    np.testing.assert_allclose(array(backwards(x)), want, atol=1e-6)


@each
def test_steps_with_a_carried_state(Layer, rng):
    """One token at a time, and any split, equals one pass (to 3e-6 on an H200, seen)."""
    layer = built(Layer, rng, return_sequences=True, return_state=True)
    x = data(rng)
    want, *want_state = layer(x)
    for size in (1, 4):
        state, out = None, []
        for t in range(0, T, size):
            y, *state = layer(x[:, t : t + size], initial_state=state)
            out.append(array(y))
        np.testing.assert_allclose(np.concatenate(out, 1), array(want), atol=1e-5)
        for a, b in zip(state, want_state, strict=True):
            np.testing.assert_allclose(array(a), array(b), atol=1e-5)


# --------------------------------------------------------------------------------------- masks


@each
@pytest.mark.parametrize("kind", MASKS)
def test_masks(Layer, kind, rng):
    """A masked sequence gives what its real steps alone give, whatever stands in the padding."""
    layer = built(Layer, rng, return_sequences=True, return_state=True)
    last = Layer.from_config(
        {**layer.get_config(), "return_sequences": False, "return_state": False}
    )
    last.build((B, None, F))
    last.set_weights(layer.get_weights())
    x, mask = data(rng), make_mask(kind, B, T, rng)
    x[~mask] = np.nan
    out, *state = (array(a) for a in layer(x, mask=mask))
    final = array(last(x, mask=mask))
    layer.zero_output_for_mask = True  # as Bidirectional sets it, after construction
    zeroed = array(layer(x, mask=mask)[0])
    for b in range(B):
        if not mask[b].any():
            assert not out[b].any()
            assert not final[b].any()
            assert not any(s[b].any() for s in state)
            continue
        alone, *alone_state = (array(a) for a in layer(x[b : b + 1, mask[b]]))
        np.testing.assert_allclose(out[b, mask[b]], alone[0], atol=2e-6)
        np.testing.assert_allclose(final[b], alone[0, -1], atol=2e-6)
        np.testing.assert_array_equal(zeroed[b], np.where(mask[b][:, None], out[b], 0))
        for a, s in zip(alone_state, state, strict=True):
            np.testing.assert_allclose(s[b], a[0], atol=2e-6)
        held = np.zeros_like(out[b, 0])
        for t in range(T):
            held = out[b, t] if mask[b, t] else held
            np.testing.assert_array_equal(out[b, t], held)


@each
def test_implicit_mask_survives_initial_state(Layer, rng):
    """Stock Keras drops the mask as soon as initial_state is given."""
    ids = rng.integers(1, 7, (B, T))
    ids[:, 6:] = 0
    embedding = keras.layers.Embedding(7, F, mask_zero=True)
    layer = built(Layer, rng, return_state=True)
    _, *state = layer(data(rng))
    token, given = keras.Input((T,), dtype="int32"), [keras.Input(s.shape[1:]) for s in state]
    model = keras.Model([token, *given], layer(embedding(token), initial_state=given)[0])
    want = layer(embedding(ids[:, :6]), initial_state=state)[0]
    for predict in (lambda a: model(a), lambda a: model.predict(a, verbose=0)):
        got = predict([ids, *(array(s) for s in state)])
        np.testing.assert_allclose(array(got), array(want), atol=1e-6)


@each
def test_mask_travels_on(Layer, rng):
    """Where LSTM hands it on: up to Keras 3.15."""
    inputs = keras.Input((T, F))
    x = keras.layers.Masking()(inputs)
    model = keras.Model(inputs, Layer(U)(Layer(U, return_sequences=True)(x)))
    x = data(rng)
    x[:, 6:] = 0
    handed_on = keras.layers.LSTM(1).supports_masking
    first = model.layers[-2](x[:, :6])
    last = ops.repeat(first[:, -1:], 0 if handed_on else T - 6, axis=1)  # masked steps repeat it
    want = array(model.layers[-1](ops.concatenate([first, last], axis=1)))
    np.testing.assert_allclose(array(model(x)), want, atol=1e-6)
    layer = Layer(U, return_sequences=True, return_state=True)
    mask = ops.ones((B, T), "bool")
    assert layer.compute_mask(x, mask)[1:] == (None,) * len(layer.state_names)


@each
def test_no_gradient_through_padding(Layer, rng):
    """NaN in padding leaves every weight finite after a step of fit."""
    inputs, mask = keras.Input((T, F)), keras.Input((T,), dtype="bool")
    model = keras.Model([inputs, mask], Layer(U, num_heads=2)(inputs, mask=mask))
    x, m = data(rng), make_mask("right", B, T, rng)
    x[~m] = np.nan
    assert np.isfinite(fit(model, [x, m], data(rng, B, U), jit()))
    assert all(np.isfinite(array(v)).all() for v in model.weights)


# ------------------------------------------------------------------------------------ stateful


@each
def test_stateful_carries_everywhere(Layer, rng):
    layer = Layer(U, num_heads=2, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(B, 3, F)), layer])
    perturbed(layer, rng)
    x = data(rng)
    whole = Layer(U, num_heads=2)
    whole.build((B, None, F))
    whole.set_weights([array(v) for v in layer.trainable_weights])
    want = array(whole(x))
    chunks = [x[:, t : t + 3] for t in range(0, T, 3)]
    for run in (model, lambda c: model.predict(c, batch_size=B, verbose=0)):
        layer.reset_state()
        got = [array(run(c)) for c in chunks][-1]
        np.testing.assert_allclose(got, want, atol=2e-6)
    layer.reset_states()
    assert not any(array(s).any() for s in layer.states)
    model.compile("sgd", "mse", jit_compile=jit(xla=True))
    model.fit(np.concatenate(chunks), np.zeros((3 * B, U)), batch_size=B, shuffle=False, verbose=0)
    assert all(array(s).any() for s in layer.states)


# ----------------------------------------------------------------------------- cells, norm, use


def test_cell_in_rnn(rng):
    layer = built(sLSTM, rng, return_sequences=True, return_state=True)
    cell = sLSTMCell(U, num_heads=2)
    rnn = keras.layers.RNN(cell, return_sequences=True, return_state=True)
    rnn.build((B, T, F))
    cell.set_weights(layer.get_weights())
    x = data(rng)
    mask = make_mask("holes", B, T, rng)
    for options in ({}, {"mask": mask}):
        for a, b in zip(rnn(x, **options), layer(x, **options), strict=True):
            np.testing.assert_allclose(array(a)[:, -1], array(b)[:, -1], atol=2e-6)


@pytest.mark.parametrize(("policy", "compiled"), [("mixed_bfloat16", True), ("float32", False)])
def test_stacked_cells_fit(policy, compiled, rng):
    keras.config.set_dtype_policy(policy)
    cells = keras.layers.StackedRNNCells([sLSTMCell(2 * U, num_heads=4), sLSTMCell(U)])
    model = keras.Sequential([keras.Input((T, F)), keras.layers.RNN(cells), keras.layers.Dense(1)])
    assert np.isfinite(fit(model, data(rng), data(rng, B, 1), compiled and jit(xla=True)))
    config = keras.layers.serialize(model.layers[0])
    assert keras.layers.deserialize(config).get_config() == model.layers[0].get_config()


def test_head_norm_does_not_look_ahead(rng):
    norm = MultiHeadNorm(2)
    x = data(rng, B, T, U)
    before = array(norm(x))
    heads = before.reshape(B, T, 2, U // 2)
    np.testing.assert_allclose(heads.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(heads.std(-1), 1, atol=1e-2)  # epsilon, where a head is flat
    x[:, 5:] = 0
    np.testing.assert_array_equal(before[:, :5], array(norm(x))[:, :5])
    with pytest.raises(ValueError, match="divisible by `num_heads`"):
        MultiHeadNorm(3)(x)


@each
def test_activity_regularizer_and_constraints(Layer, rng):
    layer = Layer(U, activity_regularizer="l2", kernel_constraint="non_neg")
    layer(data(rng))
    assert len(layer.losses) == 1
    kernel = layer.cell.gates.kernel if Layer is sLSTM else layer.query.kernel
    assert kernel.constraint is not None


@each
def test_lora_and_int8(Layer, rng):
    layer = built(Layer, rng)
    x = data(rng)
    want = array(layer(x))
    dense = layer.cell.gates if Layer is sLSTM else layer.value
    dense.enable_lora(2)
    np.testing.assert_allclose(array(layer(x)), want, atol=1e-6)
    model = keras.Sequential([keras.Input((T, F)), built(Layer, rng)])
    want = array(model(x))
    model.quantize("int8")
    assert_close(model(x), want, 0.05)


# ----------------------------------------------------------------------------------- bad input


@each
@pytest.mark.parametrize(("options", "words"), [
    ({"units": 0}, "`units` must be a positive integer. Received: units=0"),
    ({"units": 2.5}, "`units` must be a positive integer. Received: units=2.5"),
    ({"num_heads": 3}, "divisible by `num_heads`.*Received: units=8, num_heads=3"),
    ({"num_heads": -1}, "`num_heads` must be a positive integer"),
    ({"dropout": 1.5}, r"`dropout` must be a number in \[0, 1\). Received: dropout=1.5"),
    ({"use_kernel": "yes"}, "`use_kernel` must be .*Received: use_kernel='yes'"),
    ({"kernel_initializer": None}, "must be a name, an Initializer.*Received: None"),
    ({"bias_initializer": None}, "must be a name, an Initializer.*Received: None"),
    ({"dtype": "int32"}, "`dtype` of .LSTM must be floating-point.*Received: dtype='int32'"),
], ids=str)  # fmt: skip
def test_bad_arguments(Layer, options, words):
    with pytest.raises(ValueError, match=words):
        Layer(**{"units": U, **options})


@pytest.mark.parametrize(("Layer", "options", "words"), [
    (sLSTM, {"forget_activation": "tanh"}, "must be \"sigmoid\" or \"exponential\".*'tanh'"),
    (sLSTM, {"recurrent_dropout": -1}, "`recurrent_dropout` must be a number"),
    (sLSTM, {"recurrent_gradient_clip": 0}, "must be a positive number, or None"),
    (sLSTM, {"unroll": True}, "unroll"),
    (mLSTM, {"recurrent_dropout": 0.1}, "recurrent_dropout"),
    (mLSTM, {"recurrent_initializer": "zeros"}, "recurrent_initializer"),
    (mLSTM, {"key_dim": 0}, "`key_dim` must be a positive integer"),
    (mLSTM, {"forget_gate_bias_initializer": None}, "must be a name, an Initializer"),
    (mLSTM, {"input_gate_bias_initializer": 0}, "Could not interpret initializer identifier: 0"),
    (mLSTM, {"input_gate": "relu"}, "`input_gate` must be .*'relu'"),
    (mLSTM, {"gate_soft_cap": -1}, "`gate_soft_cap` must be a positive number"),
    (sLSTMCell, {"dropout": 0.1}, "dropout"),
    (sLSTMCell, {"dtype": "int32"}, "`dtype` of sLSTMCell must be floating-point"),
    (sLSTMCell, {"activity_regularizer": "l2"}, "cannot honour `activity_regularizer`.*'l2'"),
], ids=str)  # fmt: skip
def test_arguments_a_layer_cannot_honour(Layer, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Layer(U, **options)


@each
def test_bad_calls(Layer, rng):
    layer = Layer(U, num_heads=2)
    x = data(rng)
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        layer(x[:, 0])
    with pytest.raises(ValueError, match="floating-point sequences. Received: dtype int32"):
        Layer(U)(np.ones((B, T, F), "int32"))
    with pytest.raises(ValueError, match=r"at least one time step. Received: .*\(4, 0, 5\)"):
        layer(x[:, :0])
    layer(x)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(x[..., :2])
    with pytest.raises(ValueError, match="`return_state` must be True or False.*'no'"):
        layer(x, return_state="no")
    with pytest.raises(ValueError, match="`stateful=True` needs a batch size"):
        keras.Sequential([keras.Input((T, F)), Layer(U, stateful=True)])
    own = {"jax": "pallas", "torch": "triton", "tensorflow": "xla"}[BACKEND]
    reason = backends.available()[Layer.__name__.lower()][own]
    if reason is not True:
        words = rf"The {own} implementation .* cannot run: .*use_kernel=.auto. or False"
        with pytest.raises(ValueError, match=words):
            Layer(U, use_kernel=True)(x)


@each
@pytest.mark.parametrize("symbolic", [False, True])
def test_bad_states_and_masks(Layer, symbolic, rng):
    """Seen when a model is drawn up, not when it is trained."""
    layer = Layer(U, num_heads=2, return_state=True)
    x = data(rng)
    _, *state = layer(x)

    def refused(words, state=None, mask=None, dtype="float32"):
        if symbolic:
            state, mask = keras.tree.map_structure(
                lambda a: keras.Input(a.shape[1:], dtype=a.dtype) if hasattr(a, "shape") else a,
                (state, mask),
            )
        sequences = keras.Input((T, F), dtype=dtype) if symbolic else x.astype(dtype)
        with pytest.raises(ValueError, match=words):
            layer(sequences, initial_state=state, mask=mask)

    state = [array(s) for s in state]
    names = "h, c, n, m" if Layer is sLSTM else "C, n, m"
    size = len(state)
    refused(rf"list of the {size} tensors \({names}\).*Received: 1 tensors", state[:1])
    refused(rf"list of the {size} tensors .*Received: dict", dict(enumerate(state)))
    refused("must have shape .*Received: shape", [np.zeros((B, 3, 3), "float32")] * size)
    refused("must have shape .*Received: a int", [0] * size)
    refused("must be floating-point. Received: dtype int32", [s.astype("int32") for s in state])
    refused(r"`mask` must have shape \(batch, time\)", mask=np.ones((B, T + 1), "bool"))
    refused(r"`mask` must have shape \(batch, time\)", mask=np.ones((B,), "bool"))
    refused("`mask` must have shape .*Received: mask a str", mask="all")
    refused("floating-point sequences. Received: dtype int32", dtype="int32")


@each
def test_a_stateful_layer_takes_no_other_batch(Layer, rng):
    layer = Layer(U, num_heads=2, stateful=True)
    layer(data(rng))
    with pytest.raises(ValueError, match="Received: 2 sequences, after a layer built for 4"):
        layer(data(rng, 2, T, F))


@each
def test_frozen_from_the_start(Layer, rng):
    """`trainable=False` reaches the sub-layers, which a model asks."""
    model = keras.Sequential([keras.Input((T, F)), Layer(U, num_heads=2, trainable=False)])
    assert not model.trainable_variables
    model.layers[0].trainable = True
    assert model.trainable_variables
    cell = keras.layers.RNN(sLSTMCell(U, trainable=False))
    assert not keras.Sequential([keras.Input((T, F)), cell]).trainable_variables
