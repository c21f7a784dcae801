"""What PyTorch provides (framework.py)."""

import keras
import torch
from keras_xlstm.backends import common
from keras_xlstm.backends.torch import (
    compile_blocks,
    context,
    custom_op,
    decode_step,
    export_refusals,
    inference,
    products,
    slstm_loop,
    tracing,
    train_step,
)
from torch.nn import functional

# keras.ops turns float64 into float32 in these, on one backend or another; and torch.compile breaks
# its graph at keras.ops.max.
tanh, maximum, largest, matmul = torch.tanh, torch.maximum, torch.amax, torch.matmul
log1p, cumsum = torch.log1p, torch.cumsum
# Several times as fast to call as keras.ops', which small chunks feel. (transpose: the converter
# to ONNX does not know swapaxes, which is the same.)
total, swapaxes = torch.sum, torch.transpose
constant = torch.detach
# Products with both halves of a kernel, not one that is cut in two: the compiler puts the gradient
# of both together in a pass that works out each for both.
split_gate_and_up = True
fuses_row_sums = False
kernels_take_native = True
joined_heads = 0
implementations = {"triton": {"mlstm": "mlstm", "slstm": "slstm"}}
# Of a function without tensors: torch.compile calls it while tracing and keeps the result.
trace_time = torch.compiler.assume_constant_result
no_autograph = fusion_barrier = common.unchanged
activated, changes, size = common.activated, common.changes, tracing.size
concatenate_steps = common.concatenate_steps
export_of, check_export = export_refusals.export_of, export_refusals.check_export
shares_time, own_stretch = context.shares_time, context.own_stretch
over_stretches, remat = context.over_stretches, context.remat
native_slstm = slstm_loop.native_slstm
float32_gate_product = products.float32_gate_product
without_gradients = inference.inference
# Products stay as they are written; losses are Keras's own, but in a step that is captured.
keep_unfused = token_losses = None
block_runners, state_copy = compile_blocks.block_runners, decode_step.state_copy
captured_train_step, fuse_optimizer = train_step.CapturedTrainStep, train_step.fuse_optimizer
default_compilation = train_step.default_compilation

_LOG2_E = 1.4426950408889634


def signature(first, *others):
    """Sizes and dtypes of tensors on Keras's device, whose checks a small call on a GPU waits for
    longer than for the kernels; None where something has to be converted, or is traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(first) not in tracing.PLAIN:
        return None
    if keras.ops.convert_to_tensor(first) is not first:  # it is to go to another device
        return None
    device, key = first.device, [first.shape, first.dtype]
    for x in others:
        if type(x) not in tracing.PLAIN or x.device != device:
            return None
        key += x.shape, x.dtype
    return tuple(key)


def minimum(x, bound):
    return torch.clamp(x, max=bound)


def chunk_size(key_dim, value_dim, time):
    return 64  # every chunk costs a dozen calls of PyTorch


def multiplies_inside(batch, time, features, units):
    return False


def joined_blocks():
    return 0


def alone_on_device():
    return True


def whole_batch():
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def host_values(x):
    if (
        tracing.exporting()
        or torch.compiler.is_compiling()
        or type(x) not in tracing.PLAIN
        or not x.is_cpu
        or tracing.transforms()
    ):
        return None
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


@trace_time
def scripting():
    return torch.jit.is_tracing()


def steps_of(x, steps):
    # Not take_along_dim, which the older exporter to ONNX does not know.
    steps = steps.long().reshape(*steps.shape, *[1] * (x.ndim - 2))
    return torch.gather(x, 1, steps.expand(-1, -1, *x.shape[2:]))


def log_sigmoid(x):
    # Of logsigmoid that exporter makes log(sigmoid(x)), and -inf where x is -104.
    return -functional.softplus(-x) if scripting() else functional.logsigmoid(x)


def unsorted(x):
    """torch.export takes a batch for a constant where it is sorted, and the older exporter to ONNX
    does not know a stable sort."""
    return tracing.exporting()


def turned(x):
    return x.transpose(-1, -2)


def exp(x):
    """exp of a fresh tensor of numbers that are at most small."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not x.is_cpu:
        return torch.exp(x)
    # PyTorch's exp on CPU is MKL's, twenty times slower than its exp2 where results underflow, as
    # they do above a causal diagonal.
    return x.mul_(_LOG2_E).exp2_()


def scan(step, init, xs, reverse=False):
    # unbind, never x[t]: the gradient of an index fills a zero tensor of x's size at every step.
    # contiguous: a transposed view would be copied again by every product that it enters.
    columns = [x.contiguous().unbind(0) for x in xs]
    length = len(columns[0])
    carry, outputs = init, None
    places = range(length)[::-1] if reverse else range(length)
    # To these, or in a file, a write into a part of a tensor is one of the whole.
    if tracing.transforms() or tracing.exporting() or torch.is_grad_enabled():
        rows = {}
        for t in places:
            carry, rows[t] = step(carry, tuple(column[t] for column in columns))
        return carry, _stacked(rows)
    # Of meta tensors Keras asks for shapes: one step tells those of all.
    for t in places[:1] if xs[0].is_meta else places:
        carry, ys = step(carry, tuple(column[t] for column in columns))
        if outputs is None:
            outputs = tuple(y.new_empty(length, *y.shape) for y in ys)
        for output, y in zip(outputs, ys, strict=True):
            output[t].copy_(y)
    return carry, outputs


