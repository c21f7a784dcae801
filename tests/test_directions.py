"""Blocks that read from the end, `keras.layers.Bidirectional` around them, and stacks of them."""

import keras
import numpy as np
import pytest
from blocks import CASES, B, D, H, T, built, data, expected
from tools import array, assert_close, call, error, fit, jit, perturbed, some, tensor, vjp

import keras_xlstm
from keras_xlstm.layers import mLSTMBlock, sLSTMBlock, xLSTMLargeBlock
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

each = pytest.mark.parametrize("case", CASES)
main = pytest.mark.parametrize("case", ["mlstm", "slstm", "large"])
MODES = some(
    [*(("mlstm", mode) for mode in ("concat", "sum", "mul", "ave", None)), ("slstm", "concat"),
     ("large", "ave")],
    [(case, mode) for case in ("slstm", "large") for mode in ("concat", "sum", "mul", "ave", None)],
)  # fmt: skip
STACKS = {
    "alternate": {"pattern": "2:1", "num_blocks": 3},
    "both": {"pattern": "1:1", "num_blocks": 2},
    "both-large": {"architecture": "large", "num_blocks": 2},
}
stacks = pytest.mark.parametrize("kind", STACKS)
# Where XLA compiles many shapes: minutes for all of them.
slow_stacks = pytest.mark.parametrize(
    "kind", [k if k == "both" else pytest.param(k, marks=pytest.mark.sweep) for k in STACKS]
)

# Padding on the right, on the left, in holes, on both sides, everywhere, and all but one step.
MASK = np.array([
    [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 1],
    [0, 0, 1, 1, 1, 1, 1, 0, 0], [0] * 9, [0, 0, 0, 0, 0, 1, 0, 0, 0], [1] * 9,
], bool)  # fmt: skip
IDS = np.array([[4, 4, 9, 9, 9, 4, 7, 7, 7]] * len(MASK))  # an id that comes back is another


def padded(rng):
    x = data(rng, len(MASK), T, D)
    x[~MASK] = np.nan
    return x


def stack_of(kind, rng, **options):
    direction = kind.split("-")[0]
    stack = xLSTMStack(D, num_heads=H, direction=direction, **{**STACKS[kind], **options})
    stack.jit_compile = jit()
    return perturbed(stack, rng, 0.2)


def outputs_of(stack, inputs):
    """As `predict` gives them, whether or not the batch is whole."""
    return stack.predict_on_batch(inputs)


# --------------------------------------------------------------------------- reversed by hand


def documents(mask, ids):
    """Of one row, the real steps of every document."""
    real = np.flatnonzero(mask)
    ends = np.flatnonzero(np.diff(ids[real])) + 1
    return [steps for steps in np.split(real, ends) if len(steps)]


def read(block, x, mask=None, ids=None, backwards=False):
    """What a block makes of each document alone, in float64, steps staying at their places."""
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    ids = np.zeros(x.shape[:2], int) if ids is None else ids
    out = np.array(x, "float64")
    for row in range(len(x)):
        for steps in documents(mask[row], ids[row]):
            steps = steps[::-1] if backwards else steps
            out[row, steps] = expected(block, x[row : row + 1, steps])[0]
    return out


def expected_stack(stack, x, mask, ids):
    x = np.where(mask[:, :, None], x, 0)
    blocks = iter(stack.blocks)
    for index in range(stack.settings["num_blocks"]):
        if stack.direction == "both":
            ways = [read(next(blocks), x, mask, ids, backwards) for backwards in (False, True)]
            x = (ways[0] + ways[1]) / 2
        else:
            x = read(next(blocks), x, mask, ids, backwards=index % 2 == 1)
    return x


# -------------------------------------------------------------------------------------- blocks


@each
def test_a_block_that_goes_backwards(case, rng):
    """Any mask, any documents; outputs come in the order of reading."""
    block = built(case, rng, go_backwards=True)
    x = padded(rng)
    got = array(call(block, x, mask=MASK, segment_ids=IDS))[:, ::-1]
    np.testing.assert_array_equal(got[~MASK], x[~MASK])
    assert_close(got[MASK], read(block, x, MASK, IDS, backwards=True)[MASK], 2e-5)
    got = array(call(block, x[6:], segment_ids=IDS[6:]))[:, ::-1]
    assert_close(got, read(block, x[6:], ids=IDS[6:], backwards=True), 2e-5)
    one = x[6:, :1]
    assert_close(call(block, one), expected(block, one), 2e-5)


