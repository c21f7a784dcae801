"""PyTorch: a training step, replayed as a CUDA graph.

Without a GPU a stand-in for the graph runs the step again, and nothing is compiled.
"""

import gc
import weakref

import numpy as np
import pytest
from tools import BACKEND, RefusedGraph, stand_in_for_cuda

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import keras
import torch
from keras_xlstm.backends.torch import compile_blocks, cuda_graph, train_step

from keras_xlstm.callbacks import CapturedTraining
from keras_xlstm.layers import mLSTM, sLSTM
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

GPU = torch.cuda.is_available()
IDS = np.random.default_rng(0).integers(0, 9, (11, 9), dtype="int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model_of(optimizer="adam", jit_compile=True, metrics=(), **options):
    keras.utils.set_random_seed(0)
    options = {"num_heads": 2, "architecture": "large", "logit_soft_cap": 3.0, **options}
    model = xLSTMLanguageModel(9, 8, 1, **options)
    model.compile(optimizer, LOSS, metrics=list(metrics), jit_compile=jit_compile)
    return model


def fitted(model, **options):
    options = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    return model.fit(IDS[:, :-1], IDS[:, 1:], **options).history


def same(model, other, rtol=1e-4):
    for a, b in zip(model.weights, other.weights, strict=True):
        a, b = (keras.ops.convert_to_numpy(v) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5, err_msg=str(b.shape))


@pytest.fixture
def recordings(monkeypatch):
    """All recordings that are made, on a GPU real ones, which what cannot be recorded ends."""
    made = []
    run = cuda_graph.CapturedGraph._run

    def recorded(self, function, inputs):
        if GPU:
            run(self, function, inputs)
            return made.append(self)
        made.append(self)
        # What is recorded does not run.
        self._outputs = {"loss": torch.full((), float("nan"))}
        self._graph.replay = lambda: run(self, torch.enable_grad()(function), inputs)

    monkeypatch.setattr(cuda_graph.CapturedGraph, "_run", recorded)
    if not GPU:
        monkeypatch.setattr(torch, "compile", lambda function: function)
        stand_in_for_cuda(monkeypatch, train_step)
        monkeypatch.setattr(train_step, "_sent", lambda x, device: x)
    return made


def decaying():
    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5))


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, clipnorm=1.0),
    "average": lambda: keras.optimizers.AdamW(0.01, use_ema=True),
    "schedule": decaying,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recording_trains_as_keras_does(optimizer, recordings):
    """Losses, metrics and weights; the last batch of an epoch is shorter and never recorded."""
    want, model = (
        model_of(OPTIMIZERS[optimizer](), jit_compile, metrics=["accuracy"])
        for jit_compile in (False, True)
    )
    weights = np.linspace(0, 1, 88, dtype="float32").reshape(11, 8)
    histories = [fitted(m, sample_weight=weights) for m in (want, model)]
    assert histories[0].keys() == histories[1].keys() == {"loss", "accuracy"}
    for key in histories[0]:
        np.testing.assert_allclose(*(h[key] for h in histories), rtol=1e-4)
    same(want, model)
    assert len(recordings) == 1


def test_a_rate_that_is_set_and_weights_that_move(recordings):
    models = model_of("sgd", jit_compile=False), model_of("sgd")
    for model in models:
        fitted(model)
        model.optimizer.learning_rate = 0.1
        fitted(model, epochs=1)
    assert len(recordings) == 2  # by now the short batch too
    for model in models:
        model.optimizer.clipvalue = 1e-3  # a number that Python holds
        fitted(model)
    assert len(recordings) == 3
    same(*models)
    for model in models:
        kernel = model.get_layer("head").kernel
        kernel.value.data = kernel.value.data.clone()  # elsewhere in memory
        model.get_layer("embedding").trainable = False
        fitted(model)
    assert len(recordings) == 4
    same(*models)


