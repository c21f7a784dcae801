"""mLSTMBlock, sLSTMBlock and xLSTMLargeBlock, against the equations in float64 NumPy."""

import math

import keras
import numpy as np
import pytest
from blocks import CASES, B, D, H, T, built, data, expected
from tools import array, assert_close, call, fit, jit, perturbed, tensor, vjp

from keras_xlstm.layers import CausalConv1D, mLSTMBlock, sLSTMBlock, xLSTMLargeBlock

each = pytest.mark.parametrize("case", CASES)
main = pytest.mark.parametrize("case", ["mlstm", "slstm", "large"])


@each
def test_equations(case, rng):
    block = built(case, rng)
    x = data(rng)
    assert_close(call(block, x), expected(block, x), 2e-5)


# ------------------------------------------------------------------------------------- contract


@each
def test_carried_state(case, rng):
    """Any split, and one step at a time, equals one pass."""
    block = built(case, rng, return_state=True)
    x = data(rng)
    want, *want_state = call(block, x)
    for size in (1, 5):
        state, out = None, []
        for t in range(0, T, size):
            y, *state = call(block, x[:, t : t + size], initial_state=state)
            out.append(array(y))
        assert_close(np.concatenate(out, 1), array(want), 1e-5)
        for a, b in zip(state, want_state, strict=True):
            assert_close(a, array(b), 1e-5)


@each
def test_masks(case, rng):
    """A masked sequence gives what its real steps alone give; other steps stay as they were."""
    block = built(case, rng, return_state=True)
    rows = [
        [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 1],
        [0, 1, 0, 1, 1, 1, 1, 1, 0], [0] * 9,
    ]  # fmt: skip
    mask = np.array(rows, bool)
    x = data(rng, len(rows), T, D)
    x[~mask] = np.nan
    out, *state = (array(a) for a in call(block, x, mask=mask))
    np.testing.assert_array_equal(out[~mask], x[~mask])
    assert not any(s[4].any() for s in state)
    real = x[:4][mask[:4]].reshape(4, 6, D)
    alone, *alone_state = (array(a) for a in call(block, real))
    assert_close(out[:4][mask[:4]].reshape(4, 6, D), alone, 1e-5)
    for a, s in zip(alone_state, state, strict=True):
        assert_close(s[:4], a, 1e-5)


@each
@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents(case, masked, rng):
    """Documents packed into a row give what each gives alone; the first continues the state."""
    block = built(case, rng, return_state=True)
    x = data(rng)
    ids = np.array([[4, 4, 9, 9, 9, 4, 7, 7, 7]] * B)
    mask = np.array([[1, 1, 0, 1, 1, 0, 1, 1, 0] if masked else [1] * T] * B, bool)
    _, *state = call(block, data(rng))
    out, *last = call(block, x, initial_state=state, segment_ids=ids, mask=mask if masked else None)
    for start, end in ((0, 2), (2, 5), (5, 6), (6, 9)):
        real = np.arange(start, end)[mask[0, start:end]]
        if len(real):
            alone, *alone_last = call(block, x[:, real], initial_state=None if start else state)
            assert_close(array(out)[:, real], array(alone), 1e-5)
    for a, b in zip(alone_last, last, strict=True):
        assert_close(b, array(a), 1e-5)


@main
def test_gradients_of_packed_documents(case, rng):
    """Of inputs: the same as for each document alone, and none through padding."""
    block = built(case, rng)
    x, c = data(rng), data(rng)
    ids, mask = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * B), np.ones((B, T), bool)
    mask[:, 2] = False
    c[~mask] = 0
    packed = lambda x: (call(block, x, mask=mask, segment_ids=ids),)  # noqa: E731
    _, (got,) = vjp(packed, [tensor(x)], [tensor(c)])
    assert not array(got)[:, 2].any()
    for start, end in ((0, 4), (4, 9)):
        real = np.arange(start, end)[mask[0, start:end]]
        alone = lambda x: (call(block, x),)  # noqa: E731
        _, (want,) = vjp(alone, [tensor(x[:, real])], [tensor(c[:, real])])
        assert_close(array(got)[:, real], array(want), 2e-5)