@main
def test_states_of_a_block_that_goes_backwards(case, rng):
    """Its state comes from what stands behind: the last part is read first."""
    block = built(case, rng, go_backwards=True, return_state=True)
    x, mask, ids = data(rng), np.ones((B, T), bool), np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * B)
    mask[0, 6:] = mask[1, 5:7] = mask[2, 2] = False
    want, *want_state = call(block, x, mask=mask, segment_ids=ids)
    late, *state = call(block, x[:, 5:], mask=mask[:, 5:], segment_ids=ids[:, 5:])
    # The document that goes on is the last of the earlier part.
    early, *state = call(
        block, x[:, :5], initial_state=state, mask=mask[:, :5], segment_ids=ids[:, :5]
    )
    assert_close(np.concatenate([array(late), array(early)], 1), array(want), 1e-5)
    for got, last in zip(state, want_state, strict=True):
        assert_close(got, array(last), 1e-5)


@pytest.mark.parametrize(("case", "mode"), MODES)
def test_bidirectional(case, mode, rng):
    Block, options = CASES[case]
    layer = keras.layers.Bidirectional(Block(num_heads=H, **options), merge_mode=mode)
    layer.build((None, None, D))
    perturbed(layer, rng)
    x = np.where(MASK[:, :, None], padded(rng), 0.5)
    ways = [
        read(block, x, MASK, backwards=block.go_backwards)
        for block in (layer.forward_layer, layer.backward_layer)
    ]
    want = {
        "concat": np.concatenate(ways, -1), "sum": ways[0] + ways[1], "mul": ways[0] * ways[1],
        "ave": (ways[0] + ways[1]) / 2,
    }  # fmt: skip
    got = keras.tree.flatten(call(layer, x, mask=MASK))
    for y, reference in zip(got, ways if mode is None else [want[mode]], strict=True):
        assert_close(y, reference, 2e-5)
    shapes = layer.compute_output_shape(x.shape)
    assert [tuple(y.shape) for y in got] == list(shapes if mode is None else [shapes])


@main
def test_states_of_bidirectional(case, rng):
    """The first half of the states are the forward block's, in and out; a mask comes along."""
    Block, options = CASES[case]
    layer = keras.layers.Bidirectional(
        Block(num_heads=H, return_state=True, **options), merge_mode="sum"
    )
    layer.build((B, None, D))
    perturbed(layer, rng)
    x, mask = data(rng), np.arange(T) < [[6], [9], [1]]
    _, *state = call(layer, data(rng), mask=mask)
    out, *new = call(layer, x, initial_state=state, mask=mask)
    ways, half = [], len(state) // 2
    for block, part in ((layer.forward_layer, state[:half]), (layer.backward_layer, state[half:])):
        y, *after = call(block, x, initial_state=part, mask=mask)
        ways += [array(y)[:, ::-1] if block.go_backwards else array(y)]
        for got, want in zip(new[:half], after, strict=True):
            assert_close(got, array(want), 1e-6)
        new = new[half:]
    assert_close(out, ways[0] + ways[1], 1e-6)


@pytest.mark.parametrize("case", [pytest.param("mlstm", marks=pytest.mark.sweep), "slstm", "large"])
def test_bidirectional_in_a_model(case, rng, tmp_path):
    """A mask that comes along, unknown time, dropout; every weight learns; copies are equal."""
    Block, options = CASES[case]
    same = keras.initializers.RandomNormal(stddev=0.1, seed=3)
    block = Block(num_heads=H, dropout=0.1, remat=True, kernel_initializer=same, **options)
    layer = keras.layers.Bidirectional(block, merge_mode="ave")
    model = keras.Sequential(
        [keras.Input((None, D)), keras.layers.Masking(), layer, keras.layers.Dense(1)]
    )
    ways = layer.forward_layer.weights, layer.backward_layer.weights
    for a, b in zip(*ways, strict=True):  # each direction begins with kernels of its own
        assert a is not b
        assert a.name != "kernel" or not array(a).any() or error(a, array(b)) > 0.1, a.path
    perturbed(layer, rng)
    before = [array(v) for v in layer.trainable_weights]
    x = np.where(MASK[:, :, None], data(rng, len(MASK), T, D), 0)
    assert np.isfinite(fit(model, x, data(rng, len(MASK), T, 1), jit(), epochs=2))
    for v, old in zip(layer.trainable_weights, before, strict=True):
        assert np.abs(array(v) - old).max() > 0, v.path
    want = model.predict_on_batch(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), want)
    copied = keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    copied.jit_compile = jit()
    np.testing.assert_allclose(copied.predict_on_batch(x), want, atol=1e-6)
    alone = x[3:4, 2:7]  # padded on both sides
    np.testing.assert_allclose(model.predict_on_batch(alone), want[3:4, 2:7], atol=1e-5)


