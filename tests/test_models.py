"""xLSTMStack and xLSTMLanguageModel: shapes, packing, generation, and what users do to models."""

import gc
import weakref

import keras
import numpy as np
import pytest
from tools import BACKEND, array, assert_close, call, error, jit, perturbed

from keras_xlstm.models import configs, exclude_from_weight_decay, xLSTMLanguageModel, xLSTMStack

B, T, V, D = 4, 11, 23, 16
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
KINDS = {"paper": {"pattern": "1:1"}, "large": {"architecture": "large"}}
each = pytest.mark.parametrize("kind", KINDS)


def model_of(kind="paper", rng=None, **options):
    model = xLSTMLanguageModel(V, D, 2, num_heads=2, **{**KINDS[kind], **options})
    model.jit_compile = jit()
    return perturbed(model, rng, 0.2) if rng is not None else model


def logits_of(model, inputs):
    return model.predict_on_batch(inputs)


def run(model, ids):
    return call(model.run, ids, state=model.get_initial_state(len(ids)))


def tokens(rng, *shape):
    return rng.integers(0, V, shape or (B, T))


# -------------------------------------------------------------------------------------- the model


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch has tensors without memory")
@pytest.mark.parametrize(("config", "pattern", "count"), [
    ("xlstm_125m", "1:0", 163_806_144), ("xlstm_125m", "7:1", 163_690_928),
    ("xlstm_350m", "1:0", 409_290_112), ("xlstm_350m", "7:1", 408_436_048),
    ("xlstm_760m", "1:0", 840_427_392), ("xlstm_760m", "7:1", 839_736_144),
    ("xlstm_1_3b", "1:0", 1_422_559_616), ("xlstm_1_3b", "7:1", 1_420_065_104),
    ("xlstm_7b", None, 6_865_424_896),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(config, pattern, count):
    """Counted by the official code; its paper gives them to 0.1M."""
    make = getattr(configs, config)
    with keras.device("meta"):
        model = xLSTMLanguageModel(**(make(pattern) if pattern else make()))
    assert model.count_params() == count


# As the authors' run data have them, smallest first.
SCALING_LAW = [
    83_680_848, 90_114_656, 96_548_464, 102_982_272, 114_034_660, 123_963_640, 133_892_620,
    143_821_600, 164_110_224, 185_820_852, 207_310_376, 207_531_480, 236_601_554, 265_892_732,
    295_183_910, 324_475_088, 330_898_576, 353_766_266, 368_877_736, 406_856_896, 444_836_056,
    482_815_216, 503_996_976, 552_508_902, 601_020_828, 604_970_480, 664_494_350, 715_615_120,
    724_018_220, 787_359_826, 841_643_808, 859_104_532, 927_532_356, 1_013_420_904, 1_108_619_344,
    1_224_660_346, 1_340_701_348, 1_421_232_512, 1_573_130_672, 1_725_028_832, 1_772_405_424,
    1_876_926_992, 1_964_980_710, 2_028_825_152, 2_157_555_996, 2_350_131_282, 2_544_671_300,
    2_781_269_120, 3_017_866_940, 3_254_464_760, 6_865_424_896,
]  # fmt: skip


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch has tensors without memory")
def test_parameter_counts_of_the_scaling_laws():
    """A block counts alike wherever it stands: one of each width is made."""
    names, blocks = configs.scaling_law_sizes(), {}
    assert len(names) == len(SCALING_LAW)
    for name, count in zip(names, SCALING_LAW, strict=True):
        settings = configs.scaling_law(name)
        assert name == f"{count / 1e6:.2f}M"
        units, number = settings["units"], settings["num_blocks"]
        if units not in blocks:
            with keras.device("meta"):
                model = xLSTMLanguageModel(**{**settings, "num_blocks": 1})
            outside = 2 * settings["vocabulary_size"] * units + units
            blocks[units] = model.count_params() - outside
        assert number * blocks[units] + 2 * settings["vocabulary_size"] * units + units == count


@each
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "logit_soft_cap": 3.0}], ids=str)
def test_is_its_layers(kind, options, rng):
    """The functional model, `run` and `logits`, and the layers one after another, agree."""
    model = model_of(kind, rng, **options)
    ids = tokens(rng)
    got = logits_of(model, ids)
    assert got.shape == (B, T, V) == (B, T, model.compute_output_shape((B, T))[-1])

    def features(x):
        for block in model.blocks:
            x = block(x)
        return model.get_layer("norm")(x)

    x = call(features, model.get_layer("embedding")(ids))
    embedding = array(model.get_layer("embedding").embeddings).T
    want = array(x) @ (embedding if options else array(model.get_layer("head").kernel))
    want = 3.0 * np.tanh(want / 3.0) if options else want
    assert_close(got, want, 1e-5)
    features, _ = run(model, ids)
    assert_close(model.logits(features), want, 1e-5)
    assert bool(options) == ("head" not in [layer.name for layer in model.layers])


