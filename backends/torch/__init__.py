"""What the native forms need from PyTorch: a scan, and a function with a hand-written gradient."""

import keras
import torch

# keras.ops turns float64 into float32 in these, on one backend or another.
tanh, maximum = torch.tanh, torch.maximum


def scan(step, init, xs, reverse=False):
    """`step(carry, x) -> (carry, y)` over the first axis of every tensor in `xs`."""
    # unbind, never x[t]: the gradient of an index fills a zero tensor of x's size at every step.
    # contiguous: a transposed view would be copied again by every product that it enters.
    columns = [x.contiguous().unbind(0) for x in xs]
    length = len(columns[0])
    carry, outputs = init, None
    for t in reversed(range(length)) if reverse else range(length):
        carry, ys = step(carry, tuple(column[t] for column in columns))
        if outputs is None:
            outputs = tuple(y.new_empty(length, *y.shape) for y in ys)
        for output, y in zip(outputs, ys, strict=True):
            output[t].copy_(y)
    return carry, outputs


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, options, *tensors):
        outputs, residuals = forward(*tensors, **options)
        flat = keras.tree.flatten(residuals)
        ctx.save_for_backward(*(x for x in flat if isinstance(x, torch.Tensor)))
        ctx.call = backward, options, residuals_structure(residuals)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        backward, options, structure = ctx.call
        saved = iter(ctx.saved_tensors)
        residuals = keras.tree.map_structure(lambda x: next(saved) if x is ... else x, structure)
        return None, None, None, *backward(residuals, gradients, **options)


def residuals_structure(residuals):
    return keras.tree.map_structure(
        lambda x: ... if isinstance(x, torch.Tensor) else x, residuals
    )


def differentiable(forward, backward, tensors, **options):
    """Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.

    `tensors` may hold None. There is no second derivative: asking for one is PyTorch's error.
    """
    return _Differentiable.apply(forward, backward, options, *tensors)