@pytest.mark.parametrize("Block", [mLSTMBlock, sLSTMBlock, xLSTMLargeBlock])
def test_configs_of_blocks(Block):
    assert Block(go_backwards=True).get_config()["go_backwards"] is True
    config = Block().get_config()
    del config["go_backwards"]  # as older files have it
    assert Block.from_config(config).go_backwards is False
    with pytest.raises(ValueError, match="`go_backwards` must be True or False.*'yes'"):
        Block(go_backwards="yes")


# -------------------------------------------------------------------------------------- stacks


@stacks
def test_a_stack_is_its_blocks_reversed_by_hand(kind, rng):
    stack = stack_of(kind, rng, final_norm=False)
    x = padded(rng)
    got = outputs_of(stack, {"sequences": x, "padding_mask": MASK, "segment_ids": IDS})
    want = expected_stack(stack, x, MASK, IDS)
    assert not got[~MASK].any()
    assert_close(got[MASK], want[MASK], 3e-5)
    whole = np.ones_like(MASK[6:])
    for n in (T, 1):  # neither padding nor documents
        want = expected_stack(stack, x[6:, :n], whole[:, :n], np.zeros((1, n), int))
        assert_close(outputs_of(stack, x[6:, :n]), want, 3e-5)


@slow_stacks
def test_masks_come_along(kind, rng):
    """What `Masking` says is honoured in every block, and goes on behind the stack."""
    stack = stack_of(kind, rng)
    inputs = keras.Input((None, D))
    outputs = stack(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, [outputs, keras.layers.GlobalAveragePooling1D()(outputs)])
    model.jit_compile = jit()
    x = np.where(MASK[:, :, None], data(rng, len(MASK), T, D), 0)
    got, pooled = model.predict_on_batch(x)
    np.testing.assert_allclose(
        got[MASK], outputs_of(stack, {"sequences": x, "padding_mask": MASK})[MASK], atol=1e-5
    )
    for row in (0, 3):  # every length is a compilation
        alone = outputs_of(stack, x[row : row + 1, MASK[row]])
        np.testing.assert_allclose(got[row : row + 1, MASK[row]], alone, atol=2e-5)
        np.testing.assert_allclose(pooled[row], alone[0].mean(0), atol=2e-5)


@slow_stacks
def test_gradients(kind, rng):
    """Each document's inputs reach all of its own outputs, before and behind, and no others."""
    stack = stack_of(kind, rng, remat=True)
    x, mask, ids = tensor(data(rng)), np.ones((B, T), bool), np.array([[0] * 4 + [1] * 5] * B)
    mask[:, 2] = False

    def run(x):
        inputs = {"sequences": x, "padding_mask": tensor(mask, "bool")}
        return (stack({**inputs, "segment_ids": tensor(ids, "int32")}, training=True),)

    for step in (0, 8):
        c = np.zeros((B, T, D))
        c[:, step] = rng.normal(size=(B, D))
        _, (gradient,) = vjp(run, [x], [tensor(c)], xla=False)
        reached = np.abs(array(gradient)).max((0, 2)) > 0
        np.testing.assert_array_equal(reached, mask[0] & (ids[0] == ids[0, step]))

    c = data(rng) * mask[:, :, None]
    _, (got,) = vjp(run, [x], [tensor(c)], xla=False)
    second = np.arange(4, 9)  # by itself
    alone = lambda x: (stack(x, training=True),)  # noqa: E731
    part = tensor(array(x)[:, second])
    _, (want,) = vjp(alone, [part], [tensor(c[:, second])], xla=False)
    assert_close(array(got)[:, second], array(want), 5e-5)


@slow_stacks
def test_stacks_in_files(kind, rng, tmp_path):
    stack = stack_of(kind, rng, seed=1, dropout=0.1)
    assert len({block.seed for block in stack.blocks}) == len(stack.blocks)
    x, y = data(rng), data(rng)
    before = [array(v) for v in stack.trainable_weights]
    assert np.isfinite(fit(stack, x, y, jit(), epochs=2))
    for v, old in zip(stack.trainable_weights, before, strict=True):
        assert np.abs(array(v) - old).max() > 0, v.path
    want = outputs_of(stack, x)
    stack.save(tmp_path / "stack.keras")
    loaded = keras.models.load_model(tmp_path / "stack.keras")
    copied = keras.models.clone_model(stack)
    copied.set_weights(stack.get_weights())
    for model in (loaded, copied):
        assert type(model) is xLSTMStack
        assert model.get_config() == stack.get_config()
        np.testing.assert_allclose(model.predict_on_batch(x), want, atol=1e-6)


