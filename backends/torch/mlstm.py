"""The mLSTM on NVIDIA GPUs: when the Triton kernels run, and their launches as PyTorch operators.

Opaque operators, so that torch.compile, activation checkpointing and CUDA graphs take them whole.
Triton itself is imported on the first launch.
"""

import functools
import importlib
import os

import torch
from keras_xlstm.backends.parts import carried, holds_something
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNKS = (16, 32, 64, 128, 256, 512)


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these tensors (None: on this machine), or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (PyTorch's CUDA builds bring it)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q is None:
        if interpreted or torch.cuda.is_available():
            return None
        return "PyTorch finds no CUDA device"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported program holds PyTorch's own operators alone"
    if q.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, not {str(q.dtype)[6:]}"
    if interpreted:
        if q.dtype != torch.float32:
            return "Triton's interpreter computes float32 alone"
    elif q.device.type != "cuda":
        return f"it needs tensors on a CUDA device, not on {q.device.type}"
    elif q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    if q.shape[-1] > 512 or v.shape[-1] > 1024:
        return (
            "it takes up to 512 key and 1024 value dimensions a head, not "
            f"{q.shape[-1]} and {v.shape[-1]}"
        )
    if chunk_size not in (None, *_CHUNKS):
        return f"its chunk sizes are {', '.join(map(str, _CHUNKS))}, not {chunk_size}"
    return None


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
    chunk = chunk_size or _chunk(q.shape[1], q.shape[-1], v.shape[-1], q.dtype)
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    h, *state = _forward(
        q, k, v, i, f, C, n, m, segment_ids, input_gate == "sigmoid", float(eps), chunk, trains
    )[:4]
    return h, tuple(state)


def _kept(t, keep):
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, 0.0)


def _power(n, least=16):
    return max(least, 1 << (n - 1).bit_length())


def _chunk(T, K, V, dtype):
    """Steps of a chunk. Longer ones write fewer states and compute more pairs."""
    best = 256 if dtype != torch.float32 and K * V > 8192 else 128
    return min(best, _power(T))


@functools.cache
def _kernels():
    return importlib.import_module("keras_xlstm.backends.torch.mlstm_kernels")


