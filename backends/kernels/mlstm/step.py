"""One step of the mLSTM in Triton: reads the state once, writes it once."""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.mlstm.gates import log_sigmoid
from keras_xlstm.backends.kernels.mlstm.inter_chunk import NEVER, load_tile


@triton.jit
def _vector(p, at, size, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.load(p + at)
    else:
        x = tl.load(p + at, mask=at < size, other=0.0)
    return x


@triton.jit
def step(
    q_p, k_p, v_p, i_p, f_p, C_p, n_p, m_p, h_p, C_out_p, n_out_p, m_out_p, scale, eps,
    K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Eqs. 19-27 for one head and BV of its values; P is K as a power of two."""
    FULL: tl.constexpr = V % BV == 0
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    ck, cv = tl.arange(0, P), tile * BV + tl.arange(0, BV)
    # The state, then all else that is read, is under way before anything waits.
    C = load_tile(C_p + bh * K * V, ck, cv, V, K, V, K == P, FULL)
    n = _vector(n_p + bh * K, ck, K, K == P)
    m = tl.load(m_p + bh)
    i = tl.load(i_p + bh).to(tl.float32)
    f = tl.load(f_p + bh).to(tl.float32)
    q = _vector(q_p + bh * K, ck, K, K == P).to(tl.float32) * scale
    k = _vector(k_p + bh * K, ck, K, K == P).to(tl.float32)
    v = _vector(v_p + bh * V, cv, V, FULL).to(tl.float32)
    i = log_sigmoid(i) if SIGMOID else i
    log_f = log_sigmoid(f)
    # The official zero state is a fresh start: nothing there to weigh against i.
    fresh = (m == 0.0) & (tl.max(tl.abs(n), 0) == 0.0)
    new_m = tl.where(fresh, i, tl.maximum(log_f + m, i))
    keep, add = tl.exp((m - new_m) + log_f), tl.exp(i - new_m)
    n = tl.where(n == 0.0, 0.0, keep * n) + add * k
    r = tl.sum(q * n, 0)
    if tile == 0:
        tl.store(n_out_p + bh * K + ck, n, mask=ck < K)
        tl.store(m_out_p + bh, tl.where(new_m <= NEVER / 2, 0.0, new_m))
    floor = tl.exp(tl.where(new_m > -80.0, -new_m, 80.0))
    d = tl.maximum(tl.abs(r), floor) + eps
    # Again, spread over threads as C is: moving what is there would make the loads above wait.
    q = _vector(q_p + bh * K, ck, K, K == P).to(tl.float32) * scale
    k = _vector(k_p + bh * K, ck, K, K == P).to(tl.float32)
    C = tl.where(C == 0.0, 0.0, keep * C) + (add * k)[:, None] * v[None, :]
    o = bh * K * V + ck[:, None] * V + cv[None, :]
    if K == P and FULL:
        tl.store(C_out_p + o, C)
    else:
        tl.store(C_out_p + o, C, mask=(ck[:, None] < K) & (cv[None, :] < V))
    h = tl.sum(q[:, None] * C, 0) / d
    tl.store(h_p + bh * V + cv, h.to(h_p.dtype.element_ty), mask=cv < V)
