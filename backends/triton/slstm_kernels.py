"""The sLSTM in Triton: loops over time that keep the recurrent kernel and the states on chip.

    slstm_whole.py   a program has all units of a head: steps pass h on in registers
    slstm_split.py   a program has some units of a head: programs exchange h at every step
    here             what both are made of; and the gradient of the recurrent kernel and the bias,
                     over all steps at once

For numbers of 16 bits and whole 32 units, on NVIDIA's GPUs, in PTX lane by lane (slstm_lanes.py,
slstm_messages.py):

    slstm_cluster.py a head's programs are a cluster, or one program has all of its units
    slstm_wide.py    as slstm_split.py, for heads too large for that

Names: _p pointers, o_ offsets; comments give tile shapes. Tensors are contiguous: x and its
gradient (B, T, 4, H, D), h (B, T, H, D), states (B, H, D), the recurrent kernel (H, D, 4, D). What
the backward pass needs is in `saved` (planes, B, T, H, D): i, f, z, o as they act, c, n, and the
slope of f. m is a constant: the output does not depend on it.
"""

import triton
import triton.language as tl
from keras_xlstm.backends.triton import slstm_lanes as lanes

NEVER = tl.constexpr(-(2.0**100))
_kernel = triton.jit(do_not_specialize=["B", "T", "H", "start", "stop", "group", "rows"])


@triton.jit
def _exp(x, FAST: tl.constexpr):
    return lanes.exp(x) if FAST else tl.exp(x)


@triton.jit
def _log(x, FAST: tl.constexpr):
    return lanes.log(x) if FAST else tl.log(x)


