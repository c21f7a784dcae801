"""The native forms compiled by XLA where TensorFlow itself would run them op by op.

TensorFlow cannot differentiate a compiled function with a loop in it, so the forward and the
backward pass are compiled each by itself. They are traced once for all layers of a kind, and
compiled once for each shape that they meet.
"""

import functools
import operator

import tensorflow as tf
from keras_xlstm.backends.tensorflow import gradients
from keras_xlstm.backends.tensorflow.tracing import by_xla, exported_to


def unsupported():
    """Why XLA cannot run in what is being traced, or None."""
    if exported_to() not in (None, "tf_saved_model"):
        return "of exported files a SavedModel alone can hold what XLA compiles"
    return None


def not_preferred(x):
    """Why TensorFlow had better run the native form on x (B, T, ...) op by op, or None."""
    if exported_to() is not None:
        return "it is exported, and a file is to run where XLA is not"
    if x.shape[1] is None:
        return "the length is unknown while it is traced, and XLA compiles for every length"
    if x.shape[1] == 1:
        return "it is a single step, without a loop to compile"
    if tf.executing_eagerly():
        return "it is called eagerly, and XLA compiles for every shape"
    return None


def compiled(op):
    """The function `op` of native forms, on (B, T, ...), compiled. `twice`: TensorFlow may ask for
    second derivatives, of the native form; otherwise they are an error."""
    # Without a loop, TensorFlow differentiates what is compiled.
    step = tf.function(op, jit_compile=True, autograph=False)

    def run(x, *tensors, twice=False, **options):
        if x.shape[1] == 1:
            return step(x, *tensors, **options)
        differentiable = functools.partial(_differentiable, twice)
        return op(x, *tensors, differentiable=differentiable, **options)

    return run


def _differentiable(twice, forward, backward, tensors, **options):
    """As the package's `differentiable`, with both passes compiled."""
    given = [tensor for tensor in tensors if tensor is not None]
    there = tuple(tensor is not None for tensor in tensors)
    passes = _passes(forward, backward, there, tuple(sorted(options.items())))

    plain = gradients.plain(forward, there, options) if twice else None

    @tf.custom_gradient
    def function(*given):
        # Or an eager tape would record the compiled pass, and try to differentiate it.
        stopped = [tf.stop_gradient(x) for x in given]
        outputs, kept = passes.forward(*stopped)

        def gradient(*output_gradients):
            def run(*output_gradients):
                return passes.backward(stopped, outputs, kept, output_gradients)

            return gradients.gradients(run, plain, output_gradients, given)

        return outputs, gradient

    return function(*given)


@functools.cache
def _passes(forward, backward, there, options):
    return _Passes(forward, backward, there, dict(options))


class _Passes:
    """The two compiled passes of one function, for one set of options and of tensors there.

    What the backward pass reads and is an input or an output already is not returned a second
    time: XLA would copy it.
    """

    def __init__(self, forward, backward, there, options):
        self._forward, self._backward = forward, backward
        self._there, self._options = there, options
        self._residuals = None  # their structure: how to get each one from the tensors at hand
        self.forward = tf.function(self._run_forward, jit_compile=True, autograph=False)
        self.backward = tf.function(self._run_backward, jit_compile=True, autograph=False)

    def _run_forward(self, *given):
        rest = iter(given)
        tensors = [next(rest) if there else None for there in self._there]
        with by_xla():
            outputs, residuals = self._forward(*tensors, **self._options)
        at_hand = [*given, *outputs]
        places = {id(x): place for place, x in enumerate(at_hand)}

        def getter(x):
            if not tf.is_tensor(x):
                return lambda at_hand: x
            if id(x) not in places:
                places[id(x)] = len(at_hand)
                at_hand.append(x)
            return operator.itemgetter(places[id(x)])

        self._residuals = tf.nest.map_structure(getter, residuals)
        return outputs, at_hand[len(given) + len(outputs) :]

    def _run_backward(self, given, outputs, kept, output_gradients):
        at_hand = [*given, *outputs, *kept]
        residuals = tf.nest.map_structure(lambda get: get(at_hand), self._residuals)
        with by_xla():
            gradients = self._backward(residuals, output_gradients, **self._options)
        return [g for g, there in zip(gradients, self._there, strict=True) if there]