def test_patterns():
    def kinds(**options):
        stack = xLSTMStack(D, 6, num_heads=2, **options)
        return "".join(type(block).__name__[0] for block in stack.blocks)

    assert kinds() == "mmmmmm"
    assert kinds(pattern="2:1") == "mmsmms"
    assert kinds(pattern="0:1") == "ssssss"
    assert kinds(slstm_at=[5, 0]) == "smmmms"
    assert kinds(architecture="large") == "xxxxxx"
    same = {"kernel_initializer": keras.initializers.RandomNormal(seed=1)}
    stack = xLSTMStack(D, 2, num_heads=2, mlstm_options=same)  # one instance, every block its own
    assert len({array(block.up_projection.kernel).tobytes() for block in stack.blocks}) == 2
    stack = xLSTMStack(D, 2, num_heads=2, pattern="1:1", mlstm_options={"conv_kernel_size": 0})
    assert [len(block.state_names) for block in stack.blocks] == [3, 5]


@each
def test_packing_and_padding(kind, rng):
    """Documents packed into a row, or padded on either side, give what each gives alone."""
    model = model_of(kind, rng)
    ids = tokens(rng, 1, T)
    segments = np.array([[7, 7, 7, 7, 2, 2, 2, 2, 2, 2, 7]])
    packed = logits_of(model, {"token_ids": ids, "segment_ids": segments})
    for start, end in ((0, 4), (4, 10), (10, 11)):
        assert_close(packed[:, start:end], logits_of(model, ids[:, start:end]), 1e-5)
    for mask in (np.arange(T) < 6, np.arange(T) >= 5):
        padded = logits_of(model, {"token_ids": ids, "padding_mask": mask[None]})
        assert_close(padded[:, mask], logits_of(model, ids[:, mask]), 1e-5)


