"""The mLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

Opaque operators, so that torch.compile, activation checkpointing and CUDA graphs take them whole.
Triton itself is imported on the first launch.
"""

import functools

import torch
from keras_xlstm.backends.kernels.mlstm import plan, tiles
from keras_xlstm.backends.kernels.plan import packed
from keras_xlstm.backends.log_space import NEVER, holds_something
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.cuda_graph import overwrites
from keras_xlstm.backends.torch.custom_op import no_second_derivative, operator
from keras_xlstm.backends.torch.device import name
from keras_xlstm.backends.torch.launch import bound
from torch import Tensor


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these tensors (None: here at all), or None."""
    if q is None:
        return device.missing()
    return device.unsupported(q) or tiles.unsupported(
        q.shape[-1], v.shape[-1], chunk_size, name(q.dtype), device.shared_memory(q.device)
    )


def not_preferred(q=None, v=None, chunk_size=None):
    return None  # where it can run it is the better choice


def mlstm(
    q, k, v, i, f, state, segment_ids, *, input_gate, eps, chunk_size, states=True, native=None
):  # fmt: skip
    """As `reference.mlstm`, for tensors of any dtype in `unsupported`; `state` may be None. Without
    `states` the last state is None. `native(q, k, v, i, f, state, segment_ids)` is what a call with
    create_graph=True differentiates; None: a second derivative is an error."""
    chunk = chunk_size or tiles.chunk_steps(q.shape[1], q.shape[-1], v.shape[-1], name(q.dtype))
    tensors = (q, k, v, i, f, *(state or ()))
    trains = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    q, k, v, i, f = (t.contiguous() for t in (q, k, v, i, f))
    if state is not None:
        state = tuple(t.float().contiguous() for t in state)
    if q.shape[1] == 1 and not trains and state is not None:  # one segment: that of the state
        if segment_ids is not None:
            keep = segment_ids[:, 0] == 0
            state = tuple(torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, 0.0) for t in state)
        step = _step_in_place if overwrites.get() and not torch.compiler.is_compiling() else _step
        h, *state = step(q, k, v, i, f, *state, input_gate == "sigmoid", eps)
        return h, tuple(state)
    C, n, m = state or (None, None, None)
    if m is not None:
        # As log_space.carried, whose number Keras copies to the device: no CUDA graph records that.
        m = torch.where(holds_something(C, n), m, NEVER)
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    h, *state = _forward(
        q, k, v, i, f, C, n, m, segment_ids, input_gate == "sigmoid", float(eps), chunk, trains,
        states, native=native and functools.partial(_by_native, native, states),
    )  # fmt: skip
    return h, tuple(state[:3]) if states else None


def _by_native(native, states, q, k, v, i, f, C, n, m, segment_ids):
    h, state = native(q, k, v, i, f, None if C is None else (C, n, m), segment_ids)
    return (h, *state) if states else (h,)


def plan_call(shape, V, dtypes, segments, sigmoid, chunk, eps=0.0):
    """`plan.Call` for q of this shape and dtypes of q, i and f."""
    dtype, *gates = map(name, dtypes)
    return plan.Call(*shape, V, dtype, tuple(gates), segments, sigmoid, chunk, eps)


def _forward_plan(where, has_state, trains, states, shape, V, *call, aligned):
    dtypes, call = call[:3], call[3:]
    call = plan_call(shape, V, dtypes, *call)
    return plan.forward(device.of(where, dtypes[0]), call, has_state, states, trains, aligned)


def _backward_plan(where, has_state, states, shape, V, *call, aligned):
    dtypes, call = call[:3], call[3:]
    call = plan_call(shape, V, dtypes, *call)
    return plan.backward(device.of(where, dtypes[0]), call, has_state, states, aligned)


def _step_plan(where, overwrites, shape, V, *call, aligned):
    return plan.single_step(plan_call(shape, V, call[:3], False, *call[3:]), overwrites)


@operator("mlstm_forward")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None, n: Tensor | None, m: Tensor | None, segment_ids: Tensor | None,
    sigmoid: bool, eps: float, chunk: int, trains: bool, states: bool,
) -> list[Tensor]:  # fmt: skip
    """h, with `states` the last C, n, m, and if it trains what the backward pass needs."""
    run = bound(
        _forward_plan, q.device, C is not None, trains, states, q.shape, v.shape[3], q.dtype,
        i.dtype, f.dtype, segment_ids is not None, sigmoid, chunk, eps,
    )  # fmt: skip
    given = q, k, v, i, f, C, n, m, segment_ids
    results, saved = run(*[t for t in given if t is not None])
    return [*results, saved] if trains else results


@_forward.register_fake
def _(q, k, v, i, f, C, n, m, segment_ids, sigmoid, eps, chunk, trains, states):
    B, _, H, K = q.shape
    V = v.shape[3]
    shapes = [(B, H, K, V), (B, H, K), (B, H)] if states else []
    results = [torch.empty_like(v), *(q.new_empty(s, dtype=torch.float32) for s in shapes)]
    if trains:
        call = plan_call(q.shape, V, (q.dtype, i.dtype, f.dtype), False, sigmoid, chunk)
        size = packed(plan.saved(call).values())[1]
        results.append(q.new_empty(size, dtype=torch.uint8))
    return results


@operator("mlstm_backward")
def _backward(
    dh: Tensor, dC: Tensor | None, dn: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None, h: Tensor,
    saved: Tensor, sigmoid: bool, chunk: int, states: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, i, f, and with `states` of the first C and n."""
    run = bound(
        _backward_plan, q.device, dC is not None, states, q.shape, v.shape[3], q.dtype, i.dtype,
        f.dtype, segment_ids is not None, sigmoid, chunk,
    )  # fmt: skip
    given = dh, dC, dn, q, k, v, i, f, segment_ids, h, saved
    return run(*[t for t in given if t is not None])[0]


