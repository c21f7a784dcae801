"""Products and sums that XLA on CPUs, or a converter, would not do well."""

import math

import keras
import tensorflow as tf
from keras_xlstm.backends.tensorflow.tracing import exported_to, for_xla
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier


def total(x, axis):
    """tf.reduce_sum over the last axis, the one before it, or both. In graphs on CPUs a product
    with ones: XLA adds what lies side by side number by number. (On a GPU TF32 would round it, and
    LiteRT's converter loses track of the shape.)"""
    axes = 1 if axis == -1 else 2
    on_gpu = tf.config.list_physical_devices("GPU")
    plain = tf.executing_eagerly() or on_gpu or exported_to() is not None
    if plain or None in x.shape[-axes:]:
        return tf.reduce_sum(x, axis)
    if axis == -2:
        ones = tf.ones([*[1] * (len(x.shape) - 1), x.shape[-2]], x.dtype)
        return tf.matmul(ones, x)[..., 0, :]
    count = math.prod(x.shape[-axes:])
    sums = tf.matmul(tf.reshape(x, [-1, count]), tf.ones([count, 1], x.dtype))
    sums = tf.reshape(sums, tf.shape(x)[:-axes])
    sums.set_shape(x.shape[:-axes])
    return sums


def turned(x):
    """x with its last two axes swapped, to be multiplied by something on the right. XLA on CPUs
    takes half as long for a product whose first operand is turned before it."""
    x = keras.ops.swapaxes(x, -1, -2)
    return optimization_barrier(x)[0] if for_xla() else x


def activated(activation, x):
    # TensorFlow's gelu is by erfc, which tf2onnx hands on to ONNX, where there is none.
    if activation is keras.activations.gelu and exported_to() == "onnx":
        return 0.5 * x * (1.0 + tf.math.erf(x * 0.5**0.5))
    return activation(x)