@each
def test_packed_training_is_training_on_the_documents(kind, rng):
    """One step of SGD: the same loss and the same new weights, so the same gradients."""
    documents = [(4, tokens(rng, 1, 4)), (7, tokens(rng, 1, 7))]
    ids = np.concatenate([d for _, d in documents], axis=1)
    segments = np.repeat([[0, 1]], [4, 7], axis=1)
    apart = np.zeros((2, 7), int), np.zeros((2, 7), bool)
    for row, (length, document) in enumerate(documents):
        apart[0][row, :length], apart[1][row, :length] = document[0], True
    results = []
    for inputs, y, weight in (
        ({"token_ids": ids, "segment_ids": segments}, ids, np.ones_like(ids)),
        ({"token_ids": apart[0], "padding_mask": apart[1]}, apart[0], apart[1]),
    ):
        keras.utils.set_random_seed(0)
        model = model_of(kind, np.random.default_rng(1))
        # The sum over tokens: a mean would be over the padding too.
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=jit(xla=kind == "paper"))
        history = model.fit(inputs, y, sample_weight=weight.astype("float32"), verbose=0).history
        results.append((history["loss"][0], [array(v) for v in model.trainable_variables]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert error(a, b) < 2e-5


def test_fits_saves_and_loads(rng, tmp_path):
    model = model_of("paper", dropout=0.1, embedding_dropout=0.1, mlstm_options={
        "kernel_initializer": keras.initializers.RandomNormal(stddev=0.1)
    })  # fmt: skip
    ids = tokens(rng)
    model.compile("adam", LOSS, jit_compile=jit())
    model.fit(ids, ids, verbose=0)
    inputs = {"token_ids": ids, "padding_mask": ids > 3, "segment_ids": np.zeros_like(ids)}
    model.fit(inputs, ids, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(loaded.predict(ids, verbose=0), model.predict(ids, verbose=0))
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of()
    other.load_weights(tmp_path / "model.weights.h5")
    want = model.predict(ids, verbose=0)
    np.testing.assert_allclose(other.predict(ids, verbose=0), want, atol=1e-5)
    paths = [v.path for v in model.weights]
    assert len(set(paths)) == len(paths)
    assert any(path.endswith("block_1/head_norm/gamma") for path in paths)
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "block_1" in "".join(lines)


def test_stack_in_a_functional_model(rng, tmp_path):
    """Any sequence in; a mask that Keras carries along is honoured, and goes on."""
    inputs = keras.Input((None, 3))
    x = keras.layers.Dense(D)(keras.layers.Masking()(inputs))
    stack = xLSTMStack(D, 2, num_heads=2, pattern="1:1", name="stack")
    x = stack(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x)))
    perturbed(model, rng)
    x = rng.normal(size=(B, T, 3)).astype("float32")
    x[:, 7:] = 0
    want = array(call(model, x[:, :7]))
    np.testing.assert_allclose(array(call(model, x)), want, atol=1e-5)
    model.compile("adam", "mse", jit_compile=jit())
    assert np.isfinite(model.fit(x, want, verbose=0).history["loss"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    sequences = rng.normal(size=(B, T, D)).astype("float32")
    first, state = run(stack, sequences[:, :5])
    second, _ = call(stack.run, sequences[:, 5:], state=state)
    whole = np.concatenate([array(first), array(second)], axis=1)
    assert_close(whole, array(call(stack, sequences)), 1e-5)


def test_sequences_come_first(rng):
    """Where Keras sees one tensor it takes it for the model's input, and `mask=` is its mask."""
    mask = np.arange(T)[None] < [[5], [11], [0], [8]]
    for model, x in (
        (xLSTMStack(D, 1, num_heads=2), rng.normal(size=(B, T, D)).astype("float32")),
        (xLSTMLanguageModel(V, D, 1, num_heads=2), tokens(rng)),
    ):
        assert [tensor.name for tensor in model.inputs] == [model._main]
        want = call(model, {model._main: x, "padding_mask": mask})
        got = call(model, x, mask=keras.ops.convert_to_tensor(mask))
        assert_close(array(got)[mask], array(want)[mask], 1e-6)


# ------------------------------------------------------------------------------------- generation


def slowly(model, prompt, count):
    """Greedy continuation by running the whole text again for each token."""
    text = list(prompt)
    for _ in range(count):
        padded = np.array([text + [0] * (30 - len(text))])  # one length: one compilation
        text.append(int(logits_of(model, padded)[0, len(text) - 1].argmax()))
    return text


@each
def test_greedy_generation(kind, rng):
    """Ragged prompts in one batch give what each gives alone, token by token without a state."""
    model = model_of(kind, rng)
    prompts = [[3], list(range(20)), [5, 4, 3]]
    got = model.generate(prompts, 6, temperature=0)
    assert [list(row) for row in got] == [slowly(model, p, 6) for p in prompts]
    streamed = np.stack(list(model.stream(prompts, 6, temperature=0)), axis=1)
    np.testing.assert_array_equal(streamed, [row[-6:] for row in got])
    assert [list(row) for row in model.generate(np.array([[1, 2]]), 0)] == [[1, 2]]
    # New weights, the same compiled functions.
    perturbed(model, rng)
    assert list(model.generate(prompts[2:], 3, temperature=0)[0]) == slowly(model, prompts[2], 3)


@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_replaced_weights_are_let_go(rng):
    """What generates does not hold the floating-point weights of a model that was quantized."""
    model = model_of("large", rng)
    model.generate([[1, 2]], 2)
    held = weakref.ref(model.get_layer("head").kernel)
    model.quantize("int8")
    model.generate([[1, 2]], 2)
    gc.collect()
    assert held() is None


def test_stop_token(rng):
    model = model_of("paper", rng)
    prompts = [[3], [5, 4, 3]]
    free = [list(row) for row in model.generate(prompts, 12, seed=3)]
    stop = int(free[0][4])
    got = [list(row) for row in model.generate(prompts, 12, seed=3, stop_token=stop)]
    for prompt, a, b in zip(prompts, got, free, strict=True):
        new = b[len(prompt) :]
        end = len(prompt) + (new.index(stop) + 1 if stop in new else len(new))
        assert a == b[:end]


def test_sampling(rng):
    """Draws follow the distribution that the options leave; a seed repeats them."""
    model = model_of("large")
    kernel = model.get_layer("head").kernel
    kernel.assign(rng.normal(size=kernel.shape))
    logits = array(model(np.array([[1, 2, 3]])))[0, -1].astype("float64")

    def frequencies(**options):
        drawn = np.concatenate(
            [row[3:] for row in model.generate([[1, 2, 3]] * 4000, 1, seed=0, **options)]
        )
        return np.bincount(drawn, minlength=V) / 4000

    def softmax(x):
        p = np.exp(x - x.max())
        return p / p.sum()

    p = softmax(logits / 2.0)
    np.testing.assert_allclose(frequencies(temperature=2.0), p, atol=0.03)
    order = np.argsort(-p)
    top = np.where(np.isin(np.arange(V), order[:3]), p, 0)
    np.testing.assert_allclose(frequencies(temperature=2.0, top_k=3), top / top.sum(), atol=0.03)
    count = int((np.cumsum(p[order]) < 0.6).sum()) + 1
    nucleus = np.where(np.isin(np.arange(V), order[:count]), p, 0)
    np.testing.assert_allclose(
        frequencies(temperature=2.0, top_p=0.6), nucleus / nucleus.sum(), atol=0.03
    )
    one, two = (model.generate([[1], [2, 3]], 8, seed=5, top_k=1) for _ in range(2))
    for a, b, c in zip(one, two, model.generate([[1], [2, 3]], 8, temperature=0), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_state_does_not_grow(rng):
    """The state after a long text is as large as after a short one."""
    model = model_of("paper", rng)
    sizes = []
    for length in (1, 300):
        _, state = run(model, tokens(rng, 1, length))
        sizes.append([tuple(s.shape) for s in keras.tree.flatten(state)])
    assert sizes[0] == sizes[1] == [
        tuple(s.shape) for s in keras.tree.flatten(model.get_initial_state(1))
    ]  # fmt: skip


# --------------------------------------------------------------------------- what users do to it


def test_lora(rng):
    model = model_of("paper", rng)
    ids = tokens(rng)
    before = model.predict(ids, verbose=0)
    model.enable_lora(2)
    np.testing.assert_allclose(model.predict(ids, verbose=0), before, atol=1e-6)
    assert {v.name for v in model.trainable_variables} == {"lora_kernel_a", "lora_kernel_b"}
    assert len(model.trainable_variables) == 8
    values = [array(v) for v in model.variables]
    model.compile("adam", LOSS, jit_compile=jit())
    model.fit(ids, ids, epochs=2, verbose=0)
    moved = {
        v.name for v, old in zip(model.variables, values, strict=True) if (array(v) != old).any()
    }
    assert moved == {"lora_kernel_a", "lora_kernel_b"}


@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_int8(rng, tmp_path):
    """Close to the float model; gates stay in float32; trains by LoRA; loads again."""
    model = model_of("large", rng)
    ids = tokens(rng)
    before = model.predict(ids, verbose=0)
    model.quantize("int8")
    after = model.predict(ids, verbose=0)
    assert error(after, before) < 0.2
    for block in model.blocks:
        assert block.input_gate.dtype_policy.name == "float32"
    assert model.blocks[0].value.dtype_policy.name == "int8_from_float32"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.jit_compile = jit()
    np.testing.assert_array_equal(loaded.predict(ids, verbose=0), after)
    model.enable_lora(2)
    model.compile("adam", LOSS, jit_compile=jit())
    assert np.isfinite(model.fit(ids, ids, verbose=0).history["loss"]).all()


def test_optimizer_options(rng):
    options = {
        "gradient_accumulation_steps": 2, "use_ema": True, "ema_momentum": 0.5, "weight_decay": 0.1,
    }  # fmt: skip
    model = model_of("paper", rng)
    ids = tokens(rng, 8, T)
    model.compile(keras.optimizers.Adam(0.01, **options), LOSS, jit_compile=jit())
    losses = model.fit(ids, ids, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("policy", "remat"), [("mixed_float16", False), ("mixed_bfloat16", True)])
def test_mixed_precision(policy, remat, rng):
    keras.config.set_dtype_policy(policy)
    model = model_of("paper", remat=remat, dropout=0.1)
    ids = tokens(rng)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=256)
    model.compile(optimizer if policy == "mixed_float16" else "adam", LOSS, jit_compile=jit())
    losses = model.fit(ids, ids, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    _, state = run(model, ids)
    assert {keras.backend.standardize_dtype(s.dtype) for s in keras.tree.flatten(state)} == {
        "float32"
    }
    assert len(model.generate([[1, 2]], 2)[0]) == 4


@each
def test_weight_decay(kind, rng):
    """With no gradient, a step shrinks kernels and leaves all else as it is."""
    model = model_of(kind, rng)
    optimizer = exclude_from_weight_decay(keras.optimizers.AdamW(0.1, weight_decay=0.1), model)
    before = [array(v) for v in model.trainable_variables]
    optimizer.apply([keras.ops.zeros(v.shape) for v in before], model.trainable_variables)
    for v, old in zip(model.trainable_variables, before, strict=True):
        shrunk = v.path.endswith("/kernel")
        np.testing.assert_allclose(array(v), old * (0.99 if shrunk else 1), rtol=1e-5)
    with pytest.raises(ValueError, match="must not be built"):
        exclude_from_weight_decay(optimizer, model)
    with pytest.raises(ValueError, match="decays nothing"):
        exclude_from_weight_decay(keras.optimizers.Adam(), model)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("options", "message"), [
    ({"num_blocks": 0}, "`num_blocks` must be a positive integer"),
    ({"slstm_at": [2]}, r"`slstm_at` must hold block indices from 0 to 1. Received: slstm_at=\[2\]"),
    ({"slstm_at": [-1]}, "`slstm_at` must hold"),
    ({"slstm_at": "1"}, "`slstm_at` must be a list"),
    ({"pattern": "7"}, "`pattern` must be \"a:b\".*pattern='7'"),
    ({"pattern": "0:0"}, "`pattern` must be"),
    ({"pattern": "1:1", "slstm_at": [1]}, "`pattern` and `slstm_at` both"),
    ({"architecture": "large", "pattern": "1:1"}, "mLSTM blocks alone"),
    ({"architecture": "huge"}, "`architecture` must be"),
    ({"num_heads": 3}, "`num_heads` of mLSTMBlock must divide"),
    ({"dropout": 2.0}, "`dropout` must be a number in"),
    ({"seed": "x"}, "`seed` must be an integer, or None"),
    ({"mlstm_options": {"taps": 1}}, "taps"),
    ({"units": -1}, "`units` must be a positive integer"),
    ({"vocabulary_size": 0}, "`vocabulary_size` must be a positive integer"),
    ({"logit_soft_cap": 0}, "`logit_soft_cap` must be a positive number"),
])  # fmt: skip
def test_bad_settings(options, message):
    given = {"vocabulary_size": V, "units": D, "num_blocks": 2, "num_heads": 2, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        xLSTMLanguageModel(**given)


def test_bad_calls(rng):
    with pytest.raises(
        ValueError, match="takes one tensor, or a dict with 'token_ids'.*\\['ids'\\]"
    ):
        model_of()({"ids": np.zeros((1, 2), int)})
    with pytest.raises(ValueError, match='"1:0" .mLSTM alone. and "7:1".*"2:1"|2:1'):
        configs.xlstm_125m("2:1")
    with pytest.raises(ValueError, match="83.68M, 90.11M, .*Received: name='400M'"):
        configs.scaling_law("400M")
    on_batch = ("train_on_batch", "test_on_batch", "predict_on_batch")
    for name in ("__call__", "predict", "fit", "evaluate", *on_batch):
        with pytest.raises(ValueError, match=f"from 0 to {V - 1}.*Received: ids from 1 to {V}"):
            getattr(model_of(), name)(np.array([[1, V]]))
        with pytest.raises(ValueError, match="must be integers. Received: dtype float64"):
            getattr(model_of(), name)({"token_ids": np.array([[1.5, 2]])})
    with pytest.raises(ValueError, match=f"from 0 to {V - 1}.*Received: ids from 1 to {V}"):
        model_of().run(np.array([[1, V]]), model_of().get_initial_state(1))
    segments = {"token_ids": np.array([[1, 2]]), "segment_ids": np.array([[0.0, 0.5]])}
    for name in ("__call__", "predict"):  # 0.5 is not 0
        with pytest.raises(ValueError, match="`segment_ids` must be integers.*dtype float"):
            getattr(model_of(), name)(segments)
    with pytest.raises(ValueError, match="`rank` must be"):
        model_of().enable_lora(0)
    for name in ("__call__", "predict"):
        with pytest.raises(ValueError, match="takes floating-point sequences. Received: dtype int"):
            getattr(xLSTMStack(D, 1, num_heads=2), name)(np.ones((1, 2, D), int))


@pytest.mark.parametrize(("arguments", "message"), [
    (([], 1), "`prompts` must be a list of at least one"),
    (("def", 1), "Tokenize text first"),
    (([[]], 1), "at least one integer token id.*prompt 0"),
    (([[1], [0.5]], 1), "prompt 1 of shape .1,. and dtype float64"),
    (([[1, V]], 1), f"from 0 to {V - 1}.*Received: {V} in prompt 0"),
    (([[-1]], 1), "Received: -1 in prompt 0"),
    (([[1]], -1), "`max_new_tokens` must be an integer >= 0. Received: max_new_tokens=-1"),
    (([[1]], 1, -0.5), "`temperature` must be"),
    (([[1]], 1, 1.0, 0), "`top_k` must be"),
    (([[1]], 1, 1.0, V + 1), "`top_k` must be"),
    (([[1]], 1, 1.0, None, 0.0), "`top_p` must be"),
    (([[1]], 1, 1.0, None, None, 1.5), "`seed` must be"),
    (([[1]], 1, 1.0, None, None, None, V), "`stop_token` must be"),
])  # fmt: skip
def test_bad_prompts_and_options(arguments, message):
    model = xLSTMLanguageModel(V, D, 1, num_heads=2)
    for method in (model.generate, model.stream):
        with pytest.raises(ValueError, match=message):
            method(*arguments)
