"""What JAX provides (framework.py)."""

import jax
import keras
import numpy as np
from keras_xlstm.backends import common, export_context, sizes
from keras_xlstm.backends.jax import context, device, gradients, inference, products

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum, largest = jax.numpy.tanh, jax.numpy.maximum, jax.numpy.max
minimum, log1p, cumsum = jax.numpy.minimum, jax.numpy.log1p, jax.numpy.cumsum
total, swapaxes, exp = jax.numpy.sum, jax.numpy.swapaxes, jax.numpy.exp
constant = jax.lax.stop_gradient
log_sigmoid, matmul, tensor = keras.ops.log_sigmoid, keras.ops.matmul, keras.ops.convert_to_tensor
# Products with both halves of a kernel, not one that is cut in two: XLA puts the gradient of both
# halves together in passes over the largest array of a block.
split_gate_and_up = True
fuses_row_sums = True
kernels_take_native = False
joined_heads = 128
implementations = {
    "triton": {"mlstm": "mlstm_triton", "slstm": "slstm_triton"},
    "pallas": {"mlstm": "pallas.mlstm", "slstm": "pallas.slstm"},
}
trace_time = no_autograph = size = common.unchanged
signature, steps_of, scripting = common.none, common.steps_of, common.scripting
activated, fuse_optimizer = common.activated, common.fuse_optimizer
differentiable = gradients.differentiable
turned, fusion_barrier = products.turned, products.fusion_barrier
keep_unfused, token_losses = products.keep_unfused, products.token_losses
float32_gate_product = products.float32_gate_product
# Arrays have all steps, wherever they are.
own_stretch, remat = common.own_stretch, keras.remat
shares_time, over_stretches = context.shares_time, context.over_stretches
# Whole steps are compiled.
native_slstm = block_runners = captured_train_step = default_compilation = None
without_gradients = inference.inference


def concatenate_steps(parts):
    # jax2onnx writes jax.numpy's with the length of the first part where the other's is unknown.
    return jax.lax.concatenate(parts, 1)


def export_of(x):
    return export_context.current() if isinstance(x, jax.core.Tracer) else None


def changes(variable, x):
    """Whether a new value of a variable can leave what x is traced in."""
    return isinstance(variable.value, jax.core.Tracer) and isinstance(x.shape[0], int)


def check_export(x):
    """Refuses x where it is traced for a file that Keras could not write."""
    export = export_of(x)
    if export and export.format == "openvino":
        raise ValueError(
            "OpenVINO's converter cannot read what Keras hands to it from JAX. Received: "
            "model.export(..., format='openvino'). Use keras_xlstm.export.export_model(model, "
            "folder, 'openvino'), which goes by way of ONNX (docs/export.md)."
        )


def unsorted(x):
    """Whether the length (the second axis of x) is a symbol, while a file is written."""
    return not isinstance(x.shape[1], int)


def host_values(x):
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    at_hand = x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
    return np.asarray(x) if at_hand else None


def chunk_size(key_dim, value_dim, time):
    """As `sizes.chunk_size`; 64 steps on a GPU."""
    return sizes.chunk_size(key_dim, value_dim, time) if device.platform() == "cpu" else 64


def multiplies_inside(batch, time, features, units):
    """As `sizes.multiplies_inside`; not on a GPU, nor for sizes that are symbols."""
    known = isinstance(batch, int) and isinstance(time, int)
    known = known and device.platform() == "cpu"
    return known and sizes.multiplies_inside(batch, time, features, units)


def joined_blocks():
    # On CPUs XLA turns x and y for one product a block, which takes longer than work on zeros.
    return 512 if device.platform() == "cpu" else 0


def alone_on_device():
    return keras.distribution.distribution() is None


def whole_batch():
    # A device's rows stay where they are. Shared weights would be gathered for every part.
    return type(keras.distribution.distribution()) in (type(None), keras.distribution.DataParallel)


def scan(step, init, xs, reverse=False):
    return jax.lax.scan(step, init, xs, reverse=reverse)


def scan_chunks(step, init, long, short, reverse=False):
    """A slice in the loop spares a transposed copy of the whole."""
    count = short[0].shape[0]
    L = long[0].shape[1] // count

    def chunk(index):
        return [jax.lax.dynamic_slice_in_dim(x, index * L, L, axis=1) for x in long]

    _, shapes, _ = jax.eval_shape(
        lambda: step(init, (*chunk(0), *(jax.numpy.zeros(x.shape[1:], x.dtype) for x in short)))
    )
    outputs = [jax.numpy.zeros((y.shape[0], L * count, *y.shape[2:]), y.dtype) for y in shapes]

    def body(carry, xs):
        (carry, outputs), (index, short) = carry, xs
        carry, chunks, entries = step(carry, (*chunk(index), *short))
        outputs = [
            jax.lax.dynamic_update_slice_in_dim(o, y, index * L, axis=1)
            for o, y in zip(outputs, chunks, strict=True)
        ]
        return (carry, outputs), entries

    xs = (jax.numpy.arange(count), tuple(short))
    (carry, outputs), entries = jax.lax.scan(body, (init, outputs), xs, reverse=reverse)
    return carry, tuple(outputs), entries


def compiled(function, weights=None, jit_compile="auto", kind=None):
    """The buffers of the state go into what the function returns."""
    function = inference.generating(function)
    if weights is None:
        return function if jit_compile is False else jax.jit(function, donate_argnums=0)
    if jit_compile is False:
        return weights.scoped(function)

    def stateless(state, values, *tensors):
        with weights.scope(values):
            return function(state, *tensors)

    jitted = jax.jit(stateless, donate_argnums=0)
    return lambda state, *tensors: jitted(state, weights.values, *tensors)


def version(x):
    return None  # nobody writes into an array


def state_copy(state):
    return jax.tree.map(jax.numpy.copy, state)