@triton.jit
def _over(a, b, FAST: tl.constexpr):
    """a / b."""
    return a * lanes.reciprocal(b) if FAST else a / b


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    y = _exp(-2.0 * tl.abs(x), FAST)
    far = _over(1.0 - y, 1.0 + y, FAST)
    t = x * x
    near = x * (1.0 + t * (-1 / 3 + t * (2 / 15 + t * (-17 / 315 + t * (62 / 2835)))))
    return tl.where(t < 0.06, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _cell(i, f, z, o, c, n, m, EXP_FORGET: tl.constexpr, FAST: tl.constexpr = False):
    """Eqs. 8-17, and the slope of log f. FAST: by PTX without denormal numbers."""
    if EXP_FORGET:
        log_f, slope = f, f
    else:
        y = _exp(-tl.abs(f), FAST)
        log_f = tl.minimum(f, 0.0) - _log(1.0 + y, FAST)
        slope = _over(tl.where(f < 0.0, 1.0, y), 1.0 + y, FAST)
    new_m = tl.maximum(log_f + m, i)
    i = _exp(i - new_m, FAST)
    f = _exp((m - new_m) + log_f, FAST)
    z, o = _tanh(z, FAST), _over(1.0, 1.0 + _exp(-o, FAST), FAST)
    c = f * c + i * z
    n = f * n + i
    return o * (c / n), c, n, new_m, i, f, z, o, slope


@triton.jit
def _cell_gradient(
    dh, dc, dn, c, n, c_in, n_in, i, f, z, o, slope, EXP_FORGET: tl.constexpr,
    FAST: tl.constexpr = False,
):  # fmt: skip
    """The gate gradients, and those of the c and n before."""
    # Nothing there: beyond the units, or a held fresh start.
    r = tl.where(n == 0.0, 0.0, _over(1.0, n, FAST))
    y = o * r
    h = y * c
    dc += dh * y
    dn -= dh * h * r
    di = i * (z * dc + dn)
    df = f * (c_in * dc + n_in * dn)
    if not EXP_FORGET:
        df *= slope
    dz = i * dc * ((1.0 - z) * (1.0 + z))
    do = dh * h * (1.0 - o)
    return di, df, dz, do, f * dc, f * dn


@triton.jit
def _four(g):
    """i, f, z, o, which are the last two axes (2, 2)."""
    i_z, f_o = tl.split(g)
    i, z = tl.split(i_z)
    f, o = tl.split(f_o)
    return i, f, z, o


@triton.jit
def _if(condition, there):
    """A mask where a scalar condition holds. (The interpreter's & would make it whole numbers.)"""
    return tl.where(condition, there, there & False)


@triton.jit
def _first(c0_p, n0_p, m0_p, o, there):
    """c, n, m of a state; what holds nothing (the official zeros) is a fresh start."""
    c = tl.load(c0_p + o, mask=there, other=0.0)
    n = tl.load(n0_p + o, mask=there, other=0.0)
    m = tl.load(m0_p + o, mask=there, other=0.0)
    return c, n, tl.where(n != 0.0, m, NEVER)


@triton.jit
def _save(p, plane, o, there, i, f, z, o_gate, c, n, slope, EXP_FORGET: tl.constexpr):
    tl.store(p + o, i, mask=there)
    tl.store(p + plane + o, f, mask=there)
    tl.store(p + 2 * plane + o, z, mask=there)
    tl.store(p + 3 * plane + o, o_gate, mask=there)
    tl.store(p + 4 * plane + o, c, mask=there)
    tl.store(p + 5 * plane + o, n, mask=there)
    if not EXP_FORGET:
        tl.store(p + 6 * plane + o, slope, mask=there)


@triton.jit
def _saved(p, plane, o, there, EXP_FORGET: tl.constexpr):
    i = tl.load(p + o, mask=there, other=0.0)
    f = tl.load(p + plane + o, mask=there, other=0.0)
    z = tl.load(p + 2 * plane + o, mask=there, other=0.0)
    o_gate = tl.load(p + 3 * plane + o, mask=there, other=0.0)
    slope = i
    if not EXP_FORGET:
        slope = tl.load(p + 6 * plane + o, mask=there, other=0.0)
    return i, f, z, o_gate, slope


@triton.jit
def _before(p, plane, o, there, t, c0_p, n0_p, o_state, at):
    """c and n before step t: saved, or the initial ones (None: zero)."""
    c = tl.load(p + 4 * plane + o, mask=_if(t > 0, there), other=0.0)
    n = tl.load(p + 5 * plane + o, mask=_if(t > 0, there), other=0.0)
    if c0_p is not None:
        c += tl.load(c0_p + o_state, mask=_if(t == 0, at), other=0.0)
        n += tl.load(n0_p + o_state, mask=_if(t == 0, at), other=0.0)
    return c, n


@triton.jit
def _gates(p, step, there):
    """i, f, z, o at p, which are `step` apart."""
    i = tl.load(p, mask=there, other=0.0)
    f = tl.load(p + step, mask=there, other=0.0)
    z = tl.load(p + 2 * step, mask=there, other=0.0)
    o = tl.load(p + 3 * step, mask=there, other=0.0)
    return i, f, z, o


@triton.jit
def _store_gates(p, step, there, i, f, z, o):
    tl.store(p, i, mask=there)
    tl.store(p + step, f, mask=there)
    tl.store(p + 2 * step, z, mask=there)
    tl.store(p + 3 * step, o, mask=there)


@triton.jit
def _limited(dh, scale_p, o_scale, at, starts, clip, CLIP: tl.constexpr):
    if scale_p is not None:
        dh *= tl.load(scale_p + o_scale, mask=at, other=0.0)
    if CLIP:
        dh = tl.minimum(tl.maximum(dh, -clip), clip)
    if starts is not None:
        dh = tl.where(starts, 0.0, dh)
    return dh


@_kernel
def kernel_gradient(
    h_p, dx_p, first_p, reset_p, scale_p, dR_p, B, T, H, rows,
    D: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A tile (BK of h, BN of a gate) of the recurrent kernel's gradient, summed over `rows` of
    the B T steps. dR (splits, H, D, 4, D). The bias' is summed elsewhere: of what a product reads
    in a pipelined loop and something else, too, Triton (3.6, 3.9) keeps a buffer too few."""
    tiles_k: tl.constexpr = (D + BK - 1) // BK
    tiles_n: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0)
    tile_k, pid = pid % tiles_k, pid // tiles_k
    tile_n, pid = pid % tiles_n, pid // tiles_n
    gate, pid = pid % 4, pid // 4
    head, split = pid % H, (pid // H).to(tl.int64)
    k, u = tile_k * BK + tl.arange(0, BK), tile_n * BN + tl.arange(0, BN)
    HD = H * D
    dtype: tl.constexpr = h_p.dtype.element_ty
    acc = tl.zeros((BK, BN), tl.float32)
    # Offsets within a block of rows are short: pointers would fill the registers.
    block = tl.arange(0, L)
    o_dg = block[:, None] * 4 * HD + u[None, :]
    o_h = block[None, :] * HD + k[:, None]
    for step in range(0, rows, L):
        begin = split * rows + tl.cast(step, tl.int64)
        r = begin + block
        t, b = (r % T).to(tl.int32), (r // T).to(tl.int32)
        there = (step + block < rows) & (b < B)
        dg = tl.load(
            dx_p + (begin * 4 + gate) * HD + head * D + o_dg,
            mask=there[:, None] & (u < D)[None, :], other=0.0,
        )  # fmt: skip
        at = there[None, :] & (k < D)[:, None]
        at_h = at & (t > 0)[None, :]
        h = tl.load(h_p + (begin - 1) * HD + head * D + o_h, mask=at_h, other=0.0)
        o_state = b[None, :] * HD + head * D + k[:, None]
        if first_p is not None:
            h += tl.load(first_p + o_state, mask=at & (t == 0)[None, :], other=0.0)
        if reset_p is not None:
            starts = tl.load(reset_p + r, mask=there, other=0) != 0
            h = tl.where(starts[None, :], 0.0, h)
        if scale_p is not None:
            h *= tl.load(scale_p + o_state, mask=at, other=0.0)
        acc = tl.dot(h.to(dtype), dg, acc, input_precision=PREC)
    o_R = ((split * H + head) * D + k[:, None]) * 4 * D + gate * D + u[None, :]
    tl.store(dR_p + o_R, acc, mask=(k < D)[:, None] & (u < D)[None, :])
