"""Callbacks for `fit` of any Keras model."""

import keras

from keras_xlstm import backends


class CapturedTraining(keras.callbacks.Callback):
    """Trains any Keras model by a CUDA graph: on PyTorch with a CUDA device.

    There Keras runs a step one kernel at a time, which for small models takes Python several times
    as long as it takes the GPU. With this callback the first two steps of a batch's shapes run so.
    The third is recorded, and from then on the recording runs. It needs no C++ compiler.

    `xLSTMStack` and `xLSTMLanguageModel` do the same without it. On JAX and TensorFlow, where Keras
    compiles the step, and without a CUDA device it does nothing.

    A recording repeats what Python did once: a custom layer, loss or metric must not change what it
    computes from step to step by numbers that Python holds. Use variables for them. Steps with
    `keras.layers.Dropout`, a `LossScaleOptimizer` or `gradient_accumulation_steps` cannot be
    recorded. They run as without the callback, and the logger `keras_xlstm` says why.

    Example:

    >>> layers = [keras.Input((20, 3)), keras_xlstm.layers.sLSTM(32), keras.layers.Dense(1)]
    >>> model = keras.Sequential(layers)
    >>> model.compile("adam", "mse")
    >>> x, y = np.random.normal(size=(64, 20, 3)), np.random.normal(size=(64, 1))
    >>> capture = keras_xlstm.callbacks.CapturedTraining()
    >>> _ = model.fit(x, y, callbacks=[capture], verbose=0)
    """

    _of = _step = None

    def on_train_begin(self, logs=None):
        model = self.model
        done = model.jit_compile or getattr(model, "_captured_step", None) is not None
        if done or backends.captured_train_step is None:
            return
        of = model, model.optimizer, model._compile_loss, model._compile_metrics
        if self._of is None or any(a is not b for a, b in zip(of, self._of, strict=True)):
            self._of, self._step = of, backends.captured_train_step(model)
        self._step.look_again()
        step, plain = self._step, type(model).train_step.__get__(model)

        def train_step(*arguments):
            try:
                return step(plain, *arguments)
            except BaseException:  # then nobody calls on_train_end
                self.on_train_end()
                raise

        model.__dict__["train_step"] = train_step

    def on_train_end(self, logs=None):
        self.model.__dict__.pop("train_step", None)
