"""XLA for models of many equal blocks: one of each kind is compiled, the others run it with their
own weights.

Keras has XLA compile the whole step, and traces, lowers and compiles every block in it.
Here the step is a graph that calls two compiled functions for each kind of block. The backward one
TensorFlow makes from the forward one: the recurrences bring gradients of their own, so no loop is
left that it could not differentiate.
"""

import keras
import tensorflow as tf
from keras_xlstm.backends.tensorflow.tracing import exported_to

# What may differ between blocks that compute the same from the same tensors.
_MAY_DIFFER = ("name", "seed", "trainable", "block_index")


def block_runners(blocks, required=True):
    """They are always `required`: nothing is compiled unasked."""
    return {kind: _runner() for kind in {type(block) for block in blocks}}


def _runner():
    """A function of a block and the arguments of its `_run`; without `states`, which nobody reads
    then: their gradients are zeros, and XLA would add them up."""
    last = {}  # of equal blocks: any of them may be the one that is traced

    def compute(kind, trained, states, weights, arguments):
        # Else the backward pass would hold the gradients of frozen weights.
        weights = [w if t else tf.stop_gradient(w) for w, t in zip(weights, trained, strict=True)]
        with keras.StatelessScope(list(zip(last[kind].weights, weights, strict=True))):
            y, state = last[kind]._run(*arguments)
        return y, state if states else []

    compiled = tf.function(compute, jit_compile=True, autograph=False)

    def run(block, *arguments, states=True):
        if _better_plain(block, arguments[0]):
            return block._run(*arguments)
        kind = _kind(block)
        last[kind] = block
        trained = tuple(variable.trainable for variable in block.weights)
        # Not .value, which would cast them for the block's policy one by one.
        weights = [tf.convert_to_tensor(variable._value) for variable in block.weights]
        return compiled(kind, trained, states, weights, arguments)

    return run


def _better_plain(block, x):
    """Whether x (B, T, D) should not make XLA compile, or the block has effects beside its outputs,
    which a compiled function would lose."""
    return (
        tf.executing_eagerly()
        or exported_to() is not None
        or x.shape[1] == 1
        or any(
            layer.activity_regularizer is not None or layer.quantization_mode == "float8"
            for layer in block._flatten_layers(include_self=False)
        )
    )


def _kind(block):
    """All that a block's function depends on besides its weights and arguments."""
    configs = [
        {
            k: v
            for k, v in layer.get_config().items()
            if k not in _MAY_DIFFER and "initializer" not in k
        }
        for layer in block._flatten_layers()
    ]
    shapes = [(tuple(variable.shape), variable.dtype) for variable in block.weights]
    return repr((block._implementation, configs, shapes))