@functools.cache
def _shared_memory(device):
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 1 << 18
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# Tiles of `attend`: rows L, columns LN, BX of the contraction, BZ of the output; warps, stages.
def _tiles(role, DX, DZ, dtype, chunk, shared_memory):
    wide = dtype == torch.float32
    BX, BZ = _power(DX), _power(DZ)
    if role in ("h", "dv"):
        BZ = min(BZ, 128 if wide else 256)
    BX = min(BX, 64 if wide else 256)
    L, LN, warps, stages = (32, 32, 4, 1) if wide else (64, 64, 4 if BZ <= 128 else 8, 2)
    if shared_memory < 200_000:
        BX, stages = min(BX, 128), 1
    L = min(L, chunk)
    return {
        "L": L, "LN": min(LN, L), "BX": BX, "BZ": BZ, "BS": min(BX, 64), "ST": stages, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def _outer_tiles(DX, DZ, dtype, chunk, shared_memory):
    wide = dtype == torch.float32
    BX, BZ = min(_power(DX), 64), min(_power(DZ), 64 if wide else 128)
    L, stages = min(32 if wide else 64, chunk), 1 if wide else 2
    return {"BX": BX, "BZ": BZ, "L": L, "ST": stages, "num_warps": 4, "num_stages": stages}


class _Sizes:
    """What every launch of one call shares."""

    def __init__(self, q, v, chunk, segment_ids):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.BH, self.NC = self.B * self.H, -(-self.T // chunk)
        self.chunk, self.dtype = chunk, q.dtype
        self.scale = self.K**-0.5
        self.state_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        precision = "tf32" if q.dtype == torch.float16 else "tf32x3"
        self.common = {
            "LC": chunk, "SEG": segment_ids is not None, "EVEN": self.T % chunk == 0,
            "PREC": precision,
        }  # fmt: skip
        # Sums of whole logs stay exact in float32 up to 2^24.
        self.least = -float(min(1e5, 2**24 // chunk))
        self.shared_memory = _shared_memory(q.device)

    def attend(self, role, x, y, z, S, n, out, own, dot, rho, segment_ids, m, chunks, row, col, h):
        DX, DZ = x.shape[-1], z.shape[-1]
        tiles = _tiles(role, DX, DZ, self.dtype, self.chunk, self.shared_memory)
        grid = (self.BH * self.NC * (self.chunk // tiles["L"]) * -(-DZ // tiles["BZ"]),)
        _kernels().attend[grid](
            x, y, z, S, n, out, own, dot, rho, segment_ids, m, chunks, *row, *col, *h,
            self.T, self.H, self.NC, self.scale, self.eps,
            ROLE=role, DX=DX, DZ=DZ, NS=S.shape[1], **self.common, **tiles,
        )  # fmt: skip


@torch.library.custom_op("keras_xlstm::mlstm_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None, n: Tensor | None, m: Tensor | None, segment_ids: Tensor | None,
    sigmoid: bool, eps: float, chunk: int, trains: bool,
) -> list[Tensor]:  # fmt: skip
    kernels, s = _kernels(), _Sizes(q, v, chunk, segment_ids)
    outputs = _outputs(q, v, chunk, trains=True)
    h, C_last, n_last, m_last, vectors, chunks, m_all, through, states, normalisers = outputs
    u, u_rest, row, row_rest, sign, *_ = vectors
    b, b_rest, peak = q.new_empty((3, *u.shape), dtype=torch.float32)
    gain = torch.empty_like(through)
    kernels.gates[s.BH * s.NC,](
        i, f, segment_ids, u, u_rest, b, b_rest, peak, chunks, s.T, s.H, s.NC,
        LC=chunk, LEAST=s.least, SIGMOID=sigmoid, SEG=segment_ids is not None, num_warps=4,
    )  # fmt: skip
    kernels.chunks[s.BH,](
        chunks, m, m_all, through, gain, m_last, s.NC, HAS_STATE=m is not None, N=128, num_warps=4
    )
    _outer(s, False, k, v, u, u_rest, None, segment_ids, chunks, m_all, states, normalisers)
    _borders(
        s, False, states, normalisers, C, n, through, gain, m_all, C_last, n_last, None, None, None
    )
    s.eps = eps
    s.attend(
        "h", q, k, v, states, normalisers, h, None, None, sign, segment_ids, m_all, chunks,
        (row, row_rest), (u, u_rest), (b, b_rest, peak),
    )  # fmt: skip
    if not trains:
        outputs[4:] = [o.new_empty(0) for o in outputs[4:]]
    return outputs


def _outer(s, reverse, x, z, w, w_rest, rho, segment_ids, chunks, m, states, normalisers):
    DX, DZ = x.shape[-1], z.shape[-1]
    tiles = _outer_tiles(DX, DZ, s.dtype, s.chunk, s.shared_memory)
    grid = (s.BH * s.NC * -(-DX // tiles["BX"]) * -(-DZ // tiles["BZ"]),)
    _kernels().outer[grid](
        x, z, w, w_rest, rho, segment_ids, chunks, m, states, normalisers, s.T, s.H, s.NC,
        DX=DX, DZ=DZ, NS=states.shape[1], REVERSE=reverse, **s.common, **tiles,
    )  # fmt: skip


_BLOCK = 1024  # elements of a state that one program carries


def _parts(K, V):
    return -(-K * V // _BLOCK) + -(-K // _BLOCK)


def _borders(
    s, reverse, states, normalisers, C, n, through, gain, m, C_last, n_last, C_forward, n_forward,
    inner,
):  # fmt: skip
    _kernels().borders[s.BH * _parts(s.K, s.V),](
        states, normalisers, C, n, through, gain, m, C_last, n_last, C_forward, n_forward, inner,
        s.NC, s.scale, KV=s.K * s.V, K=s.K, BLOCK=_BLOCK, HAS_STATE=C is not None,
        REVERSE=reverse, ST=3, num_warps=4,
    )  # fmt: skip


def _outputs(q, v, chunk, trains):
    """Empty tensors: h, the last C, n, m; for the backward pass vectors (5, B * H, NC * LC), chunk
    sums, m at the borders, decays, states and normalisers at the borders."""
    s = _Sizes(q, v, chunk, None)
    C, n = (s.B, s.H, s.K, s.V), (s.B, s.H, s.K)
    outputs = [q.new_empty((s.B, s.T, s.H, s.V))]
    outputs += [q.new_empty(shape, dtype=torch.float32) for shape in (C, n, n[:2])]
    kept = [
        (5, s.BH, s.NC * chunk), (s.BH, s.NC, 4), (s.BH, s.NC + 1), (s.BH, s.NC),
        (s.BH, s.NC + 1, s.K, s.V), (s.BH, s.NC + 1, s.K),
    ]  # fmt: skip
    for j, shape in enumerate(kept):
        dtype = s.state_dtype if j == 4 else torch.float32
        outputs.append(q.new_empty(shape if trains else (0,), dtype=dtype))
    return outputs


@_forward.register_fake
def _(q, k, v, i, f, C, n, m, segment_ids, sigmoid, eps, chunk, trains):
    return _outputs(q, v, chunk, trains)


@torch.library.custom_op("keras_xlstm::mlstm_backward", mutates_args=())
def _backward(
    dh: Tensor, dC: Tensor | None, dn: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None, h: Tensor,
    vectors: Tensor, chunks: Tensor, m: Tensor, through: Tensor, states: Tensor,
    normalisers: Tensor, sigmoid: bool, chunk: int,
) -> list[Tensor]:  # fmt: skip
    kernels, s = _kernels(), _Sizes(q, v, chunk, segment_ids)
    s.eps = 0.0
    gradients = _gradients(q, k, v, i, f)
    dq, dk, dv, di, df, dC_first, dn_first = gradients
    u, u_rest, row, row_rest, sign = vectors
    rho, q_dot, k_dot = torch.empty_like(vectors[:3])
    L = min(32, chunk)
    kernels.denominators[s.BH * s.NC * (chunk // L),](
        h, dh, sign, rho, s.T, s.H, s.NC, V=s.V, BV=min(128, _power(s.V)), L=L, LC=chunk,
        num_warps=4,
    )  # fmt: skip
    dstates = states.new_empty((s.BH, s.NC, s.K, s.V))
    dnormalisers = normalisers.new_empty((s.BH, s.NC, s.K))
    _outer(s, True, q, dh, row, row_rest, rho, segment_ids, chunks, m, dstates, dnormalisers)
    inner = through.new_empty((s.BH, s.NC, _parts(s.K, s.V)))
    _borders(
        s, True, dstates, dnormalisers, dC, dn, through, None, m, dC_first, dn_first, states,
        normalisers, inner,
    )  # fmt: skip
    rows, cols = (row, row_rest), (u, u_rest)
    none = (None, None, None)
    common = (segment_ids, m, chunks)
    s.attend("dq", dh, v, k, states, normalisers, dq, q, q_dot, rho, *common, rows, cols, none)
    s.attend("dk", v, dh, q, dstates, dnormalisers, dk, k, k_dot, rho, *common, cols, rows, none)
    s.attend("dv", k, q, dh, dstates, dnormalisers, dv, None, None, rho, *common, cols, rows, none)
    parts = inner.shape[-1]
    kernels.gate_gradients[s.BH * s.NC,](
        i, f, segment_ids, q_dot, k_dot, inner, di, df, s.T, s.H, s.NC,
        LC=chunk, PARTS=parts, P=_power(parts), LEAST=s.least, SIGMOID=sigmoid,
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
