"""What the native forms need from TensorFlow: scans, and a function with a gradient of its own."""

import contextlib
import contextvars
import math

import keras
import tensorflow as tf
from keras_xlstm.backends import export_context, sizes
from keras_xlstm.backends.tensorflow.adam import fuse  # noqa: F401
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = tf.tanh, tf.maximum, tf.reduce_max
minimum, cumsum = tf.minimum, tf.cumsum
swapaxes, exp = keras.ops.swapaxes, tf.exp
# AutoGraph cannot rewrite all of our Python, and says so in a warning.
no_autograph = tf.autograph.experimental.do_not_convert
split_gate_and_up = False  # as on JAX
# Whether sum(x * y) is one pass over x, so that a product with a vector y is slower.
fuses_row_sums = False
# Modules here: of each implementation, by op; the first that fits is picked.
implementations = {"xla": {"mlstm": "mlstm", "slstm": "slstm"}}
compiles_blocks = True  # as on torch
captures_steps = False
_unrolled = contextvars.ContextVar("keras_xlstm_unrolled", default=False)
_by_xla = contextvars.ContextVar("keras_xlstm_by_xla", default=False)


def host_values(x):
    """As `backends.host_values`."""
    eager = isinstance(x, tf.Tensor) and hasattr(x, "numpy")
    return x.numpy() if eager and "GPU" not in x.device else None


def _on_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


def chunk_size(key_dim, value_dim, time):
    """As `sizes.chunk_size`; 64 steps on a GPU."""
    return 64 if _on_gpu() else sizes.chunk_size(key_dim, value_dim, time)


def multiplies_inside(batch, time, features, units):
    """As `sizes.multiplies_inside`; not on a GPU, nor for an unknown length. An unknown batch is
    taken as Keras's default, 32."""
    if _on_gpu() or time is None:
        return False
    return sizes.multiplies_inside(batch or 32, time, features, units)


# Up to how many units the sLSTM's heads are multiplied as one kernel.
joined_heads = 128


def joined_blocks():
    """Up to what width a projection in blocks is one product with zeros between them."""
    return 0 if _on_gpu() else 128


def alone_on_device():
    """Whether no other device holds some of the heads."""
    return True


def export_of(x):
    """What the graph is exported to that is being traced with x, or None."""
    return None if tf.executing_eagerly() else export_context.current()


def exported_to():
    """The format that the graph being traced is exported to, or None."""
    export = export_of(None)
    return export and export.format


def check_export(x):
    """Refuses x (B, T, ...) where a file of that format could not hold a loop over it."""
    format = exported_to()
    if format == "litert" and x.shape[1] is None:
        raise ValueError(
            "LiteRT's runtime does not run TensorFlow's loops over time; they are written out step "
            "by step. Received: an input whose length is not fixed. Give keras.Input, or export's "
            "`input_signature`, a fixed length; or use keras_xlstm.export.export_model(model, "
            "folder, 'litert', length=...), or its parts=('streaming',), one step with its states "
            "(docs/export.md)."
        )
    graph = getattr(tf.compat.v1.get_default_graph(), "name", "")
    looped = x.shape[1] == 1 and "while_body" in graph
    if format in ("litert", "openvino") and looped:
        raise ValueError(
            f"A {format} file cannot hold the loop of keras.layers.RNN on TensorFlow. Received: a "
            "cell of keras_xlstm in such a loop. Build it with unroll=True and an input of fixed "
            "length, use keras_xlstm.layers.sLSTM, or take keras_xlstm.export.export_model(model, "
            f"folder, {format!r}, parts=('streaming',)), one step with its states."
        )


def log1p(x):
    # tf2onnx does not know it. Of exp(-|f|) the rest that is lost is below f's own last digit.
    return tf.math.log(1.0 + x) if exported_to() == "onnx" else tf.math.log1p(x)


def activated(activation, x):
    # TensorFlow's gelu is by erfc, which tf2onnx hands on to ONNX, where there is none.
    if activation is keras.activations.gelu and exported_to() == "onnx":
        return 0.5 * x * (1.0 + tf.math.erf(x * 0.5**0.5))
    return activation(x)


def trace_time(function):
    """Marks a function without tensors, which is run when the caller is traced."""
    return function


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


@tf.custom_gradient
def constant(x):
    """x, without a gradient. In a loop tf.stop_gradient makes the graph optimizer crash."""
    return tf.identity(x), tf.zeros_like


def turned(x):
    """x with its last two axes swapped, to be multiplied by something on the right. XLA on CPUs
    takes half as long for a product whose first operand is turned before it."""
    x = swapaxes(x, -1, -2)
    return optimization_barrier(x)[0] if _by_xla.get() else x


@contextlib.contextmanager
def _during(variable):
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def unrolled():
    """Scans that are traced inside become plain operations: for formats without loops."""
    return _during(_unrolled)


def by_xla():
    """What is traced inside is compiled by XLA, for sure."""
    return _during(_by_xla)


