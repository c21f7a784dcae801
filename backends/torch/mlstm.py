"""The mLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

Opaque operators, so that torch.compile, activation checkpointing and CUDA graphs take them whole.
Triton itself is imported on the first launch.
"""

import functools
import importlib

import torch
from keras_xlstm.backends import mlstm_tiles as tiles
from keras_xlstm.backends.mlstm_tiles import power
from keras_xlstm.backends.parts import carried, holds_something
from keras_xlstm.backends.torch import machine
from keras_xlstm.backends.torch.machine import name, precision
from keras_xlstm.backends.torch.operators import launch, no_second_derivative, operator
from torch import Tensor


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these tensors (None: here at all), or None."""
    if q is None:
        return machine.missing()
    return machine.unsupported(q) or tiles.unsupported(q.shape[-1], v.shape[-1], chunk_size)


def mlstm(q, k, v, i, f, state, segment_ids, *, input_gate, eps, chunk_size):
    """As `native.mlstm`, for tensors of any dtype in `unsupported`; `state` may be None."""
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
    chunk = chunk_size or tiles.chunk_steps(q.shape[1], q.shape[-1], v.shape[-1], name(q.dtype))
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    h, *state = _forward(
        q, k, v, i, f, C, n, m, segment_ids, input_gate == "sigmoid", float(eps), chunk, trains
    )[:4]
    return h, tuple(state)


def _kept(t, keep):
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, 0.0)


@functools.cache
def _kernels(file="kernels"):
    return importlib.import_module(f"keras_xlstm.backends.torch.mlstm_{file}")


class _Sizes:
    """What every launch of one call shares."""

    def __init__(self, q, v, chunk, segment_ids):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.BH, self.NC = self.B * self.H, -(-self.T // chunk)
        self.chunk, self.dtype, self.device = chunk, name(q.dtype), q.device
        self.scale = self.K**-0.5
        self.common = {
            "LC": chunk, "SEG": segment_ids is not None, "EVEN": self.T % chunk == 0,
            "PREC": precision(q.dtype),
        }  # fmt: skip
        # Sums of whole logs stay exact in float32 up to 2^24: a floor of log f, as LEAST_LOG.
        self.least = -float(min(1e5, 2**24 // chunk))
        self.shared_memory = machine.shared_memory(q.device)
        own = tiles.states(self.K, self.V, self.dtype, chunk, self.shared_memory)
        self.state_tiles = own
        self.parts = -(-self.K // own["BX"]) * -(-self.V // own["BZ"])
        # Serial programs read and write least, but there must be enough of them.
        self.serial = 10 * self.BH * self.parts >= 9 * machine.processors(q.device)
        if not self.serial:
            self.parts = -(-self.K * self.V // _BLOCK) + -(-self.K // _BLOCK)

    def attend(
        self, role, x, y, z, S, n, out, own, dot, h, sign, rho, segment_ids, m, chunks, row, col,
        gates=(None, None, None), eps=0.0,
    ):  # fmt: skip
        DX, DZ = x.shape[-1], z.shape[-1]
        own_tiles = tiles.attend(role, DX, DZ, self.dtype, self.chunk, self.shared_memory)
        rows = self.chunk // own_tiles["L"]
        programs = self.BH * self.NC * rows * -(-DZ // own_tiles["BZ"])
        launch(
            _kernels("attend").attend, programs, x, y, z, S, n, out, own, dot, h, sign, rho,
            segment_ids, m, chunks, *row, *col, *gates,
            self.T, self.H, self.NC, self.scale, eps,
            ROLE=role, DX=DX, DZ=DZ, NS=S.shape[1], **self.common, **own_tiles,
        )  # fmt: skip

    def states(
        self, reverse, x, z, w, w_rest, rho, segment_ids, chunks, m, through, S, n, first, last,
        forward=(None, None), inner=None,
    ):  # fmt: skip
        """Fills S and n (B * H, borders, ...), and `last`; `first` and `forward` as (C, n)."""
        programs = self.BH * (1 if self.serial else self.NC)
        own = self.state_tiles
        programs *= -(-self.K // own["BX"]) * -(-self.V // own["BZ"])
        has_state = first[0] is not None
        launch(
            _kernels().states, programs, x, z, w, w_rest, rho, segment_ids, chunks, m, through,
            S, n, *first, *last, *forward, inner, self.T, self.H, self.NC, self.scale,
            DX=self.K, DZ=self.V, NS=S.shape[1], SERIAL=self.serial, REVERSE=reverse,
            HAS_STATE=has_state, **self.common, **own,
        )  # fmt: skip
        if not self.serial:
            launch(
                _kernels().borders, self.BH * self.parts, S, n, *first, through, m, *last, *forward,
                inner, self.NC, self.scale,
                KV=self.K * self.V, K=self.K, BLOCK=_BLOCK, HAS_STATE=has_state, REVERSE=reverse,
                ST=3, num_warps=4,
            )  # fmt: skip


_BLOCK = 1024  # elements of a state that one program of `borders` carries


@operator("mlstm_forward")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None, n: Tensor | None, m: Tensor | None, segment_ids: Tensor | None,
    sigmoid: bool, eps: float, chunk: int, trains: bool,
) -> list[Tensor]:  # fmt: skip
    s = _Sizes(q, v, chunk, segment_ids)
    outputs = _outputs(q, v, chunk, trains=True)
    h, C_last, n_last, m_last, vectors, chunks, m_all, through, states, normalisers = outputs
    u, u_rest, row, row_rest, sign, *_ = vectors
    b, b_rest, peak = q.new_empty((3, *u.shape), dtype=torch.float32)
    launch(
        _kernels("gates").gates, s.BH * s.NC, i, f, segment_ids, u, u_rest, b, b_rest, peak, chunks,
        s.T, s.H, s.NC,
        LC=chunk, LEAST=s.least, SIGMOID=sigmoid, SEG=segment_ids is not None, num_warps=4,
    )  # fmt: skip
    launch(
        _kernels("gates").chunks, s.BH, chunks, m, m_all, through, m_last, s.NC,
        HAS_STATE=m is not None, N=128, num_warps=4,
    )  # fmt: skip
    s.states(
        False, k, v, u, u_rest, None, segment_ids, chunks, m_all, through, states, normalisers,
        (C, n), (C_last, n_last),
    )  # fmt: skip
    s.attend(
        "h", q, k, v, states, normalisers, h, None, None, None, sign, None, segment_ids, m_all,
        chunks, (row, row_rest), (u, u_rest), (b, b_rest, peak), eps,
    )  # fmt: skip
    if not trains:
        outputs[4:] = [o.new_empty(0) for o in outputs[4:]]
    return outputs


def _state_dtype(dtype):
    """Of the states at the borders; float16's range would not do."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _outputs(q, v, chunk, trains):
    """Empty tensors: h, the last C, n, m; for the backward pass vectors (5, B * H, NC * LC), chunk
    sums, m at the borders, decays, states and normalisers at the borders."""
    B, T, H, K = q.shape
    V, BH, NC = v.shape[-1], B * H, -(-T // chunk)
    outputs = [torch.empty_like(v)]
    outputs += [q.new_empty(s, dtype=torch.float32) for s in ((B, H, K, V), (B, H, K), (B, H))]
    kept = [
        (5, BH, NC * chunk), (BH, NC, 4), (BH, NC + 1), (BH, NC), (BH, NC + 1, K, V),
        (BH, NC + 1, K),
    ]  # fmt: skip
    for j, shape in enumerate(kept):
        dtype = _state_dtype(q.dtype) if j == 4 else torch.float32
        outputs.append(q.new_empty(shape if trains else (0,), dtype=dtype))
    return outputs


@_forward.register_fake
def _(q, k, v, i, f, C, n, m, segment_ids, sigmoid, eps, chunk, trains):
    return _outputs(q, v, chunk, trains)


@operator("mlstm_backward")
def _backward(
    dh: Tensor, dC: Tensor | None, dn: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None, h: Tensor,
    vectors: Tensor, chunks: Tensor, m: Tensor, through: Tensor, states: Tensor,
    normalisers: Tensor, sigmoid: bool, chunk: int,
) -> list[Tensor]:  # fmt: skip
    s = _Sizes(q, v, chunk, segment_ids)
    gradients = _gradients(q, k, v, i, f)
    dq, dk, dv, di, df, *d_first = gradients
    u, u_rest, row, row_rest, sign = vectors
    rho, q_dot, k_dot = torch.empty_like(vectors[:3])
    rows, cols, common = (row, row_rest), (u, u_rest), (segment_ids, m, chunks)
    s.attend("dq", dh, v, k, states, normalisers, dq, q, q_dot, h, sign, rho, *common, rows, cols)
    dS = states.new_empty((s.BH, s.NC, s.K, s.V))
    dn_all = normalisers.new_empty((s.BH, s.NC, s.K))
    inner = through.new_empty((s.BH, s.NC, s.parts))
    s.states(
        True, q, dh, *rows, rho, segment_ids, chunks, m, through, dS, dn_all, (dC, dn), d_first,
        (states, normalisers), inner,
    )  # fmt: skip
    common = (None, None, rho, *common, cols, rows)
    s.attend("dk", v, dh, q, dS, dn_all, dk, k, k_dot, *common)
    s.attend("dv", k, q, dh, dS, dn_all, dv, None, None, *common)
    launch(
        _kernels("gates").gate_gradients, s.BH * s.NC, i, f, segment_ids, q_dot, k_dot, inner,
        di, df, s.T, s.H, s.NC,
        LC=chunk, PARTS=s.parts, P=power(s.parts), LEAST=s.least, SIGMOID=sigmoid,
        SEG=segment_ids is not None, num_warps=4,
    )  # fmt: skip
    return gradients


def _gradients(q, k, v, i, f):
    B, _, H, K = q.shape
    outputs = [torch.empty_like(t) for t in (q, k, v, i, f)]
    states = (B, H, K, v.shape[-1]), (B, H, K)
    return outputs + [q.new_empty(shape, dtype=torch.float32) for shape in states]


@_backward.register_fake
def _(
    dh, dC, dn, q, k, v, i, f, segment_ids, h, vectors, chunks, m, through, states, normalisers,
    sigmoid, chunk,
):  # fmt: skip
    return _gradients(q, k, v, i, f)


no_second_derivative(_backward, "mLSTM")


def _save(ctx, inputs, output):
    q, k, v, i, f, C, n, _, segment_ids, sigmoid, _, chunk, _ = inputs
    h, _, _, _, *kept = output
    ctx.save_for_backward(q, k, v, i, f, segment_ids, h, *kept, C, n)
    ctx.options = sigmoid, chunk
    ctx.set_materialize_grads(False)


def _gradient(ctx, gradients):
    dh, dC, dn, *_ = gradients
    *saved, C, n = ctx.saved_tensors
    dh = torch.zeros_like(saved[6]) if dh is None else dh.contiguous()
    dC, dn = (None if d is None else d.contiguous() for d in (dC, dn))
    if dC is not None or dn is not None:
        B, _, H, K = saved[0].shape
        shape = (B, H, K, saved[2].shape[-1])
        dC = dh.new_zeros(shape, dtype=torch.float32) if dC is None else dC
        dn = dh.new_zeros(shape[:3], dtype=torch.float32) if dn is None else dn
    *gradients, dC, dn = _backward(dh, dC, dn, *saved, *ctx.options)
    if C is None:
        return *gradients, *[None] * 8
    # The state's true value is (C, n) exp(m).
    dm = (C * dC).sum((-2, -1)) + (n * dn).sum(-1)
    return *gradients, dC, dn, dm, *[None] * 5


_forward.register_autograd(_gradient, setup_context=_save)


@operator("mlstm_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    sigmoid: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    B, H, K, V = C.shape
    outputs = [torch.empty_like(t) for t in (v, C, n, m)]
    BK, BV = (64, 32) if B * H * V < 64 * 1024 else (32, 64)
    BK, BV = min(BK, power(K)), min(BV, power(V))
    launch(
        _kernels("step").step, B * H * -(-V // BV), q, k, v, i, f, C, n, m, *outputs, K**-0.5, eps,
        K=K, V=V, BK=BK, BV=BV, P=power(K), SIGMOID=sigmoid, num_warps=4,
    )  # fmt: skip
    return outputs


@_step.register_fake
def _(q, k, v, i, f, C, n, m, sigmoid, eps):
    return [torch.empty_like(t) for t in (v, C, n, m)]
