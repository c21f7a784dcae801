"""The mLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

Opaque operators, so that torch.compile, activation checkpointing and CUDA graphs take them whole.
Triton itself is imported on the first launch.
"""

import functools

import torch
from keras_xlstm.backends.kernels.mlstm import tiles
from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.log_space import carried, holds_something
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.custom_op import no_second_derivative, operator
from keras_xlstm.backends.torch.device import name
from keras_xlstm.backends.torch.launch import cached_plan, launch, on_stream
from keras_xlstm.backends.torch.tracing import is_eager
from torch import Tensor


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these tensors (None: here at all), or None."""
    if q is None:
        return device.missing()
    return device.unsupported(q) or tiles.unsupported(q.shape[-1], v.shape[-1], chunk_size)


def not_preferred(q=None, v=None, chunk_size=None):
    return None  # where it can run it is the better choice


def mlstm(q, k, v, i, f, state, segment_ids, *, input_gate, eps, chunk_size, states=True):
    """As `reference.mlstm`, for tensors of any dtype in `unsupported`; `state` may be None. Without
    `states` the last state is None."""
    chunk = chunk_size or tiles.chunk_steps(q.shape[1], q.shape[-1], v.shape[-1], name(q.dtype))
    if state is None and segment_ids is None and not states and is_eager(q, k, v, i, f):
        given = tuple(t.contiguous() for t in (q, k, v, i, f))
        return cached_plan(_Whole, given, input_gate == "sigmoid", float(eps), chunk)(given), None
    tensors = (q, k, v, i, f, *(state or ()))
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    q, k, v, i, f = (t.contiguous() for t in (q, k, v, i, f))
    if state is not None:
        state = tuple(t.float().contiguous() for t in state)
    if q.shape[1] == 1 and not trains and state is not None:  # one segment: that of the state
        if segment_ids is not None:
            state = tuple(_kept(t, segment_ids[:, 0] == 0) for t in state)
        h, *state = _step(q, k, v, i, f, *state, input_gate == "sigmoid", eps)
        return h, tuple(state)
    C, n, m = state or (None, None, None)
    if m is not None:
        m = carried(m, holds_something(C, n))
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    h, *state = _forward(
        q, k, v, i, f, C, n, m, segment_ids, input_gate == "sigmoid", float(eps), chunk, trains,
        states,
    )  # fmt: skip
    return h, tuple(state[:3]) if states else None


def _kept(t, keep):
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, 0.0)


@functools.cache
def _launches():
    from keras_xlstm.backends.torch import mlstm_plan

    return mlstm_plan


@operator("mlstm_forward")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None, n: Tensor | None, m: Tensor | None, segment_ids: Tensor | None,
    sigmoid: bool, eps: float, chunk: int, trains: bool, states: bool,
) -> list[Tensor]:  # fmt: skip
    """h, with `states` the last C, n, m, and if it trains what the backward pass needs."""
    given = q, k, v, i, f, C, n, m, segment_ids
    run = cached_plan(_launches().forward, given, sigmoid, chunk)
    results = _results(q, v, states)
    kept = on_stream(q.device, run, given, results, eps)
    return [*results, kept] if trains else results


def _results(q, v, states):
    """Empty tensors: h, the last C, n, m."""
    B, _, H, K = q.shape
    shapes = [(B, H, K, v.shape[-1]), (B, H, K), (B, H)] if states else []
    return [torch.empty_like(v), *(q.new_empty(s, dtype=torch.float32) for s in shapes)]


@_forward.register_fake
def _(q, k, v, i, f, C, n, m, segment_ids, sigmoid, eps, chunk, trains, states):
    kept = [_launches().kept(q, v, chunk).new(q)] if trains else []
    return _results(q, v, states) + kept


@operator("mlstm_backward")
def _backward(
    dh: Tensor, dC: Tensor | None, dn: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None, h: Tensor,
    kept: Tensor, sigmoid: bool, chunk: int, states: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, i, f, and with `states` of the first C and n."""
    given = dh, dC, dn, q, k, v, i, f, segment_ids, h, kept
    run = cached_plan(_launches().backward, given, sigmoid, chunk)
    gradients = _gradients(q, k, v, i, f, states)
    on_stream(q.device, run, given, gradients)
    return gradients