def test_lengths_beyond_the_recordings_kept(recordings):
    models = model_of(jit_compile=False), model_of()
    for length in (4, 5, 6, 7, 4):
        for model in models:
            x = IDS[:8, : length + 1]
            model.fit(x[:, :-1], x[:, 1:], batch_size=2, verbose=0, shuffle=False)
    assert len(recordings) == train_step._KEPT
    same(*models)


def test_a_stack(recordings, rng):
    x, y = rng.normal(size=(8, 5, 8)), rng.normal(size=(8, 5, 8))
    found = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = xLSTMStack(8, 2, num_heads=2, pattern="1:1")
        model.compile("adam", "mse", jit_compile=jit_compile)
        fit = model.fit(x, y, batch_size=2, epochs=2, verbose=0, shuffle=False)
        found.append(fit.history["loss"])
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert len(recordings) == 1


@pytest.mark.skipif(GPU, reason="asks for a device that is not there")
def test_batches_are_sent_ahead(monkeypatch):
    """Inside `fit`, and in nothing that it runs."""
    model, sent = model_of(), []
    monkeypatch.setattr(train_step, "_sent", lambda x, device: sent.append((x, device.type)) or x)
    step, ids = model._captured_step, np.arange(3, dtype="int32")

    def asked():
        return torch.as_tensor(ids, dtype=torch.int64, device="cuda")

    with step.feeding():
        with step.feeding():  # validation in between
            assert asked().dtype == torch.int64
        torch.as_tensor(ids)
        torch.as_tensor([1.0])
        with step.not_feeding(), pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            asked()
        asked()
    assert [(x.tolist(), kind) for x, kind in sent] == [([0, 1, 2], "cuda")] * 2
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        asked()


class Deciding(keras.optimizers.SGD):
    """Reads a gradient on the host, as no recorded step can."""

    def update_step(self, gradient, variable, learning_rate):
        if float(gradient.sum()) == float("inf"):
            raise ValueError("too large")
        super().update_step(gradient, variable, learning_rate)


def test_what_cannot_be_recorded_runs_as_it_is(recordings, monkeypatch, caplog):
    if not GPU:
        monkeypatch.setattr(torch.cuda, "graph", RefusedGraph)
    want, model = (model_of(Deciding(0.01), jit_compile) for jit_compile in (False, True))
    stream = torch.cuda.current_stream()
    with caplog.at_level("INFO", "keras_xlstm"):
        losses = [fitted(m)["loss"] for m in (want, model)]
    assert torch.cuda.current_stream() == stream
    np.testing.assert_allclose(*losses, rtol=1e-4)
    same(want, model)
    assert caplog.text.count("no CUDA graph could be made. ") == 1
    # PyTorch's generator is not as if in a recording still.
    ones = torch.ones(8, device=want.weights[0].value.device)
    assert torch.nn.functional.dropout(ones).shape == (8,)


