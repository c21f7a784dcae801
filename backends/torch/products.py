"""Products and sums that PyTorch would compute in more passes than they need."""

import torch
from keras_xlstm.backends.torch.tracing import exporting, transforms


def float32_gate_product(x, kernel):
    """x (B, T, D) times kernel (D, 2, H), in the kernel's dtype, H small; None for two products.

    For bfloat16 on a GPU by products of bfloat16, summed in float32: the kernel is cut into three
    such numbers, whose sum it is, and so is the gradient. A float32 copy of x would be twice the
    bytes to write, and to read in every product.
    """
    if exporting():  # OpenVINO's converter does not know tensordot
        return None
    if x.dtype == torch.bfloat16 and kernel.dtype == torch.float32 and x.is_cuda:
        if not transforms():
            return _ByParts.apply(x, kernel)
    return torch.tensordot(x.to(kernel.dtype), kernel, 1)


def _parts(x, count):
    """Numbers that bfloat16 holds and that sum up to x (float32)."""
    found = []
    for _ in range(count):
        # By its bits: compilers may leave out casts there and back.
        found.append((x.view(torch.int32) & -(1 << 16)).view(torch.float32))
        x = x - found[-1]
    return found


def _side_by_side(parts, rows):
    """(rows, all columns of all parts), bfloat16."""
    return torch.stack(parts, 1).reshape(rows, -1).bfloat16()


def _wide(x, y):
    """x @ y of bfloat16, in float32."""
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, kernel)
        D = x.shape[-1]
        y = _wide(x.reshape(-1, D), _side_by_side(_parts(kernel, 3), D))
        high, middle, low = y.reshape(*x.shape[:2], 3, *kernel.shape[1:]).unbind(2)
        return high + (middle + low)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, kernel = ctx.saved_tensors
        D, steps = x.shape[-1], x.shape[0] * x.shape[1]
        high, middle, low = _parts(dy.contiguous().reshape(steps, *kernel.shape[1:]), 3)
        dkernel = _wide(x.reshape(steps, D).mT, _side_by_side([high, middle, low], steps))
        first, second, third = dkernel.reshape(D, 3, *kernel.shape[1:]).unbind(1)
        # dx is bfloat16: high by high and both high by middle are more than it holds.
        columns, rest = _parts(kernel, 2)
        rows = _side_by_side([high, middle, high], steps)
        dx = rows @ _side_by_side([columns, columns, rest], D).mT
        return dx.reshape(x.shape), first + (second + third)


def token_losses(logits, y, dtype):
    """Cross-entropy of every token, (N,), of logits (N, vocabulary) and ids (N,). Compiled it makes
    few passes over the logits, where PyTorch's own operators write them as `dtype` first."""
    logits = logits.to(getattr(torch, dtype))
    return torch.nn.functional.cross_entropy(logits, y.long(), reduction="none")
