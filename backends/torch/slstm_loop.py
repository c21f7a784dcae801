"""The native sLSTM on PyTorch: `reference.slstm` with in-place steps.

PyTorch pays for every small operation and every fresh buffer, so the loop writes into the buffers
that the backward pass reads. Two opaque operators keep `torch.compile` from unrolling the loop.
Time is the second axis here, (H, T, B, D): a step is a view, and all steps of a head one matrix.
"""

import functools

import torch
from keras_xlstm.backends.log_space import NEVER, carried, reported
from keras_xlstm.backends.torch.custom_op import no_second_derivative, operator
from keras_xlstm.backends.torch.tracing import exporting, transforms
from torch import Tensor
from torch.nn import functional as F

_JOINED = 128  # up to how many units heads are multiplied as one
_BLOCK = 32  # steps of the backward pass whose factors are computed at once


def native_slstm(
    plain, x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip,
):  # fmt: skip
    """As `reference.slstm`; None where the reference itself must run. `plain`, which is
    `reference.slstm_forward`, is what a call with create_graph=True differentiates."""
    transformed = transforms()
    if transformed and recurrent_gradient_clip is not None:
        raise ValueError(
            "recurrent_gradient_clip works under PyTorch's autograd; torch.func and forward mode "
            "make derivatives of their own, without it. Leave it out. Received: "
            f"recurrent_gradient_clip={recurrent_gradient_clip}."
        )
    if exporting() or transformed or (x.shape[1] == 1 and recurrent_gradient_clip is None):
        # An exported file must run without this package, and PyTorch's transforms know its own
        # operators alone. And one step alone needs no loop.
        return None
    heads = recurrent_kernel.shape[:2]
    if x.is_cpu and heads[0] > 1 and heads[0] * heads[1] <= _JOINED:
        x, recurrent_kernel, bias, state, recurrent_scale = _joined(
            x, recurrent_kernel, bias, state, recurrent_scale
        )
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, recurrent_kernel, bias, *state)
    )
    clip = recurrent_gradient_clip or 0.0
    h, _, _, _, _, *last = _forward(
        x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale,
        forget_gate == "exp", clip, trains,
        native=functools.partial(_by_plain, plain, forget_gate, recurrent_gradient_clip),
    )  # fmt: skip
    h_last, c, n, m = (s.transpose(0, 1).reshape(-1, *heads) for s in last)
    h = h.permute(2, 1, 0, 3)
    return h.reshape(*h.shape[:2], *heads), (h_last, c, n, reported(m))


def _joined(x, recurrent_kernel, bias, state, recurrent_scale):
    """All heads as one, with a kernel that is zero between them: for few units one product is
    faster than one a head."""
    H, D, _, _ = recurrent_kernel.shape
    between = torch.eye(H, dtype=x.dtype)[:, None, None, :, None]
    R = (recurrent_kernel[:, :, :, None] * between).reshape(1, H * D, 4, H * D)
    return (
        x.reshape(*x.shape[:2], 4, 1, H * D),
        R,
        None if bias is None else bias.reshape(4, 1, H * D),
        tuple(s.reshape(-1, 1, H * D) for s in state),
        None if recurrent_scale is None else recurrent_scale.reshape(-1, 1, H * D),
    )


def _by_plain(plain, forget_gate, clip, *tensors):
    """What `_forward` returns, but for gates, of which nothing is asked."""
    if clip is not None:
        raise RuntimeError(
            "recurrent_gradient_clip clips first derivatives, and has no second ones. Leave it out "
            f"where create_graph=True is given. Received: recurrent_gradient_clip={clip}."
        )
    outputs, _ = plain(*tensors, None, forget_gate, None, keep=False, plain=True)
    h, *last = outputs
    last = [s.transpose(0, 1) for s in last]
    return h.permute(2, 1, 0, 3), None, None, None, None, *last


def _per_step(flags: Tensor) -> Tensor:
    """(B, T) to (T, B, 1)."""
    return flags.t()[:, :, None]


