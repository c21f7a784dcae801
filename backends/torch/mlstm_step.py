"""One step of the mLSTM in Triton: reads the state once, writes it once."""

import triton
import triton.language as tl
from keras_xlstm.backends.torch.mlstm_gates import _log_sigmoid
from keras_xlstm.backends.torch.mlstm_kernels import NEVER


@triton.jit
def step(
    q_p, k_p, v_p, i_p, f_p, C_p, n_p, m_p, h_p, C_out_p, n_out_p, m_out_p, scale, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, P: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """Eqs. 19-27 for one head and BV of its values; P is K as a power of two."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    ck, cv = tl.arange(0, P), tile * BV + tl.arange(0, BV)
    n = tl.load(n_p + bh * K + ck, mask=ck < K, other=0.0)
    m = tl.load(m_p + bh)
    i = tl.load(i_p + bh).to(tl.float32)
    i = _log_sigmoid(i) if SIGMOID else i
    log_f = _log_sigmoid(tl.load(f_p + bh).to(tl.float32))
    # The official zero state is a fresh start: nothing there to weigh against i.
    fresh = (m == 0.0) & (tl.max(tl.abs(n), 0) == 0.0)
    new_m = tl.where(fresh, i, tl.maximum(log_f + m, i))
    keep, add = tl.exp((m - new_m) + log_f), tl.exp(i - new_m)
    q = tl.load(q_p + bh * K + ck, mask=ck < K, other=0.0).to(tl.float32) * scale
    k = tl.load(k_p + bh * K + ck, mask=ck < K, other=0.0).to(tl.float32)
    n = tl.where(n == 0.0, 0.0, keep * n) + add * k
    r = tl.sum(q * n, 0)
    if tile == 0:
        tl.store(n_out_p + bh * K + ck, n, mask=ck < K)
        tl.store(m_out_p + bh, tl.where(new_m <= NEVER / 2, 0.0, new_m))
    v = tl.load(v_p + bh * V + cv, mask=cv < V, other=0.0).to(tl.float32)
    h = tl.zeros((BV,), tl.float32)
    for start in tl.static_range(0, K, BK):
        rows = start + tl.arange(0, BK)
        q = tl.load(q_p + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32) * scale
        k = tl.load(k_p + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32)
        o = bh * K * V + rows[:, None] * V + cv[None, :]
        there = (rows[:, None] < K) & (cv[None, :] < V)
        C = tl.load(C_p + o, mask=there, other=0.0)
        C = tl.where(C == 0.0, 0.0, keep * C) + (add * k)[:, None] * v[None, :]
        tl.store(C_out_p + o, C, mask=there)
        h += tl.sum(q[:, None] * C, 0)
    floor = tl.exp(tl.where(new_m > -80.0, -new_m, 80.0))
    h /= tl.maximum(tl.abs(r), floor) + eps
    tl.store(h_p + bh * V + cv, h.to(h_p.dtype.element_ty), mask=cv < V)
