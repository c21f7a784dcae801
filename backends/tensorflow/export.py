"""What TensorFlow's converter to LiteRT is told."""

import contextlib

import tensorflow as tf
from keras_xlstm.backends.tensorflow.tracing import unrolled


@contextlib.contextmanager
def litert():
    """Options for `model.export`, and no loops while it traces.

    Without TensorFlow's own operators, which LiteRT's interpreter does not have: an error of the
    converter in place of a file that does not run.
    """
    with unrolled():
        yield {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