def test_costs_and_names():
    def count(direction):
        return xLSTMStack(D, 3, num_heads=H, direction=direction, final_norm=False).count_params()

    assert count("alternate") == count("forward") == count("both") / 2
    stack = xLSTMStack(D, 3, num_heads=H, direction="alternate")
    assert [block.go_backwards for block in stack.blocks] == [False, True, False]
    same = {"kernel_initializer": keras.initializers.RandomNormal(seed=1)}
    stack = xLSTMStack(D, 2, num_heads=H, direction="both", mlstm_options=same)
    names = ["block_0", "block_0_backward", "block_1", "block_1_backward"]
    assert [block.name for block in stack.blocks] == names
    assert len({array(block.up_projection.kernel).tobytes() for block in stack.blocks}) == 4


def test_older_configs_read_forwards(rng):
    stack = xLSTMStack(D, 2, num_heads=H)
    config = stack.get_config()
    assert config.pop("direction") == "forward"
    again = xLSTMStack.from_config(config)
    assert again.get_config() == stack.get_config()
    assert [layer.name for layer in again.layers] == [layer.name for layer in stack.layers]
    x = data(rng)
    again.set_weights(stack.get_weights())
    first = array(call(again, x))
    x[:, 5:] += 1
    np.testing.assert_array_equal(array(call(again, x))[:, :5], first[:, :5])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_dtypes(policy, rng):
    for kind in ("alternate", "both"):
        stack = stack_of(kind, rng, dtype=policy)
        got = call(stack, tensor(data(rng), stack.blocks[0].compute_dtype))
        assert keras.backend.standardize_dtype(got.dtype) == stack.blocks[0].compute_dtype
        assert np.isfinite(array(got).astype("float32")).all()
        assert all(layer.compute_dtype == got_dtype(got) for layer in stack.layers[1:])


def got_dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def test_compiled_blocks(rng):
    """`jit_compile=True` where it is XLA's: the same losses as without."""
    losses = []
    x, y = data(rng), data(rng)
    for compiled in (False, jit(xla=True)):
        keras.utils.set_random_seed(0)
        stack = stack_of("both", np.random.default_rng(1))
        losses.append(fit(stack, x, y, compiled, epochs=2))
    np.testing.assert_allclose(*losses, rtol=1e-5)


# -------------------------------------------------------------------------------------- errors


def whole(direction):
    return xLSTMStack(D, 2, num_heads=H, direction=direction, name="both_ways")


def nested(direction):
    inputs = keras.Input((None, D))
    return keras.Model(inputs, keras.layers.Dense(1)(whole(direction)(inputs)))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: whole("backward"), '`direction` must be "forward", "alternate".*\'backward\''),
    (lambda: whole(None), "`direction` must be.*direction=None"),
    (lambda: xLSTMStack(D, 1, direction="alternate"), "needs a second block.*num_blocks=1"),
    (lambda: xLSTMStack(D, 2, mlstm_options={"go_backwards": True}), "`mlstm_options` cannot hold go_backwards.*`direction="),
    (lambda: xLSTMLanguageModel(9, D, 2, slstm_options={"go_backwards": False}), "`slstm_options`.*a language model reads forwards"),
    (lambda: xLSTMLanguageModel(9, D, 2, direction="both"), "direction"),
    (lambda: whole("both").get_initial_state(2), "get_initial_state is for states.*direction='both'.*Bidirectional"),
    (lambda: whole("alternate").run(np.zeros((1, 3, D), "float32"), None), "xLSTMStack.run is for.*direction='alternate'"),
    (lambda: keras_xlstm.export.step_model(whole("both")), "both_ways cannot stream.*direction='both'.*forward"),
    (lambda: keras_xlstm.export.step_model(nested("alternate")), "both_ways cannot stream.*direction='alternate'"),
    (lambda: mLSTMBlock(go_backwards=True)(np.zeros((2, 3, 16)), segment_ids=np.zeros(2, int)), "`segment_ids` must have shape"),
])  # fmt: skip
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
