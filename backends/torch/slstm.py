"""The sLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

The native form is slstm_loop.py's. Triton itself is imported on the first launch.
"""

import functools

import torch
from keras_xlstm.backends import slstm_launches as launches
from keras_xlstm.backends.torch import machine
from keras_xlstm.backends.torch.machine import precision
from keras_xlstm.backends.torch.operators import launch, no_second_derivative, operator
from keras_xlstm.backends.torch.slstm_loop import native_slstm  # noqa: F401  found by backends
from torch import Tensor


def unsupported(x=None):
    """Why the kernels cannot run on this tensor (None: here at all), or None."""
    if x is None:
        return machine.missing()
    halves = machine.interpreted() and x.dtype == torch.float16 and x.shape[-1] % 32 == 0
    reason = machine.unsupported(x, halves)
    return reason or launches.unsupported(
        x.shape[-1], x.dtype.itemsize, machine.shared_memory(x.device)
    )


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip,
):  # fmt: skip
    """As `native.slstm`, for tensors of any dtype in `unsupported`; `state` may be None.

    The recurrent kernel meets h in x's dtype, with sums in float32.
    """
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, recurrent_kernel, bias, *(state or ()))
    )
    h, *last = _forward(
        x.contiguous(), recurrent_kernel.contiguous(), None if bias is None else bias.contiguous(),
        *(s.float().contiguous() for s in state) if state else (None,) * 4,
        *(None if flag is None else flag.to(torch.int8).contiguous() for flag in (hold, reset)),
        None if recurrent_scale is None else recurrent_scale.float().contiguous(),
        forget_gate == "exp", recurrent_gradient_clip or 0.0, trains,
    )[:5]  # fmt: skip
    return h, tuple(last)


def _device(x):
    return launches.Device(
        machine.shared_memory(x.device), machine.processors(x.device), precision(x.dtype),
        machine.triton_version(), True, machine.all_shared_memory(x.device),
        machine.clusters(x.device), machine.interpreted(),
    )  # fmt: skip


def _launches(x):
    B, T, _, H, D = x.shape
    return launches.Launches(launch, _device(x), B, T, H, D, x.dtype.itemsize)


def _missing(t):
    """Fills what programs exchange with a NaN that they never write."""
    return t.view(torch.int16 if t.itemsize == 2 else torch.int32).fill_(-1)


@operator("slstm_triton_forward")
def _forward(
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    exp_forget: bool, clip: float, trains: bool,
) -> list[Tensor]:  # fmt: skip
    run, outputs = _launches(x), _outputs(x, exp_forget, trains)
    bias = None if bias is None else bias.float()
    h_all, *last, saved = outputs
    if run.exchanges:
        _missing(h_all)
    given = x, recurrent_kernel.to(x.dtype), bias, hold, reset, recurrent_scale
    first = None if h is None else h.to(x.dtype)
    saved = saved if trains else None
    memory = _memory(run, x)
    run.forward(given, first, (h, c, n, m), h_all, saved, last, exp_forget, memory)
    return outputs


def _memory(run, like):
    return like.new_zeros(run.memory, dtype=torch.int32) if run.memory else None


def _outputs(x, exp_forget, trains):
    """Empty tensors: h, the last h, c, n, m, and what the backward pass needs."""
    B, T, _, H, D = x.shape
    outputs = [x.new_empty(B, T, H, D)]
    outputs += [x.new_empty(B, H, D, dtype=torch.float32) for _ in range(4)]
    saved = (0,)
    if trains:
        saved = launches.saved(x.shape, x.dtype.itemsize, _device(x), exp_forget)
    return [*outputs, x.new_empty(saved, dtype=torch.float32)]


@_forward.register_fake
def _(
    x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale, exp_forget, clip, trains
):
    return _outputs(x, exp_forget, trains)


@operator("slstm_triton_backward")
def _backward(
    dh: Tensor, dh_last: Tensor, dc: Tensor, dn: Tensor,
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h0: Tensor | None, c0: Tensor | None, n0: Tensor | None,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    h: Tensor, c: Tensor, n: Tensor, saved: Tensor, exp_forget: bool, clip: float,
) -> list[Tensor]:  # fmt: skip
    run, dx = _launches(x), torch.empty_like(x)
    if run.exchanges:
        _missing(dx)
    d_first = [torch.empty_like(c) for _ in range(3)]
    R = recurrent_kernel.to(x.dtype)
    given = dh, saved, R, hold, reset, recurrent_scale, c0, n0
    after = dh_last, dc, dn
    run.backward(given, after, c, n, dx, d_first, exp_forget, clip, _memory(run, x))
    first = None if h0 is None else h0.to(x.dtype)
    new = functools.partial(x.new_empty, dtype=torch.float32)
    dR = run.kernel_gradient(h, dx, first, reset, recurrent_scale, new)
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
    x, R, bias, h0, c0, n0, _, hold, reset, scale, exp_forget, clip, _ = inputs
    h, _, c, n, _, saved = output
    ctx.save_for_backward(x, R, bias, h0, c0, n0, hold, reset, scale, h, c, n, saved)
    ctx.options = exp_forget, clip
    ctx.set_materialize_grads(False)


def _gradient(ctx, gradients):
    dh, dh_last, dc, dn, *_ = gradients
    _, _, bias, _, c0, n0, *_, h, c, _, _ = tensors = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    last = dh_last, dc, dn
    none = torch.zeros_like(c) if any(d is None for d in last) else None  # for all: only read
    last = (none if d is None else d.contiguous() for d in last)
    dx, dR, dbias, dh, dc, dn = _backward(dh, *last, *tensors, *ctx.options)
    # The state's true value is (c, n) exp(m).
    state = [None] * 4 if c0 is None else [dh, dc, dn, c0 * dc + n0 * dn]
    return dx, dR, None if bias is None else dbias, *state, *[None] * 6


_forward.register_autograd(_gradient, setup_context=_save)
no_second_derivative(_backward, "sLSTM")
