"""What a call of a model of blocks gives beside its sequences: a padding mask, segment ids."""

import contextvars

import keras

SIDE = contextvars.ContextVar("keras_xlstm_side_inputs", default=(None, None))


@keras.saving.register_keras_serializable(package="keras_xlstm")
class SideInputs(keras.Operation):
    """For a block, the padding mask and the segment ids of the call that is running, or None.

    Not `keras.Input(optional=True)`: models made of a part of the graph, and clones, would ask for
    all inputs. The argument only gives it a place in the graph.
    """

    def rematerialized_call(self, call, *args, **kwargs):
        return call  # under keras.RematScope there is nothing to compute again

    def call(self, x):
        return list(SIDE.get())

    def compute_output_spec(self, x):
        return [keras.KerasTensor(x.shape[:2], dtype=dtype) for dtype in ("bool", "int32")]
