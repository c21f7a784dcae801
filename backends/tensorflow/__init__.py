"""What TensorFlow provides (framework.py)."""

import keras
import tensorflow as tf
from keras_xlstm.backends import common, sizes
from keras_xlstm.backends.tensorflow import adam, compile_blocks, gradients, products, tracing

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = tf.tanh, tf.maximum, tf.reduce_max
minimum, cumsum, exp = tf.minimum, tf.cumsum, tf.exp
swapaxes, matmul, log_sigmoid = keras.ops.swapaxes, keras.ops.matmul, keras.ops.log_sigmoid
tensor = keras.ops.convert_to_tensor
total, turned, activated = products.total, products.turned, products.activated
# AutoGraph cannot rewrite all of our Python, and says so in a warning.
no_autograph = tf.autograph.experimental.do_not_convert
split_gate_and_up = False
fuses_row_sums = False
kernels_take_native = False
joined_heads = 128
implementations = {"xla": {"mlstm": "mlstm", "slstm": "slstm"}}
trace_time = size = fusion_barrier = common.unchanged
signature, steps_of, scripting = common.none, common.steps_of, common.scripting
changes, concatenate_steps = common.changes, common.concatenate_steps
export_of, check_export = tracing.export_of, tracing.check_export
native_slstm = float32_gate_product = keep_unfused = token_losses = None
block_runners = compile_blocks.block_runners
captured_train_step = default_compilation = version = None
without_gradients = None
fuse_optimizer = adam.fuse_optimizer
shares_time, own_stretch, remat = common.shares_time, common.own_stretch, keras.remat
over_stretches = common.over_stretches


def host_values(x):
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


def joined_blocks():
    return 0 if _on_gpu() else 128


def alone_on_device():
    return True


def whole_batch():
    return not tf.distribute.has_strategy()


def unsorted(x):
    return False


def log1p(x):
    # tf2onnx does not know it. Of exp(-|f|) the rest that is lost is below f's own last digit.
    return tf.math.log(1.0 + x) if tracing.exported_to() == "onnx" else tf.math.log1p(x)


@tf.custom_gradient
def constant(x):
    """x, without a gradient. In a loop tf.stop_gradient makes the graph optimizer crash."""
    return tf.identity(x), tf.zeros_like


def scan(step, init, xs, reverse=False):
    """`tf.scan` and `keras.ops.scan` cannot be compiled by XLA with a length that is unknown when
    the graph is built, and want `y` to look like the carry; a while loop with
    `maximum_iterations` has neither limit.
    """
    if tracing.without_loop(xs[0].shape[0]):
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
    """A slice in the loop spares a transposed copy of the whole."""
    if tracing.chunks_without_loop(short[0].shape[0]):
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
    present = [index for index, tensor in enumerate(tensors) if tensor is not None]
    plain = gradients.plain(forward, [tensor is not None for tensor in tensors], options)

    @tf.custom_gradient
    def function(*given):
        arguments = list(tensors)
        for index, tensor in zip(present, given, strict=True):
            arguments[index] = tensor
        outputs, residuals = forward(*arguments, **options)

        def gradient(*output_gradients):
            def run(*output_gradients):
                found = backward(residuals, output_gradients, **options)
                return [found[index] for index in present]

            return gradients.gradients(run, plain, output_gradients, given)

        return outputs, gradient

    return function(*(tensors[index] for index in present))


def compiled(function, weights=None, jit_compile="auto", kind=None):
    """A graph, which captures the weights; XLA compiles it if `jit_compile` is True."""
    return tf.function(function, jit_compile=jit_compile is True or None)


def state_copy(state):
    return state