def _gradients(q, k, v, i, f, states):
    B, _, H, K = q.shape
    shapes = [(B, H, K, v.shape[-1]), (B, H, K)] if states else []
    outputs = [torch.empty_like(t) for t in (q, k, v, i, f)]
    return outputs + [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


@_backward.register_fake
def _(dh, dC, dn, q, k, v, i, f, segment_ids, h, kept, sigmoid, chunk, states):
    return _gradients(q, k, v, i, f, states)


no_second_derivative(_backward, "mLSTM")


def _save(ctx, inputs, output):
    q, k, v, i, f, C, n, _, segment_ids, sigmoid, _, chunk, *_ = inputs
    h, kept = output[0], output[-1]
    ctx.save_for_backward(q, k, v, i, f, segment_ids, h, kept, C, n)
    ctx.options = sigmoid, chunk
    ctx.set_materialize_grads(False)


def _gradient(ctx, gradients):
    dh, dC, dn = gradients[:3] if len(gradients) > 2 else (gradients[0], None, None)
    *saved, C, n = ctx.saved_tensors
    dh = torch.zeros_like(saved[6]) if dh is None else dh.contiguous()
    dC, dn = (None if d is None else d.contiguous() for d in (dC, dn))
    if dC is not None or dn is not None:
        B, _, H, K = saved[0].shape
        shape = (B, H, K, saved[2].shape[-1])
        dC = dh.new_zeros(shape, dtype=torch.float32) if dC is None else dC
        dn = dh.new_zeros(shape[:3], dtype=torch.float32) if dn is None else dn
    gradients = _backward(dh, dC, dn, *saved, *ctx.options, C is not None)
    if C is None:
        return *gradients, *[None] * 9
    *gradients, dC, dn = gradients
    # The state's true value is (C, n) exp(m).
    dm = (C * dC).sum((-2, -1)) + (n * dn).sum(-1)
    return *gradients, dC, dn, dm, *[None] * 6


_forward.register_autograd(_gradient, setup_context=_save, hidden=1)  # what was kept


_NOTHING = None, None, None, None  # state, segments


class _Whole:
    """Calls alike of whole sequences and h alone, in PyTorch's eager mode. For a small sequence the
    general way, with all that a call may have, takes longer than the kernels."""

    def __init__(self, given, sigmoid, eps, chunk):
        self.eps, self.options = eps, (sigmoid, chunk)
        self.device = given[0].device
        self.forward = cached_plan(_launches().forward, (*given, *_NOTHING), *self.options)
        self.backward = self.aligned = None

    def __call__(self, given):
        if torch.is_grad_enabled() and any([t.requires_grad for t in given]):
            return _WholeWithGradient.apply(self, *given)
        return self.run_forward(given)[0]

    def run_forward(self, given):
        h = torch.empty_like(given[2])
        return h, on_stream(self.device, self.forward, (*given, *_NOTHING), (h,), self.eps)

    def run_backward(self, dh, given, h, kept):
        dh = dh.contiguous()
        # A gradient may be a part of something, and what was saved may come from elsewhere.
        aligned = [t.data_ptr() % 16 for t in (dh, *given, h, kept)]
        if self.backward is None:
            self.backward = cached_plan(
                _launches().backward, _of_backward(dh, given, h, kept), *self.options
            )
            self.aligned = aligned
        if torch.is_grad_enabled() or aligned != self.aligned:
            return _backward(*_of_backward(dh, given, h, kept), *self.options, False)
        gradients = [torch.empty_like(t) for t in given]
        on_stream(self.device, self.backward, _of_backward(dh, given, h, kept), gradients)
        return gradients


def _of_backward(dh, given, h, kept):
    return dh, None, None, *given, None, h, kept


class _WholeWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, *given):
        h, kept = whole.run_forward(given)
        ctx.save_for_backward(*given, h, kept)
        ctx.whole = whole
        return h

    @staticmethod
    def backward(ctx, dh):
        *given, h, kept = ctx.saved_tensors
        return None, *ctx.whole.run_backward(dh, given, h, kept)


@functools.cache
def _step_kernel():
    from keras_xlstm.backends.kernels.mlstm.step import step

    return step


@operator("mlstm_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    sigmoid: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    B, H, K, V = C.shape
    outputs = [torch.empty_like(t) for t in (v, C, n, m)]
    BV, warps = tiles.step(B * H, K, V)
    launch(
        _step_kernel(), B * H * -(-V // BV), q, k, v, i, f, C, n, m, *outputs, K**-0.5, eps,
        K=K, V=V, P=power(K), BV=BV, SIGMOID=sigmoid, num_warps=warps,
    )  # fmt: skip
    return outputs


@_step.register_fake
def _(q, k, v, i, f, C, n, m, sigmoid, eps):
    return [torch.empty_like(t) for t in (v, C, n, m)]
