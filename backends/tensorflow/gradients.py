"""Gradients that are written by hand, and those of them: second derivatives.

TensorFlow would differentiate a hand-written backward pass by what it reads, and in eager calls
leave out how that depends on the inputs: a wrong number, silently.
"""

import tensorflow as tf
from keras_xlstm.backends.tensorflow import tracing


def plain(forward, there, options):
    """A native forward pass made of TensorFlow's own operators, as a function of the tensors that
    are `there`."""

    def function(*given):
        found = iter(given)
        tensors = [next(found) if x else None for x in there]
        with tracing.differentiated():
            return forward(*tensors, **options, keep=False, plain=True)[0]

    return function


def gradients(run, plain, output_gradients, given):
    """run(*output_gradients): the gradients by `given`, some of them None. Where they are
    differentiated again, it is `plain(*given)` that is, or with None an error."""
    there, count = [], len(output_gradients)

    @tf.custom_gradient
    def function(*tensors):
        results = run(*map(tf.stop_gradient, tensors[:count]))
        there[:] = [x is not None for x in results]

        def second(*upstream):
            if plain is None:
                raise NotImplementedError(
                    "The xla implementation has no second derivatives where it is asked for by "
                    "name. Received: the gradient of a gradient. Use implementation=None, "
                    'use_kernel="auto" or keras_xlstm.backends.use("native").'
                )
            with tf.GradientTape() as tape:
                tape.watch(_floats(tensors))
                first = _first(plain, tensors[count:], tensors[:count])
                first = [x for x, is_there in zip(first, there, strict=True) if is_there]
            return _by(tape, first, tensors, upstream)

        # Nothing but `tensors`: what a backward pass reads depends on the inputs, too.
        return [tf.stop_gradient(x) for x in results if x is not None], second

    found = iter(function(*output_gradients, *given))
    return [next(found) if x else None for x in there]


def _first(plain, given, output_gradients):
    with tf.GradientTape() as tape:
        tape.watch(_floats(given))
        outputs = plain(*given)
    return _by(tape, outputs, given, output_gradients)


def _floats(tensors):
    return [x for x in tensors if x.dtype.is_floating]


def _by(tape, outputs, tensors, output_gradients):
    """The gradients by `tensors`, None by flags and ids."""
    zero = tf.UnconnectedGradients.ZERO
    found = iter(tape.gradient(outputs, _floats(tensors), output_gradients, zero))
    return [next(found) if x.dtype.is_floating else None for x in tensors]