def _without_loop(length):
    return _unrolled.get() or (length is not None and exported_to() in ("litert", "openvino"))


def scan(step, init, xs, reverse=False):
    """`step(carry, x) -> (carry, y)` over the first axis of every tensor in `xs`.

    `tf.scan` and `keras.ops.scan` cannot be compiled by XLA with a length that is unknown when the
    graph is built, and want `y` to look like the carry; a while loop with `maximum_iterations`
    has neither limit.
    """
    if _without_loop(xs[0].shape[0]):
        return _plain_scan(step, init, xs, reverse)
    length = tf.shape(xs[0])[0]
    inputs = [tf.TensorArray(x.dtype, length, element_shape=x.shape[1:]).unstack(x) for x in xs]
    # One step aside, for the number, dtypes and shapes of its outputs: a graph prunes it.
    _, ys = step(tuple(init), tuple(x[0] for x in xs))
    outputs = tuple(tf.TensorArray(y.dtype, length, element_shape=y.shape) for y in ys)

    def body(index, carry, outputs):
        t = length - 1 - index if reverse else index
        carry, ys = step(carry, tuple(x.read(t) for x in inputs))
        outputs = tuple(array.write(t, y) for array, y in zip(outputs, ys, strict=True))
        return index + 1, carry, outputs

    _, carry, outputs = tf.while_loop(
        lambda *_: True,  # two bounds would come in any order, and miss XLA's persistent cache
        body,
        (tf.constant(0), tuple(init), outputs),
        maximum_iterations=length,
    )
    return carry, tuple(array.stack() for array in outputs)


def _plain_scan(step, init, xs, reverse):
    order = range(xs[0].shape[0])
    carry, ys = init, {}
    for t in reversed(order) if reverse else order:
        carry, ys[t] = step(carry, tuple(x[t] for x in xs))
    return carry, tuple(tf.stack(y) for y in zip(*(ys[t] for t in order), strict=True))


def scan_chunks(step, init, long, short, reverse=False):
    """`step(carry, (*chunks of long, *entries of short)) -> (carry, chunks, entries)`.

    `long` tensors (B, N * L, ...) are cut along time, `short` ones (N, ...) are taken apart; what
    the step returns is put together likewise. A slice in the loop spares a transposed copy of the
    whole.
    """
    if _without_loop(short[0].shape[0]):
        return _plain_scan_chunks(step, init, long, short, reverse)
    count = tf.shape(short[0])[0]
    L = short[0].shape[-1]
    sizes = []

    def chunk(x, index):
        start = [0, index * L, *[0] * (len(x.shape) - 2)]
        cut = tf.slice(x, start, tf.concat([tf.shape(x)[:1], [L], tf.shape(x)[2:]], 0))
        cut.set_shape([x.shape[0], L, *x.shape[2:]])
        return cut

    def flat_step(carry, xs):
        index, *entries = xs
        carry, chunks, entries = step(carry, (*(chunk(x, index) for x in long), *entries))
        sizes.append(len(chunks))
        return carry, (*chunks, *entries)

    carry, ys = scan(flat_step, init, (tf.range(count), *short), reverse)
    chunks, entries = ys[: sizes[0]], ys[sizes[0] :]
    joined = []
    for y in chunks:
        y = tf.transpose(y, [1, 0, *range(2, len(y.shape))])
        joined.append(tf.reshape(y, [tf.shape(y)[0], -1, *y.shape[3:]]))
    return carry, tuple(joined), entries


def _plain_scan_chunks(step, init, long, short, reverse):
    count, L = short[0].shape[0], short[0].shape[-1]
    carry, chunks, entries = init, {}, {}
    for t in reversed(range(count)) if reverse else range(count):
        xs = (*(x[:, t * L : (t + 1) * L] for x in long), *(x[t] for x in short))
        carry, chunks[t], entries[t] = step(carry, xs)
    order = range(count)
    # Not stacked, turned and reshaped, which OpenVINO's runtime takes for something else.
    joined = tuple(tf.concat(y, 1) for y in zip(*(chunks[t] for t in order), strict=True))
    return carry, joined, tuple(map(tf.stack, zip(*(entries[t] for t in order), strict=True)))


def differentiable(forward, backward, tensors, **options):
    """Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.

    `tensors` may hold None.
    """
    present = [index for index, tensor in enumerate(tensors) if tensor is not None]

    @tf.custom_gradient
    def function(*given):
        arguments = list(tensors)
        for index, tensor in zip(present, given, strict=True):
            arguments[index] = tensor
        outputs, residuals = forward(*arguments, **options)

        def gradient(*output_gradients):
            gradients = backward(residuals, output_gradients, **options)
            return [gradients[index] for index in present]

        return outputs, gradient

    return function(*(tensors[index] for index in present))


def compiled(function, variables, jit_compile="auto", repeated=False):
    """`function(state, *tensors)` as a graph, without gradients; it captures `variables`. XLA
    compiles it if `jit_compile` is True."""
    return tf.function(function, jit_compile=jit_compile is True or None)