@pytest.mark.parametrize("case", ["dropout", "accumulation", "scaled"])
def test_what_decides_on_the_host(case, recordings, caplog):
    losses = []
    for jit_compile in (False, True):
        steps = 2 if case == "accumulation" else None
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=steps)
        if case == "scaled":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model = model_of(optimizer, jit_compile, dropout=0.1 * (case == "dropout"), seed=1)
        with caplog.at_level("INFO", "keras_xlstm"):
            losses.append(fitted(model)["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert not recordings
    assert caplog.text.count("no CUDA graph could be made. The ") == 1


def test_dropout_without_a_seed_is_drawn_in_every_replay(recordings):
    model = model_of(keras.optimizers.SGD(0.0), dropout=0.5)
    losses = fitted(model, epochs=6, batch_size=11)["loss"]
    assert len(recordings) == 1
    assert len(set(losses)) == 6


def own_loss(y, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)


class OwnModel(xLSTMLanguageModel):
    pass


@pytest.mark.parametrize("compiler", [False, True])
def test_by_default(compiler, recordings, monkeypatch, caplog, tmp_path):
    """What is Keras's and ours is recorded without being asked for; a file does not say "no"."""
    monkeypatch.setattr(train_step, "_has_compiler", lambda: compiler)
    want = model_of(jit_compile=False, metrics=["accuracy"])
    with caplog.at_level("INFO", "keras_xlstm"):
        model = model_of(jit_compile="auto", metrics=["accuracy"])
    assert f"blocks are {'' if compiler else 'not '}compiled" in caplog.text
    fitted(want), fitted(model)
    assert len(recordings) == 1
    same(want, model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (loaded, model):
        fitted(each, epochs=1)
    assert len(recordings) == 3  # of the first one the short batch, too
    same(loaded, model)


@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_a_compiler_that_fails(jit_compile, recordings, monkeypatch, caplog):
    """Only what was asked for is an error."""

    def compile(function):
        def run(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("no such header")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(train_step, "_has_compiler", lambda: True)
    model = model_of(jit_compile=jit_compile)
    if jit_compile is True:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            fitted(model)
        return
    fitted(model)
    assert caplog.text.count("torch.compile failed. no such header") == 3  # block, loss, soft cap
    assert len(recordings) == 1
    want = model_of(jit_compile=False)
    fitted(want)
    same(want, model)


def test_a_compiler_that_fails_keeps_no_tensors(caplog):
    """Gradient nodes from before a recording would end it on a GPU."""

    def fails(x):
        raise torch._dynamo.exc.TorchDynamoException("no such header")

    x = torch.ones(3, requires_grad=True)
    y, tried = 2 * x, compile_blocks.or_plain(fails, torch.sum, False)
    kept = weakref.ref(y)
    assert tried(y) == 6
    assert "no such header" in caplog.text
    del y
    gc.collect()
    assert kept() is None


OWN = {
    "loss": ({"loss": own_loss}, {}),
    "wrapped loss": ({"loss": keras.losses.MeanSquaredError()}, {}),
    "metric": ({"loss": LOSS, "metrics": [own_loss]}, {}),
    "eager": ({"loss": LOSS, "run_eagerly": True}, {}),
    "no": ({"loss": LOSS, "jit_compile": False}, {}),
    "model": ({"loss": LOSS}, {"kind": OwnModel}),
}


@pytest.mark.parametrize("case", OWN)
def test_a_users_own_code_is_not_recorded_unasked(case, recordings, caplog):
    arguments, options = OWN[case]
    if case == "wrapped loss":
        arguments = {"loss": keras.losses.get(own_loss)}
    kind = options.get("kind", xLSTMLanguageModel)
    model = kind(9, 8, 1, num_heads=2, architecture="large")
    with caplog.at_level("INFO", "keras_xlstm"):
        model.compile("adam", **arguments)
    fitted(model)
    assert not recordings
    assert ("is code of your own" in caplog.text) == (case not in ("eager", "no"))


def test_a_function_of_pytorch_is_no_fault():
    assert not train_step._is_known(torch.dist)  # which has no attributes of its own


@pytest.mark.parametrize("case", ["layers", "stack", "subclass"])
def test_any_keras_model_by_a_callback(case, recordings, rng):
    x, y = rng.normal(size=(11, 5, 8)), rng.normal(size=(11, 1))

    class Subclassed(keras.Model):
        def __init__(self, layers):
            super().__init__()
            self.parts = layers

        def call(self, x):
            for part in self.parts:
                x = part(x)
            return x

    def built():
        keras.utils.set_random_seed(0)
        layers = [sLSTM(4, return_sequences=True), mLSTM(4)]
        if case == "stack":
            layers = [xLSTMStack(8, 2, num_heads=2), keras.layers.GlobalAveragePooling1D()]
        layers.append(keras.layers.Dense(1))
        if case == "subclass":
            return Subclassed(layers)
        return keras.Sequential([keras.Input((5, 8)), *layers])

    callback = CapturedTraining()
    want, model = built(), built()
    for each, callbacks in ((want, []), (model, [callback])):
        each.compile("adam", "mse", metrics=["mae"])
        for _ in range(2):
            options = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
            each.fit(x, y, callbacks=callbacks, **options)
    same(want, model)
    assert len(recordings) == 2  # the short batch in the second `fit`
    assert "train_step" not in vars(model)
    for each in (want, model):
        each.compile("sgd", "mae")
        each.fit(x, y, callbacks=[] if each is want else [callback], batch_size=2, epochs=2,
                 shuffle=False, verbose=0)  # fmt: skip
    assert len(recordings) == 3
    same(want, model)


def test_a_step_that_fails_leaves_the_model_as_it_was(recordings, monkeypatch):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    def interrupted(self, step, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_step.CapturedTrainStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0, callbacks=[CapturedTraining()])
    assert "train_step" not in vars(model)


def test_what_earlier_steps_left_is_gone_before_a_recording(recordings, monkeypatch):
    """Keras's cycles keep nodes of the autograd graph, of another stream than the recording's."""

    class Left:
        pass

    left = Left()
    left.cycle, alive = left, weakref.ref(left)
    del left
    gc.disable()
    try:
        fitted(model_of())
    finally:
        gc.enable()
    assert len(recordings) == 1
    assert alive() is None


def test_a_callback_has_nothing_to_add(recordings):
    model = model_of()
    fitted(model, callbacks=[CapturedTraining()])
    assert len(recordings) == 1


def stacked():
    layers = [keras.Input((8, 8)), xLSTMStack(8, 2, num_heads=2, pattern="1:1")]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling1D()])
    model.compile("adam", "mse", metrics=["mae"])
    x = np.zeros((8, 8, 8), "float32")
    model.fit(x, x[:, 0], batch_size=2, verbose=0, callbacks=[CapturedTraining()])


@pytest.mark.skipif(GPU, reason="there the recording itself refuses what would")
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion", "stack"])
def test_nothing_comes_from_the_host(optimizer, recordings, monkeypatch):
    """A copy from the host is what a CUDA graph refuses first, a number for it the second."""
    copied = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in ("as_tensor", "tensor", "from_numpy", "item", "tolist", "nonzero", "cpu"):
                if not isinstance(args[0], torch.Tensor) or name != "as_tensor":
                    copied.append(name)
            if isinstance((kwargs or {}).get("alpha"), torch.Tensor):
                copied.append(name)
            return func(*args, **(kwargs or {}))

    def watched(function):
        def run(*arguments):
            with Watch():
                return function(*arguments)

        return run

    for name in ("_run", "replay"):  # a graph is made by the one, the stand-in runs in the other
        monkeypatch.setattr(
            cuda_graph.CapturedGraph, name, watched(getattr(cuda_graph.CapturedGraph, name))
        )
    stacked() if optimizer == "stack" else fitted(model_of(optimizer))
    assert len(recordings) == 1
    assert not copied


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_adam_is_keras_own(dtype, rng):
    """With the moments' bias corrected where Keras corrects it: epsilon is large here."""
    kinds = {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.3}
    found = []
    for fused in (False, True):
        weights = [keras.Variable(np.linspace(-1, 1, n), dtype=dtype) for n in (5, 7)]
        optimizer = keras.optimizers.AdamW(**kinds, weight_decay=0.1, clipvalue=0.7)
        optimizer.build(weights)
        if fused:
            train_step.fuse_optimizer(optimizer, captured=True)
            assert isinstance(optimizer._parallel_update_step, train_step._FusedAdam)
        draws = np.random.default_rng(3)
        for _ in range(5):
            gradients = [torch.tensor(draws.normal(size=v.shape)).to(v.value) for v in weights]
            optimizer.apply(gradients, weights)
        found.append(np.concatenate([keras.ops.convert_to_numpy(v) for v in weights]))
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-7)


def test_what_is_not_fused():
    for optimizer in (keras.optimizers.SGD(), keras.optimizers.Adam(amsgrad=True)):
        own = optimizer._parallel_update_step
        train_step.fuse_optimizer(optimizer, captured=True)
        assert optimizer._parallel_update_step == own
