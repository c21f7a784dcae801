"""The sLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

The native form is slstm_loop.py's. Triton itself is imported on the first launch.
"""

import functools
import importlib

import torch
from keras_xlstm.backends.mlstm_tiles import power
from keras_xlstm.backends.torch import machine
from keras_xlstm.backends.torch.machine import precision
from keras_xlstm.backends.torch.operators import launch, no_second_derivative, operator
from keras_xlstm.backends.torch.slstm_loop import native_slstm  # noqa: F401  found by backends
from torch import Tensor


def unsupported(x=None):
    """Why the kernels cannot run on this tensor (None: here at all), or None."""
    if x is None:
        return machine.missing()
    reason = machine.unsupported(x)
    if reason is None and x.shape[-1] > 1024:
        reason = f"it takes up to 1024 units a head, not {x.shape[-1]}"
    if reason is None and not _split(x.shape[-1], 8, x.dtype, machine.shared_memory(x.device)):
        reason = f"heads of {x.shape[-1]} units are too large for the device's shared memory"
    return reason


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


@functools.cache
def _kernels(file="kernels"):
    return importlib.import_module(f"keras_xlstm.backends.triton.slstm_{file}")


def _whole(D, BB, dtype, shared_memory):
    """Whether one program can hold the recurrent kernel of a head; float32's is there in parts."""
    DP, size = power(D), dtype.itemsize
    needed = (4 * DP * DP * size + 16 * DP * BB) * size // 2
    return DP <= (64 if dtype == torch.float32 else 128) and needed <= shared_memory