@main
def test_causal(case, rng):
    block = built(case, rng)
    x = data(rng)
    before = array(call(block, x))
    x[:, 6:] += 1
    np.testing.assert_array_equal(array(call(block, x))[:, :6], before[:, :6])


@main
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_specs_and_config(case, policy, rng):
    Block, options = CASES[case]
    block = Block(num_heads=H, return_state=True, dtype=policy, **options)
    block.build((None, None, D))  # not within the compiled call
    x = data(rng)
    got = call(block, x)
    spec = block.compute_output_spec(keras.KerasTensor((B, T, D)))
    shapes = block.compute_output_shape((B, T, D))
    for g, s, shape in zip(got, spec, shapes, strict=True):
        assert tuple(g.shape) == tuple(s.shape) == tuple(shape)
        assert keras.backend.standardize_dtype(g.dtype) == s.dtype
        assert np.isfinite(array(g).astype("float32")).all()
    assert {s.dtype for s in spec[1:]} == {"float64" if policy == "float64" else "float32"}
    again = Block.from_config(block.get_config())
    assert again.get_config() == block.get_config()
    if policy == "float64":
        assert_close(got[0], expected(block, x), 1e-6)  # the tensors of Keras's own initialisers


@main
@pytest.mark.parametrize("remat", [False, True])
def test_fits(case, remat, rng, tmp_path):
    """Unknown time, dropout; every weight gets a gradient; the saved model is the same."""
    Block, options = CASES[case]
    block = Block(num_heads=H, dropout=0.2, remat=remat, **options)
    model = keras.Sequential([keras.Input((None, D)), block, keras.layers.Dense(1)])
    perturbed(block, rng)
    before = [array(v) for v in block.trainable_weights]
    assert np.isfinite(fit(model, data(rng), data(rng, B, T, 1), jit(xla=remat), epochs=2))
    for v, old in zip(block.trainable_weights, before, strict=True):
        assert np.abs(array(v) - old).max() > 0, v.path
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = data(rng, 2, 13, D)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


@main
def test_remat_changes_nothing(case, rng):
    """The same outputs and gradients, of inputs and states, in training."""
    block = built(case, rng, return_state=True)
    again = type(block).from_config({**block.get_config(), "remat": True})
    again.build((None, None, D))
    again.set_weights(block.get_weights())
    arguments = [tensor(data(rng)), *(tensor(array(s)) for s in call(block, data(rng))[1:])]
    cotangents = [tensor(rng.normal(size=a.shape)) for a in arguments]
    results = [
        vjp(
            lambda x, *s, b=b: tuple(b(x, initial_state=list(s), training=True)),
            arguments,
            cotangents,
        )
        for b in (block, again)
    ]
    for got, want in zip(
        keras.tree.flatten(results[1]), keras.tree.flatten(results[0]), strict=True
    ):
        assert_close(got, array(want), 1e-5)


