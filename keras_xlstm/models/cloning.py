"""`keras.models.clone_model` of our models: the class stays, with its methods and settings."""

import functools
import inspect

import keras

from keras_xlstm.layers.block import Block
from keras_xlstm.models.stack import StackModel


def register():
    """Has Keras clone our models as what they are.

    It makes a plain functional model of each whose constructor does not take inputs and outputs,
    and asks no method of the model. So the function that `clone_model` calls is wrapped, for our
    models alone; where a Keras has none of that name, clones are what Keras makes of them.
    """
    names = inspect.unwrap(keras.models.clone_model).__globals__
    of_keras = names.get("_clone_functional_model")
    if of_keras is None or hasattr(of_keras, "__wrapped__"):
        return

    @functools.wraps(of_keras)
    def clone(model, clone_function, input_tensors=None, call_function=None):
        if not isinstance(model, StackModel):
            return of_keras(model, clone_function, input_tensors, call_function)
        return _clone(model, clone_function, input_tensors, call_function)

    names["_clone_functional_model"] = clone


def _clone(model, clone_function, input_tensors, call_function):
    inputs = input_tensors
    if inputs is None:
        [x] = model.inputs
        inputs = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
    outputs = model._run_through_graph(inputs, operation_fn=clone_function, call_fn=call_function)
    plain = keras.Model(inputs, outputs, name=model.name)
    names = [block.name for block in model.blocks]
    blocks = [layer for layer in plain.layers if layer.name in names and isinstance(layer, Block)]
    # `clone_function` may have put something else in the place of blocks: then it is none of ours.
    new = model.with_graph(inputs, outputs) if len(blocks) == len(names) else plain
    if model.compiled:
        new.compile_from_config(model.get_compile_config())
    return new
