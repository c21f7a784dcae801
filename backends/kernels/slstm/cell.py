"""The sLSTM in Triton: loops over time that keep the recurrent kernel and the states on chip.

    recurrence_whole.py   a program has all units of a head: steps pass h on in registers
    recurrence_split.py   a program has some units of a head: programs exchange h at every step
    kernel_gradient.py    the gradient of the recurrent kernel, over all steps at once
    here                  the cell, its gradient, and what the loops load and store

For numbers of 16 bits and whole 32 units, on NVIDIA's GPUs, in PTX lane by lane (warp.py,
mailbox.py):

    cluster.py            a head's programs are a cluster, or one program has all of its units
    grid.py               as recurrence_split.py, for heads too large for that

Names: _p pointers, o_ offsets; comments give tile shapes. Tensors are contiguous: x and its
gradient (B, T, 4, H, D), h (B, T, H, D), states (B, H, D), the recurrent kernel (H, D, 4, D). What
the backward pass needs is in `saved` (planes, B, T, H, D): i, f, z, o as they act, c, n, and the
slope of f. m is a constant: the output does not depend on it.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm import warp

NEVER = tl.constexpr(-(2.0**100))
jit_kernel = triton.jit(do_not_specialize=["B", "T", "H", "start", "stop", "group", "rows"])


@triton.jit
def _exp(x, FAST: tl.constexpr):
    return warp.exp(x) if FAST else tl.exp(x)


@triton.jit
def _log(x, FAST: tl.constexpr):
    return warp.log(x) if FAST else tl.log(x)


@triton.jit
def _over(a, b, FAST: tl.constexpr):
    """a / b."""
    return a * warp.reciprocal(b) if FAST else a / b


@triton.jit
def tanh(x, FAST: tl.constexpr):
    y = _exp(-2.0 * tl.abs(x), FAST)
    far = _over(1.0 - y, 1.0 + y, FAST)
    t = x * x
    near = x * (1.0 + t * (-1 / 3 + t * (2 / 15 + t * (-17 / 315 + t * (62 / 2835)))))
    return tl.where(t < 0.06, near, tl.where(x < 0.0, -far, far))


@triton.jit
def cell(i, f, z, o, c, n, m, EXP_FORGET: tl.constexpr, FAST: tl.constexpr = False):
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
    z, o = tanh(z, FAST), _over(1.0, 1.0 + _exp(-o, FAST), FAST)
    c = f * c + i * z
    n = f * n + i
    return o * (c / n), c, n, new_m, i, f, z, o, slope


@triton.jit
def cell_gradient(
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
def split_gates(g):
    """i, f, z, o, which are the last two axes (2, 2)."""
    i_z, f_o = tl.split(g)
    i, z = tl.split(i_z)
    f, o = tl.split(f_o)
    return i, f, z, o


@triton.jit
def mask_if(condition, in_bounds):
    """A mask where a scalar condition holds. (The interpreter's & would make it whole numbers.)"""
    return tl.where(condition, in_bounds, in_bounds & False)


@triton.jit
def first_state(c0_p, n0_p, m0_p, o, in_bounds):
    """c, n, m of a state; what holds nothing (the official zeros) is a fresh start."""
    c = tl.load(c0_p + o, mask=in_bounds, other=0.0)
    n = tl.load(n0_p + o, mask=in_bounds, other=0.0)
    m = tl.load(m0_p + o, mask=in_bounds, other=0.0)
    return c, n, tl.where(n != 0.0, m, NEVER)


@triton.jit
def save(p, plane, o, in_bounds, i, f, z, o_gate, c, n, slope, EXP_FORGET: tl.constexpr):
    tl.store(p + o, i, mask=in_bounds)
    tl.store(p + plane + o, f, mask=in_bounds)
    tl.store(p + 2 * plane + o, z, mask=in_bounds)
    tl.store(p + 3 * plane + o, o_gate, mask=in_bounds)
    tl.store(p + 4 * plane + o, c, mask=in_bounds)
    tl.store(p + 5 * plane + o, n, mask=in_bounds)
    if not EXP_FORGET:
        tl.store(p + 6 * plane + o, slope, mask=in_bounds)


@triton.jit
def load_saved(p, plane, o, in_bounds, EXP_FORGET: tl.constexpr):
    i = tl.load(p + o, mask=in_bounds, other=0.0)
    f = tl.load(p + plane + o, mask=in_bounds, other=0.0)
    z = tl.load(p + 2 * plane + o, mask=in_bounds, other=0.0)
    o_gate = tl.load(p + 3 * plane + o, mask=in_bounds, other=0.0)
    slope = i
    if not EXP_FORGET:
        slope = tl.load(p + 6 * plane + o, mask=in_bounds, other=0.0)
    return i, f, z, o_gate, slope


@triton.jit
def state_before(p, plane, o, in_bounds, t, c0_p, n0_p, o_state, at):
    """c and n before step t: saved, or the initial ones (None: zero)."""
    c = tl.load(p + 4 * plane + o, mask=mask_if(t > 0, in_bounds), other=0.0)
    n = tl.load(p + 5 * plane + o, mask=mask_if(t > 0, in_bounds), other=0.0)
    if c0_p is not None:
        c += tl.load(c0_p + o_state, mask=mask_if(t == 0, at), other=0.0)
        n += tl.load(n0_p + o_state, mask=mask_if(t == 0, at), other=0.0)
    return c, n


@triton.jit
def load_gates(p, step, in_bounds):
    """i, f, z, o at p, which are `step` apart."""
    i = tl.load(p, mask=in_bounds, other=0.0)
    f = tl.load(p + step, mask=in_bounds, other=0.0)
    z = tl.load(p + 2 * step, mask=in_bounds, other=0.0)
    o = tl.load(p + 3 * step, mask=in_bounds, other=0.0)
    return i, f, z, o


@triton.jit
def store_gates(p, step, in_bounds, i, f, z, o):
    tl.store(p, i, mask=in_bounds)
    tl.store(p + step, f, mask=in_bounds)
    tl.store(p + 2 * step, z, mask=in_bounds)
    tl.store(p + 3 * step, o, mask=in_bounds)


@triton.jit
def limited(dh, scale_p, o_scale, at, starts, clip, CLIP: tl.constexpr):
    if scale_p is not None:
        dh *= tl.load(scale_p + o_scale, mask=at, other=0.0)
    if CLIP:
        dh = tl.minimum(tl.maximum(dh, -clip), clip)
    if starts is not None:
        dh = tl.where(starts, 0.0, dh)
    return dh