def _stacked(rows):
    """{step: tensors} to tensors with the steps as their first axis."""
    return tuple(map(torch.stack, zip(*(rows[t] for t in range(len(rows))), strict=True)))


def scan_chunks(step, init, long, short, reverse=False):
    if tracing.exporting() or torch.is_grad_enabled():
        return _scan_stacked_chunks(step, init, long, short, reverse)
    count = short[0].shape[0]
    L = long[0].shape[1] // count
    chunks = [x.unflatten(1, (count, L)).unbind(1) for x in long]
    entries = [x.unbind(0) for x in short]
    carry, outputs = init, None
    places = range(count)[::-1] if reverse else range(count)
    for t in places[:1] if short[0].is_meta else places:
        # contiguous: each is swapped and enters several products.
        xs = (x[t].transpose(1, 2).contiguous().transpose(1, 2) for x in chunks)
        carry, *ys = step(carry, (*xs, *(x[t] for x in entries)))
        if outputs is None:
            wholes = [y.new_empty(y.shape[0], count, *y.shape[1:]) for y in ys[0]]
            outputs = wholes, [y.new_empty(count, *y.shape) for y in ys[1]]
        for whole, y in zip(outputs[0], ys[0], strict=True):
            whole[:, t].copy_(y)
        for whole, y in zip(outputs[1], ys[1], strict=True):
            whole[t].copy_(y)
    return carry, tuple(o.flatten(1, 2) for o in outputs[0]), tuple(outputs[1])


def _scan_stacked_chunks(step, init, long, short, reverse):
    """`scan_chunks` by `scan`."""
    counts = []

    def step_of_all(carry, xs):
        carry, chunks, entries = step(carry, xs)
        counts.append(len(chunks))
        return carry, (*chunks, *entries)

    number = size(short[0].shape[0])
    stacked = [x.unflatten(1, (number, -1)).transpose(0, 1) for x in long]
    carry, ys = scan(step_of_all, init, (*stacked, *short), reverse)
    joined = tuple(y.transpose(0, 1).flatten(1, 2) for y in ys[: counts[0]])
    return carry, joined, ys[counts[0] :]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, options, *tensors):
        outputs, residuals = forward(*tensors, **options)
        kept = (tensors, residuals)  # for the most part the same ones
        flat = keras.tree.flatten(kept)
        ctx.save_for_backward(*(x for x in flat if isinstance(x, torch.Tensor)))
        ctx.call = forward, backward, options, _structure(kept)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        forward, backward, options, structure = ctx.call
        saved = iter(ctx.saved_tensors)
        kept = keras.tree.map_structure(lambda x: next(saved) if x is ... else x, structure)
        tensors, residuals = kept
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def plain(*tensors):
                return forward(*tensors, **options, keep=False, plain=True)[0]

            found = custom_op.gradients_of(plain, tensors, gradients)
        else:
            found = backward(residuals, gradients, **options)
        return None, None, None, *found


def _structure(kept):
    return keras.tree.map_structure(lambda x: ... if isinstance(x, torch.Tensor) else x, kept)


def differentiable(forward, backward, tensors, **options):
    """A call with create_graph=True differentiates what `forward` does, and so do PyTorch's
    transforms (torch.func, forward mode). What is exported is made of PyTorch's own operators.
    """
    if tracing.transforms() or tracing.exporting():
        return forward(*tensors, **options, keep=False, plain=True)[0]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        with torch.no_grad():
            return forward(*tensors, **options, keep=False)[0]
    return _Differentiable.apply(forward, backward, options, *tensors)


def tensor(array):
    """As `keras.ops.convert_to_tensor`, which takes bfloat16 by way of float32 and two copies."""
    if array.dtype.name != "bfloat16":
        return keras.ops.convert_to_tensor(array)
    return torch.from_numpy(array.view("int16")).view(torch.bfloat16)


def compiled(function, weights=None, jit_compile="auto", kind=None):
    """PyTorch has nothing to compile the whole by that a machine without a C++ compiler could
    run."""
    function = torch.no_grad()(function)
    if weights is None:
        return function
    function = weights.scoped(function)
    if jit_compile is False:
        return function
    captured = {"step": decode_step.CapturedDecodeStep, "read": decode_step.CapturedRead}[kind]
    return captured(function, weights, required=jit_compile is True)


def version(x):
    return x._version, x.data_ptr()
