"""The native forms compiled by XLA where TensorFlow itself would run them op by op.

TensorFlow cannot differentiate a compiled function with a loop in it, so the forward and the
backward pass are compiled each by itself. They are traced once for all layers of a kind, and
compiled once for each shape that they meet.
"""

import functools
import operator

import tensorflow as tf
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
    """A function of `native` on (B, T, ...), compiled."""
    # Without a loop, TensorFlow differentiates what is compiled.
    step = tf.function(op, jit_compile=True, autograph=False)

    def run(x, *tensors, **options):
        if x.shape[1] == 1:
            return step(x, *tensors, **options)
        return op(x, *tensors, differentiable=_differentiable, **options)

    return run


def _differentiable(forward, backward, tensors, **options):
    """As the package's `differentiable`, with both passes compiled."""
    given = [tensor for tensor in tensors if tensor is not None]
    there = tuple(tensor is not None for tensor in tensors)
    passes = _passes(forward, backward, there, tuple(sorted(options.items())))

    @tf.custom_gradient
    def function(*given):
        # Or an eager tape would record the compiled pass, and try to differentiate it.
        stopped = [tf.stop_gradient(x) for x in given]
        outputs, kept = passes.forward(*stopped)

        def gradient(*output_gradients):
            def run(*output_gradients):
                return passes.backward(stopped, outputs, kept, output_gradients)

            return _undifferentiable(run, output_gradients, given)

        return outputs, gradient

    return function(*given)


def _undifferentiable(function, arguments, also):
    """function(*arguments), a list that may hold None; a derivative by these or `also`, on which
    it depends too, is an error."""
    there = []

    @tf.custom_gradient
    def run(*tensors):
        results = function(*(tf.stop_gradient(x) for x in tensors[: len(arguments)]))
        there[:] = [x is not None for x in results]

        def refuse(*_):
            raise NotImplementedError(
                "The xla implementation has no second derivatives. Received: the gradient of a "
                'gradient. Use keras_xlstm.backends.use("native").'
            )

        return [x for x in results if x is not None], refuse

    found = iter(run(*arguments, *also))
    return [next(found) if x else None for x in there]


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
