"""The sLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

The native form is slstm_loop.py's. Triton itself is imported on the first launch.
"""

import math

import torch
from keras_xlstm.backends.kernels.slstm import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.custom_op import no_second_derivative, operator
from keras_xlstm.backends.torch.device import precision
from keras_xlstm.backends.torch.launch import Launch, cached_plan, on_stream
from keras_xlstm.backends.torch.repeated import Repeated
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
    recurrent_gradient_clip,
):  # fmt: skip
    """As `reference.slstm`, for tensors of any dtype in `unsupported`; `state` may be None.

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
        forget_gate == "exp", float(recurrent_gradient_clip or 0.0), trains,
    )[:5]  # fmt: skip
    return h, tuple(last)


def _device(x):
    return plan.Device(
        device.shared_memory(x.device), device.processors(x.device), precision(x.dtype),
        device.triton_version(), True, device.all_shared_memory(x.device),
        device.clusters(x.device), device.interpreted(),
    )  # fmt: skip


class _Pass:
    """`function(launches, given, results, *numbers)` on a stream, for calls alike."""

    def __init__(self, function, device, sizes):
        self.function, self.device, self.sizes = function, device, sizes
        self.plan = plan.Launches(None, device, *sizes)
        # Else there is a launch for every step; or it is interpreted.
        self.repeats = self.plan.waits and not self.plan.memory
        self.found = {}

    @property
    def launches(self):
        return self.found.values()

    def __call__(self, stream, given, results, *numbers):
        def launch(kernel, programs, *arguments, **constants):
            # The rest is alike in all calls.
            key = id(kernel), programs, *[a is None for a in arguments], *constants.items()
            if key not in self.found:
                self.found[key] = Launch(kernel, programs, **constants)
            self.found[key](stream, *arguments)

        run = plan.Launches(launch, self.device, *self.sizes)
        return self.function(run, given, results, *numbers)


def _forward_pass(given, device, trains):
    x = given[0]
    B, T, _, H, D = x.shape
    return Repeated(_Pass(_run_forward, device, (B, T, H, D, x.dtype.itemsize)))


def _run_forward(run, given, results, exp_forget):
    x, R, bias, hold, reset, scale, first, *states = given
    h, saved, *last = results
    memory = _memory(run, x)
    given = x, R, bias, hold, reset, scale
    run.forward(given, first, states, h, saved, last, exp_forget, memory)


def _backward_pass(given, device):
    dh = given[0]
    return Repeated(_Pass(_run_backward, device, (*dh.shape, dh.dtype.itemsize)))


def _run_backward(run, given, results, exp_forget, clip):
    """The recurrent kernel's gradient in parts, float32."""
    dh, dh_last, dc, dn, R, first, c0, n0, hold, reset, scale, h, c, n, saved = given
    dx, *d_first = results
    memory = _memory(run, dh)
    given = dh, saved, R, hold, reset, scale, c0, n0
    run.backward(given, (dh_last, dc, dn), c, n, dx, d_first, exp_forget, clip, memory)

    def new(shape):
        return dh.new_empty(4 * math.prod(shape), dtype=torch.uint8).view(torch.float32)

    return run.kernel_gradient(h, dx, first, reset, scale, new)


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
    outputs = _outputs(x, exp_forget, trains)
    h_all, *last, saved = outputs
    first = None if h is None else h.to(x.dtype)
    R, bias = recurrent_kernel.to(x.dtype), None if bias is None else bias.float()
    given = x, R, bias, hold, reset, recurrent_scale, first, h, c, n, m
    repeated = cached_plan(_forward_pass, given, _device(x), trains)
    if repeated.run.plan.exchanges:
        _missing(h_all)
    results = h_all, saved if trains else None, *last
    on_stream(x.device, repeated, given, results, exp_forget)
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
        saved = plan.saved(x.shape, x.dtype.itemsize, _device(x), exp_forget)
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
    dx, *d_first = torch.empty_like(x), *(torch.empty_like(c) for _ in range(3))
    first = None if h0 is None else h0.to(x.dtype)
    R = recurrent_kernel.to(x.dtype)
    given = (
        dh, dh_last, dc, dn, R, first, c0, n0, hold, reset, recurrent_scale, h, c, n, saved,
    )  # fmt: skip
    repeated = cached_plan(_backward_pass, given, _device(x))
    if repeated.run.plan.exchanges:
        _missing(dx)
    dR = on_stream(x.device, repeated, given, (dx, *d_first), exp_forget, clip)
    dR = dR.view(torch.float32).view(-1, *R.shape).sum(0).to(recurrent_kernel.dtype)
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


_forward.register_autograd(_gradient, setup_context=_save, hidden=1)  # what was saved
no_second_derivative(_backward, "sLSTM")