@operator("slstm_forward")
def _forward(
    x: Tensor, recurrent_kernel: Tensor, bias: Tensor | None,
    h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    exp_forget: bool, clip: float, trains: bool,
) -> list[Tensor]:  # fmt: skip
    B, T, _, H, D = x.shape
    # Holds x, then every step's pre-activations, with z and o activated in place.
    gates = x.new_empty(H, T, B, 4, D)
    gates.copy_(x.permute(3, 1, 0, 2, 4))
    if bias is not None:
        gates += bias.transpose(0, 1)[:, None, None]
    R = recurrent_kernel.reshape(H, D, 4 * D)
    scale = None if recurrent_scale is None else recurrent_scale.transpose(0, 1)
    holds = None if hold is None else _per_step(hold)
    resets = None if reset is None else _per_step(reset)

    # Without a backward pass to come, two slots in turn are enough for c, n and m.
    slots = T if trains else 2
    hs = x.new_empty(H, T, B, D)
    cs, ns, ms = (x.new_empty(H, slots, B, D) for _ in range(3))
    h, c, n, m = (s.transpose(0, 1) for s in (h, c, n, m))
    m = carried(m, n != 0)
    steps = [gates.view(H, T, B, 4 * D).unbind(1), *(g.unbind(1) for g in gates.unbind(3))]
    for t, (g, i, f, z, o) in enumerate(zip(*steps, strict=True)):
        old = (h, c, n, m)
        if resets is not None:
            h = h.masked_fill(resets[t], 0.0)
            m = m.masked_fill(resets[t], NEVER)
        g.baddbmm_(h if scale is None else h * scale, R)
        log_f = f if exp_forget else F.logsigmoid(f)
        slot = t % slots
        new_h, new_c, new_n, new_m = hs[:, t], cs[:, slot], ns[:, slot], ms[:, slot]
        torch.maximum(log_f + m, i, out=new_m)
        i = (i - new_m).exp_()
        f = (m - new_m).add_(log_f).exp_()
        torch.mul(f, c, out=new_c).addcmul_(i, z.tanh_())
        torch.mul(f, n, out=new_n).add_(i)
        torch.div(new_c, new_n, out=new_h).mul_(o.sigmoid_())
        h, c, n, m = new = (new_h, new_c, new_n, new_m)
        if holds is not None:
            for a, b in zip(new, old, strict=True):
                torch.where(holds[t], b, a, out=a)
    last = [s.clone(memory_format=torch.contiguous_format) for s in (h, c, n, m)]
    return [hs, cs, ns, ms, gates if trains else gates.new_empty(0), *last]


@_forward.register_fake
def _(
    x, recurrent_kernel, bias, h, c, n, m, hold, reset, recurrent_scale, exp_forget, clip, trains
):
    B, T, _, H, D = x.shape
    slots = T if trains else 2
    gates = (H, T, B, 4, D) if trains else (0,)
    shapes = [(H, T, B, D), *[(H, slots, B, D)] * 3, gates, *[(H, B, D)] * 4]
    return [x.new_empty(shape) for shape in shapes]