def test_initial_values(rng):
    """Names know the width and the place in the stack; no two kernels start equal."""
    block = mLSTMBlock(num_heads=H, block_index=1, num_blocks=8)
    block.build((None, None, 64))
    for layer, std in (
        (block.up_projection, math.sqrt(2 / (5 * 64))), (block.query, math.sqrt(2 / (5 * 64))),
        (block.down_projection, 2 / (8 * 8)),
    ):  # fmt: skip
        assert abs(array(layer.kernel).std() / std - 1) < 0.15
    assert len({array(p.kernel).tobytes() for p in (block.query, block.key, block.value)}) == 3
    np.testing.assert_allclose(array(block.forget_gate.bias), [3, 6])
    assert not array(block.input_gate.kernel).any()
    assert np.abs(array(block.convolution.kernel)).max() <= 0.5
    block = sLSTMBlock(num_heads=H, block_index=7, num_blocks=8)
    block.build((None, None, 16))
    want = 5 - 12 * (np.arange(8) / 7) ** 1.6
    np.testing.assert_allclose(array(block.bias)[1], [want, want], rtol=1e-5)
    assert not array(block.bias)[[0, 2, 3]].any()
    assert not array(block.recurrent_kernel).any()
    block = sLSTMBlock(num_heads=H)  # the paper's too, where the layer sLSTM starts otherwise
    block.build((None, None, 16))
    want = 5 - 12 * (np.arange(8) / 7) ** 0.3
    np.testing.assert_allclose(array(block.bias)[1], [want, want], rtol=1e-5)
    assert not array(block.recurrent_kernel).any()
    block = xLSTMLargeBlock(num_heads=H)
    block.build((None, None, 16))
    np.testing.assert_allclose(array(block.input_gate.bias), [-10, -10])
    assert not array(block.output_gate.kernel).any()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: mLSTMBlock(num_heads=0), "`num_heads` must be a positive integer.*num_heads=0"),
    (lambda: mLSTMBlock(num_heads=3).build((None, None, 16)), "`num_heads` of mLSTMBlock must divide.*64.*num_heads=3"),
    (lambda: mLSTMBlock(qkv_block_size=5).build((None, None, 16)), "`qkv_block_size`.*must divide"),
    (lambda: sLSTMBlock(num_heads=3).build((None, None, 16)), "`num_heads` of sLSTMBlock must divide"),
    (lambda: xLSTMLargeBlock(num_heads=3).build((None, None, 16)), "`num_heads` of xLSTMLargeBlock"),
    (lambda: mLSTMBlock(conv_kernel_size=-1), "`conv_kernel_size` must be.*conv_kernel_size=-1"),
    (lambda: mLSTMBlock(projection_factor=0), "`projection_factor` must be a positive number"),
    (lambda: mLSTMBlock(gate_soft_cap=-1.0), "`gate_soft_cap` must be a positive number"),
    (lambda: mLSTMBlock(input_gate="relu"), "`input_gate` must be.*'relu'"),
    (lambda: sLSTMBlock(forget_activation="relu"), "`forget_activation` must be.*'relu'"),
    (lambda: sLSTMBlock(feed_forward_factor=-1), "`feed_forward_factor` must be"),
    (lambda: sLSTMBlock(block_index=2, num_blocks=2), "`block_index` must be from 0.*block_index=2"),
    (lambda: mLSTMBlock(dropout=1.0), "`dropout` must be a number in"),
    (lambda: mLSTMBlock(use_kernel="yes"), "`use_kernel` must be"),
    (lambda: mLSTMBlock(recurrent_initializer="zeros"), "recurrent_initializer"),
    (lambda: CausalConv1D(0), "`kernel_size` must be a positive integer"),
    (lambda: mLSTMBlock()(np.zeros((2, 3), "float32")), "ndim=3"),
    (lambda: mLSTMBlock()(np.zeros((2, 3, 16), "int32")), "floating-point"),
    (lambda: mLSTMBlock()(np.zeros((2, 3, 16)), mask=np.ones((2, 4), bool)), "`mask` must have shape"),
    (lambda: mLSTMBlock()(np.zeros((2, 3, 16)), segment_ids=np.zeros((2, 4), int)), "`segment_ids` must have shape"),
    (lambda: mLSTMBlock()(np.zeros((2, 3, 16)), segment_ids=np.zeros((2, 3))), "`segment_ids` must be integers"),
    (lambda: mLSTMBlock()(np.zeros((2, 3, 16)), initial_state=[np.zeros((2, 4))]), "`initial_state` of mLSTMBlock.*conv, C, n, m"),
])  # fmt: skip
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