@_backward.register_fake
def _(dh, dC, dn, q, k, v, i, f, segment_ids, h, saved, sigmoid, chunk, states):
    B, _, H, K = q.shape
    shapes = [(B, H, K, v.shape[-1]), (B, H, K)] if states else []
    outputs = [torch.empty_like(t) for t in (q, k, v, i, f)]
    return outputs + [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


no_second_derivative(_backward, "mLSTM")


def _save(ctx, inputs, output):
    q, k, v, i, f, C, n, m, segment_ids, sigmoid, _, chunk, *_ = inputs
    h, saved = output[0], output[-1]
    ctx.save_for_backward(q, k, v, i, f, segment_ids, h, saved, C, n, m)
    ctx.options = sigmoid, chunk
    ctx.set_materialize_grads(False)


def _inputs(ctx):
    q, k, v, i, f, segment_ids, _, _, C, n, m = ctx.saved_tensors
    return q, k, v, i, f, C, n, m, segment_ids


def _gradient(ctx, gradients):
    dh, dC, dn = gradients[:3] if len(gradients) > 2 else (gradients[0], None, None)
    *saved, C, n, _ = ctx.saved_tensors
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


# Hidden: what was saved.
_forward.register_autograd(_gradient, setup_context=_save, hidden=1, inputs=_inputs)


@operator("mlstm_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    sigmoid: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    return _stepped(False, q, k, v, i, f, C, n, m, sigmoid, eps)


def _step_in_place(q, k, v, i, f, C, n, m, sigmoid, eps):
    """`_step`, which writes the next C over C."""
    h, n, m = _stepped(True, q, k, v, i, f, C, n, m, sigmoid, eps)
    return h, C, n, m


def _stepped(overwrites, q, k, v, i, f, C, n, m, sigmoid, eps):
    run = bound(
        _step_plan, q.device, overwrites, q.shape, v.shape[3], q.dtype, i.dtype, f.dtype, sigmoid,
        1, eps,
    )  # fmt: skip
    return run(q, k, v, i, f, C, n, m)[0]


@_step.register_fake
def _(q, k, v, i, f, C, n, m, sigmoid, eps):
    return [torch.empty_like(t) for t in (v, C, n, m)]