@operator("slstm_backward")
def _backward(
    dh: Tensor, dh_last: Tensor, dc: Tensor, dn: Tensor,
    hs: Tensor, cs: Tensor, ns: Tensor, ms: Tensor, gates: Tensor, recurrent_kernel: Tensor,
    h0: Tensor, c0: Tensor, n0: Tensor, m0: Tensor,
    hold: Tensor | None, reset: Tensor | None, recurrent_scale: Tensor | None,
    exp_forget: bool, clip: float, has_bias: bool,
) -> list[Tensor]:  # fmt: skip
    H, T, B, D = hs.shape
    R_transposed = recurrent_kernel.reshape(H, D, 4 * D).transpose(1, 2).contiguous()
    scale = None if recurrent_scale is None else recurrent_scale.transpose(0, 1)
    holds = None if hold is None else _per_step(hold)
    resets = None if reset is None else _per_step(reset)
    first = [s.transpose(0, 1) for s in (h0, c0, n0, carried(m0, n0 != 0))]
    dh_in = dh_last.clone()
    dcn = torch.stack([dc, dn], 2)
    dc, dn = dcn[:, :, :1], dcn[:, :, 1:]
    dx = gates.new_empty(B, T, 4, H, D)
    dR = gates.new_zeros(H, D, 4 * D)
    # In blocks of steps, so that what is computed for a block at once stays in the cache.
    for start in reversed(range(0, T, _BLOCK)):
        block = slice(start, min(start + _BLOCK, T))
        steps = range(block.start, block.stop)
        starts = None if resets is None else resets[block]

        def before(states, initial, fill=0.0, block=block, starts=starts):
            if block.start:
                states = states[:, block.start - 1 : block.stop - 1].clone()
            else:
                states = torch.cat([initial[:, None], states[:, : block.stop - 1]], 1)
            return states if starts is None else states.masked_fill_(starts, fill)

        h, n, m = (s[:, block] for s in (hs, ns, ms))
        i, f, z, o = gates[:, block].unbind(3)
        i = (i - m).exp_()
        slope = None if exp_forget else torch.sigmoid(-f)
        log_f = f if exp_forget else F.logsigmoid(f)
        f = before(ms, first[3], NEVER).sub_(m).add_(log_f).exp_()
        f_slope = f if slope is None else slope.mul_(f)
        h_cn = torch.stack([o / n, -h / n], 3)  # what c and n hear from h
        c_ifz = torch.stack([i * z, f_slope * before(cs, first[1]), i * (1 - z * z)], 3)
        n_if = torch.stack([i, f_slope * before(ns, first[2])], 3)
        h_o = torch.addcmul(h, h, o, value=-1)
        f = f[:, :, :, None]
        if holds is not None:
            held = holds[block][:, :, None]
            f = f.masked_fill(held, 1.0)
            for a in (h_cn, c_ifz, n_if):
                a.masked_fill_(held, 0.0)
            h_o.masked_fill_(held[:, :, 0], 0.0)

        dg = gates.new_empty(H, len(steps), B, 4, D)
        columns = (dh[:, block], h_cn, c_ifz, n_if, h_o, f)
        columns += (dg[..., :3, :], dg[..., :2, :], dg[..., 3, :], dg.flatten(3))
        columns = (reversed(a.unbind(1)) for a in columns)
        for t, dh_t, h_cn, c_ifz, n_if, h_o, f, dg_ifz, dg_if, dg_o, dg_t in zip(
            reversed(steps), *columns, strict=True
        ):
            dh_out = dh_in.add_(dh_t)
            dcn.addcmul_(dh_out[:, :, None], h_cn)
            torch.mul(c_ifz, dc, out=dg_ifz)
            dg_if.addcmul_(n_if, dn)
            torch.mul(h_o, dh_out, out=dg_o)
            dcn.mul_(f)
            dh_in = torch.bmm(dg_t, R_transposed)
            if scale is not None:
                dh_in.mul_(scale)
            if clip:
                dh_in.clamp_(-clip, clip)
            if resets is not None:
                dh_in.masked_fill_(resets[t], 0.0)
            if holds is not None:
                dh_in = torch.where(holds[t], dh_out, dh_in)

        h_in = before(hs, first[0])
        h_in = h_in if scale is None else h_in.mul_(scale[:, None])
        dR.baddbmm_(h_in.flatten(1, 2).transpose(1, 2), dg.flatten(3).flatten(1, 2))
        dx[:, block] = dg.permute(2, 1, 3, 0, 4)
    dbias = dx.sum((0, 1)) if has_bias else dx.new_empty(0)
    dc, dn = dc.squeeze(2), dn.squeeze(2)
    dm = first[1] * dc + first[2] * dn  # the state's true value is (c, n) exp(m)
    # clone, not contiguous: dc and dn share one buffer, and results may not alias.
    layout = torch.contiguous_format
    last = [s.transpose(0, 1).clone(memory_format=layout) for s in (dh_in, dc, dn, dm)]
    return [dx, dR.view(H, D, 4, D), dbias, *last]


@_backward.register_fake
def _(
    dh, dh_last, dc, dn, hs, cs, ns, ms, gates, recurrent_kernel, h0, c0, n0, m0, hold, reset,
    recurrent_scale, exp_forget, clip, has_bias,
):  # fmt: skip
    H, T, B, D = hs.shape
    bias = (4, H, D) if has_bias else (0,)
    shapes = [(B, T, 4, H, D), (H, D, 4, D), bias, *[(B, H, D)] * 4]
    return [hs.new_empty(shape) for shape in shapes]


def _save(ctx, inputs, output):
    x, R, bias, *initial, hold, reset, scale, exp_forget, clip, _ = inputs
    hs, cs, ns, ms, gates, *_ = output
    ctx.save_for_backward(hs, cs, ns, ms, gates, R, *initial, hold, reset, scale, x, bias)
    ctx.options = exp_forget, clip, bias is not None
    # Otherwise every saved buffer, an output too, would come back with zeros as its gradient.
    ctx.set_materialize_grads(False)


def _inputs(ctx):
    *_, R, h, c, n, m, hold, reset, scale, x, bias = ctx.saved_tensors
    return x, R, bias, h, c, n, m, hold, reset, scale


def _gradient(ctx, gradients):
    dh, _, _, _, _, dh_last, dc, dn, _ = gradients
    saved = ctx.saved_tensors[:-2]
    hs = saved[0]
    dh = torch.zeros_like(hs) if dh is None else dh
    dh_last, dc, dn = (torch.zeros_like(hs[:, 0]) if s is None else s for s in (dh_last, dc, dn))
    dx, dR, dbias, *dstate = _backward(dh, dh_last, dc, dn, *saved, *ctx.options)
    return dx, dR, dbias if ctx.options[-1] else None, *dstate, *[None] * 6


_forward.register_autograd(_gradient, setup_context=_save, inputs=_inputs)
no_second_derivative(_backward, "sLSTM")
