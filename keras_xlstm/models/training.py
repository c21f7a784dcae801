"""How models of blocks compile: one block of each kind for all equal blocks."""

import contextlib
import functools
import inspect

import keras

from keras_xlstm import backends
from keras_xlstm.layers.block import run_plain
from keras_xlstm.layers.soft_cap import SoftCap, soft_cap


class BlockTraining:
    """What a `keras.Model` with `blocks` does about `compile`.

    All that `compile` leaves behind, besides Keras's own: `runner` of each block and of `SoftCap`,
    `_captured_step` here, `_token_losses` of the language model, and the method by which Adam and
    AdamW update weights (`fuse_optimizer` of backends/framework.py).
    """

    _captured_step = None  # on torch, the compiled training step
    _compiles_steps = False  # whether `compile` was asked to compile

    def compile(self, *args, **kwargs):
        """`keras.Model.compile`. On TensorFlow and torch, `jit_compile=True` compiles a block of
        each kind for all. On torch it also records the step as a CUDA graph, on a CUDA device: a
        step's memory stays its own, and Python beside the tensors is left out. There `"auto"` does
        the same where loss, metrics, optimizer and layers are Keras's and ours, and compiles blocks
        where a C++ compiler is found; False does neither. On TensorFlow, what is around the blocks
        runs as a graph, and Adam's update is one operator."""
        super().compile(*args, **kwargs)
        given = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs).arguments
        required = self._compiles_steps = given.get("jit_compile") is True
        captures, compiles = self._compilation(given)
        if compiles:
            self.jit_compile = False
        self._captured_step = None
        if captures:
            self._captured_step = backends.captured_train_step(self, compiles, required)
        backends.fuse_optimizer(self.optimizer, captures)
        runners = backends.block_runners(self.blocks, required) if compiles else {}
        for block in self.blocks:
            block.runner = runners.get(type(block), run_plain)
        for layer in self.layers:
            if isinstance(layer, SoftCap):
                layer.runner = self._captured_step.compiled(soft_cap) if captures else soft_cap

    def _compilation(self, given):
        """Whether the step is captured, and whether blocks are compiled."""
        if backends.block_runners is None:
            return False, False
        asked = given.get("jit_compile", "auto")
        if asked == "auto" and backends.default_compilation is not None:
            # Keras's own word for it there is False, which a file would say.
            self._compile_config.config["jit_compile"] = "auto"
            return backends.default_compilation(self, given)
        compiles = bool(self.jit_compile)
        return compiles and backends.captured_train_step is not None, compiles

    @contextlib.contextmanager
    def _run_by(self, runners=None):
        """Inside, each block runs by one of these; without them, as if it were not compiled."""
        blocks = self.blocks
        before = [block.runner for block in blocks]
        try:
            for block, runner in zip(blocks, runners or [run_plain] * len(blocks), strict=True):
                block.runner = runner
            yield
        finally:
            for block, runner in zip(blocks, before, strict=True):
                block.runner = runner

    def export(self, *args, **kwargs):
        """`keras.Model.export`, of the model with its main input alone, unless `input_signature`
        is a dict that names the others."""
        with self._run_by():
            return super().export(*args, **kwargs)

    def stateless_call(self, *args, **kwargs):
        """`keras.Model.stateless_call`."""
        with self._run_by():  # they read the variables' own values
            return super().stateless_call(*args, **kwargs)

    def make_train_function(self, *args, **kwargs):
        """`keras.Model.make_train_function`: `fit` and `train_on_batch` begin with it."""
        if self._captured_step is not None:
            self._captured_step.look_again()
        return super().make_train_function(*args, **kwargs)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        if self._captured_step is None:
            return super().fit(*args, **kwargs)
        with self._captured_step.feeding():
            return super().fit(*args, **kwargs)

    def train_step(self, *arguments):
        """`keras.Model.train_step`."""
        if self._captured_step is None:
            return super().train_step(*arguments)
        with self._captured_step.not_feeding():
            return self._captured_step(super().train_step, *arguments)

    def test_step(self, *arguments):
        """`keras.Model.test_step`."""
        with self._not_feeding():
            return super().test_step(*arguments)

    def predict_step(self, *arguments):
        """`keras.Model.predict_step`."""
        with self._not_feeding():
            return super().predict_step(*arguments)

    def _not_feeding(self):
        captured = self._captured_step
        return contextlib.nullcontext() if captured is None else captured.not_feeding()

    def compile_from_config(self, config):
        """What `keras.models.load_model` calls; Keras's own refuses where `compile` is not its."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)
