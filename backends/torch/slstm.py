"""The sLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

The native form is slstm_loop.py's. Triton itself is imported on the first launch.
"""

import functools

import torch
from keras_xlstm.backends.kernels.plan import packed
from keras_xlstm.backends.kernels.slstm import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.custom_op import no_second_derivative, operator
from keras_xlstm.backends.torch.launch import bound
from torch import Tensor


def unsupported(x=None):
    """Why the kernels cannot run on this tensor (None: here at all), or None."""
    if x is None:
        return device.missing()
    halves = device.interpreted() and x.dtype == torch.float16 and x.shape[-1] % 32 == 0
    reason = device.unsupported(x, halves)
    return reason or plan.unsupported(x.shape[-1], x.dtype.itemsize, device.shared_memory(x.device))


def not_preferred(x=None):
    return None  # where it can run it is the better choice


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip, native=None,
):  # fmt: skip
    """As `reference.slstm`, for tensors of any dtype in `unsupported`; `state` may be None.

    The recurrent kernel meets h in x's dtype, with sums in float32. `native`, of the tensors as
    they are here, is what a call with create_graph=True differentiates; None: a second derivative
    is an error.
    """
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, recurrent_kernel, bias, *(state or ()))
    )
    h, *last = _forward(
        x.contiguous(), recurrent_kernel.contiguous(), None if bias is None else bias.contiguous(),
        *(s.float().contiguous() for s in state) if state else (None,) * 4,
        *(None if flag is None else flag.to(torch.int8).contiguous() for flag in (hold, reset)),
        None if recurrent_scale is None else recurrent_scale.float().contiguous(),
        forget_gate == "exp", float(recurrent_gradient_clip or 0.0), trains,
        native=native and functools.partial(_by_native, native),
    )[:5]  # fmt: skip
    return h, tuple(last)


def _by_native(native, x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale):
    state = None if h is None else (h, c, n, m)
    hold, reset = (None if flag is None else flag.bool() for flag in (hold, reset))
    h, state = native(x, recurrent_kernel, bias, state, hold, reset, recurrent_scale)
    return h, *state


def plan_call(shape, dtype, *options):
    """`plan.Call` for x of this shape."""
    B, T, _, H, D = shape
    return plan.Call(B, T, H, D, device.name(dtype), *options)


def _forward_plan(shape, dtype, where, trains, *options, aligned):
    return plan.forward(device.of(where, dtype), plan_call(shape, dtype, *options), trains)


def _backward_plan(shape, dtype, where, clip, *options, aligned):
    return plan.backward(device.of(where, dtype), plan_call(shape, dtype, *options), clip)


@operator("slstm_triton_forward")
def _forward(
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    exp_forget: bool, clip: float, trains: bool,
) -> list[Tensor]:  # fmt: skip
    """h, the last h, c, n, m, and if it trains what the backward pass needs."""
    first = None if h is None else h.to(x.dtype)
    R, bias = recurrent_kernel.to(x.dtype), None if bias is None else bias.float()
    given = x, R, bias, hold, reset, recurrent_scale, first, h, c, n, m
    run = bound(
        _forward_plan, x.shape, x.dtype, x.device, trains, bias is not None, h is not None,
        hold is not None, reset is not None, recurrent_scale is not None, exp_forget,
    )  # fmt: skip
    outputs, saved = run(*[t for t in given if t is not None])
    return [*outputs, saved] if trains else outputs


@_forward.register_fake
def _(
    x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale, exp_forget, clip, trains
):
    B, T, _, H, D = x.shape
    outputs = [x.new_empty(B, T, H, D)]
    outputs += [x.new_empty(B, H, D, dtype=torch.float32) for _ in range(4)]
    if trains:
        options = (*(False,) * 5, exp_forget)
        saved = plan.saved(plan_call(x.shape, x.dtype, *options), device.of(x.device, x.dtype))
        outputs.append(x.new_empty(packed([saved])[1], dtype=torch.uint8))
    return outputs


@operator("slstm_triton_backward")
def _backward(
    dh: Tensor, dh_last: Tensor, dc: Tensor, dn: Tensor,
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h0: Tensor | None, c0: Tensor | None, n0: Tensor | None,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    h: Tensor, c: Tensor, n: Tensor, saved: Tensor, exp_forget: bool, clip: float,
) -> list[Tensor]:  # fmt: skip
    first = None if h0 is None else h0.to(x.dtype)
    R = recurrent_kernel.to(x.dtype)
    given = dh, dh_last, dc, dn, R, hold, reset, recurrent_scale, first, c0, n0, h, c, n, saved
    run = bound(
        _backward_plan, x.shape, x.dtype, x.device, clip, bias is not None, h0 is not None,
        hold is not None, reset is not None, recurrent_scale is not None, exp_forget,
    )  # fmt: skip
    (dx, *d_first, dR), _ = run(*[t for t in given if t is not None])
    dR = dR.sum(0).to(recurrent_kernel.dtype)
    dbias = x.new_empty(0)
    if bias is not None:
        dbias = dx.sum((0, 1), dtype=torch.float32).to(bias.dtype)
    return [dx, dR, dbias, *d_first]


@_backward.register_fake
def _(
    dh, dh_last, dc, dn, x, recurrent_kernel, bias, h0, c0, n0, hold, reset, recurrent_scale,
    h, c, n, saved, exp_forget, clip,
):  # fmt: skip
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    last = [torch.empty_like(c) for _ in range(3)]
    return [torch.empty_like(x), torch.empty_like(recurrent_kernel), dbias, *last]


def _save(ctx, inputs, output):
    x, R, bias, h0, c0, n0, m0, hold, reset, scale, exp_forget, clip, _ = inputs
    h, _, c, n, _, saved = output
    ctx.save_for_backward(x, R, bias, h0, c0, n0, hold, reset, scale, h, c, n, saved, m0)
    ctx.options = exp_forget, clip
    ctx.set_materialize_grads(False)


def _inputs(ctx):
    x, R, bias, h0, c0, n0, hold, reset, scale, *_, m0 = ctx.saved_tensors
    return x, R, bias, h0, c0, n0, m0, hold, reset, scale


def _gradient(ctx, gradients):
    dh, dh_last, dc, dn, *_ = gradients
    *tensors, _ = ctx.saved_tensors
    _, _, bias, _, c0, n0, *_, h, c, _, _ = tensors
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    last = dh_last, dc, dn
    none = torch.zeros_like(c) if any(d is None for d in last) else None  # for all: only read
    last = (none if d is None else d.contiguous() for d in last)
    dx, dR, dbias, dh, dc, dn = _backward(dh, *last, *tensors, *ctx.options)
    # The state's true value is (c, n) exp(m).
    state = [None] * 4 if c0 is None else [dh, dc, dn, c0 * dc + n0 * dn]
    return dx, dR, None if bias is None else dbias, *state, *[None] * 6


# Hidden: what was saved.
_forward.register_autograd(_gradient, setup_context=_save, hidden=1, inputs=_inputs)
no_second_derivative(_backward, "sLSTM")