def _split(D, BB, dtype, shared_memory):
    """Units of a program, units of a round, bytes of shared memory; or None: nothing fits."""
    size = dtype.itemsize
    KR = min(power(D), 256 if size == 2 else 128)
    rows = max(16, BB * size // 2)
    for BU in (16, 8) if size == 2 else (8,):
        needed = 4 * size * KR * (BU * -(-D // KR) + rows) + 2048
        if needed <= shared_memory:
            return BU, KR, needed
    return None


def _warps(D, BB, dtype):
    """Of a program of `split`: as few as have registers enough. Triton holds the recurrent kernel
    in them from 3.9 on, in shared memory before."""
    if BB == 32 or dtype == torch.float32 or (D > 512 and machine.triton_version() >= (3, 9)):
        return 8
    return 4


class _Plan:
    """How the work of a call is cut: rows and units of a program, programs of a launch."""

    def __init__(self, B, H, D, dtype, device):
        self.B, self.H, self.D = B, H, D
        self.processors = self.resident = machine.processors(device)
        memory = machine.shared_memory(device)
        self.whole = _whole(D, 8, dtype, memory)
        # Few rows: less work in each step's chain of dependent operations, as long as there are
        # processors for all the programs.
        cut = _split(D, 8, dtype, memory)
        for BB in (8, 16) if dtype == torch.float32 else (8, 16, 32):
            larger = _split(D, BB, dtype, memory)
            if not (_whole(D, BB, dtype, memory) if self.whole else larger):
                break
            self.BB, cut = BB, larger or cut
            self.tiles = 1 if self.whole else -(-D // cut[0])
            if self.groups * self.tiles <= self.processors:
                break
        if self.whole:
            self.forward = {"DP": power(D), "BB": self.BB, "num_warps": 8}
            self.backward = dict(self.forward)
        else:
            BU, KR, needed = cut
            S = _warps(D, self.BB, dtype)
            self.forward = {"KR": KR, "BB": self.BB, "BU": BU, "num_warps": S}
            self.backward = self.forward | {"S": S}
            if S == 4:  # then the registers, too, are enough for two programs a processor
                self.resident *= max(1, min(2, machine.all_shared_memory(device) // needed))
        for constants in (self.forward, self.backward):
            constants |= {"D": D, "PREC": precision(dtype), "num_stages": 1}
        # Programs that wait for each other must all be resident.
        self.waits = self.tiles <= self.resident

    @property
    def groups(self):
        """Parts of the work that do not meet: a head's rows."""
        return self.H * -(-self.B // self.BB)

    def launch_split(self, kernel, arguments, start, stop, reverse=False, **constants):
        """Groups side by side, as many as are resident at once; or, where the programs of one
        group are not, a launch for each step. `arguments(start, stop, first group)`."""
        constants |= self.backward if reverse else self.forward
        if not self.waits:
            for t in reversed(range(start, stop)) if reverse else range(start, stop):
                programs = self.groups * self.tiles
                launch(kernel, programs, *arguments(t, t + 1, 0), WAIT=False, **constants)
            return
        together = self.resident // self.tiles
        for group in range(0, self.groups, together):
            launch(
                kernel, min(together, self.groups - group) * self.tiles,
                *arguments(start, stop, group), WAIT=True, launch_cooperative_grid=True,
                **constants,
            )  # fmt: skip

    def missing(self, t):
        """Fills what programs exchange with a NaN that they never write."""
        if self.waits and not self.whole:
            t.view(torch.int16 if t.itemsize == 2 else torch.int32).fill_(-1)
        return t


@operator("slstm_triton_forward")
def _forward(
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    exp_forget: bool, clip: float, trains: bool,
) -> list[Tensor]:  # fmt: skip
    B, T, _, H, D = x.shape
    plan = _Plan(B, H, D, x.dtype, x.device)
    outputs = _outputs(x, exp_forget, trains)
    h_all, *last, saved = outputs
    R, saved = recurrent_kernel.to(x.dtype), saved if trains else None
    given = (x, R, bias, hold, reset, recurrent_scale)
    if plan.whole:
        launch(
            _kernels("whole").forward, plan.groups, *given, h, c, n, m, h_all, saved, *last,
            B, T, H, EXP_FORGET=exp_forget, **plan.forward,
        )  # fmt: skip
        return outputs
    plan.missing(h_all)
    first = None if h is None else h.to(x.dtype)

    def arguments(start, stop, group):
        before = (h, c, n, m) if start == 0 else last
        return *given, first, *before, h_all, saved, *last, B, T, H, start, stop, group

    plan.launch_split(_kernels("split").forward, arguments, 0, T, EXP_FORGET=exp_forget)
    return outputs


def _outputs(x, exp_forget, trains):
    """Empty tensors: h, the last h, c, n, m, and what the backward pass needs."""
    B, T, _, H, D = x.shape
    outputs = [x.new_empty(B, T, H, D)]
    outputs += [x.new_empty(B, H, D, dtype=torch.float32) for _ in range(4)]
    saved = (6 if exp_forget else 7, B, T, H, D) if trains else (0,)
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
    B, T, _, H, D = x.shape
    plan = _Plan(B, H, D, x.dtype, x.device)
    R = recurrent_kernel.to(x.dtype)
    dx = plan.missing(torch.empty_like(x))
    d_first = [torch.empty_like(c) for _ in range(3)]
    given = (dh, saved, R, hold, reset, recurrent_scale, c0, n0)
    options = {"EXP_FORGET": exp_forget, "CLIP": clip > 0}
    if plan.whole:
        launch(
            _kernels("whole").backward, plan.groups, *given, dh_last, dc, dn, c, n, dx, *d_first,
            B, T, H, clip, **options, **plan.backward,
        )  # fmt: skip
    else:

        def arguments(start, stop, group):
            after = (dh_last, dc, dn) if stop == T else d_first
            return *given, *after, c, n, dx, *d_first, B, T, H, start, stop, group, clip

        plan.launch_split(_kernels("split").backward, arguments, -1, T, True, **options)
    first = None if h0 is None else h0.to(x.dtype)
    tile = {"BK": min(64, power(D)), "BN": min(64, power(D)), "L": 64}
    if x.dtype == torch.float32:
        tile["L"] = 32
    programs = 4 * H * -(-D // tile["BK"]) * -(-D // tile["BN"])
    splits = max(1, min(2 * plan.processors // programs, B * T // 256))
    rows = -(-B * T // (splits * tile["L"])) * tile["L"]
    dR = x.new_empty(splits, H, D, 4, D, dtype=torch.float32)
    launch(
        _kernels().kernel_gradient, splits * programs, h, dx, first, reset, recurrent_scale, dR,
        B, T, H, rows, D=D, PREC=precision(x.dtype), num_warps=4, **tile,
    )  # fmt: skip
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
    last = (torch.zeros_like(c) if d is None else d.contiguous() for d in (dh_last, dc, dn))
    dx, dR, dbias, dh, dc, dn = _backward(dh, *last, *tensors, *ctx.options)
    # The state's true value is (c, n) exp(m).
    state = [None] * 4 if c0 is None else [dh, dc, dn, c0 * dc + n0 * dn]
    return dx, dR, None if bias is None else dbias, *state, *[None] * 6


_forward.register_autograd(_gradient, setup_context=_save)
no_second_derivative(_backward, "sLSTM")
