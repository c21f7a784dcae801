"""The gradient of the sLSTM's recurrent kernel in Triton, over all steps at once. Conventions as in
cell.py.
"""

from keras_xlstm.backends.kernels.load_triton import tl
from keras_xlstm.backends.kernels.slstm.cell import jit_kernel


@jit_kernel
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
        in_bounds = (step + block < rows) & (b < B)
        dg = tl.load(
            dx_p + (begin * 4 + gate) * HD + head * D + o_dg,
            mask=in_bounds[:, None] & (u < D)[None, :], other=0.0,
        )  # fmt: skip
        at = in_bounds[None, :] & (k < D)[:, None]
        at_h = at & (t > 0)[None, :]
        h = tl.load(h_p + (begin - 1) * HD + head * D + o_h, mask=at_h, other=0.0)
        o_state = b[None, :] * HD + head * D + k[:, None]
        if first_p is not None:
            h += tl.load(first_p + o_state, mask=at & (t == 0)[None, :], other=0.0)
        if reset_p is not None:
            starts = tl.load(reset_p + r, mask=in_bounds, other=0) != 0
            h = tl.where(starts[None, :], 0.0, h)
        if scale_p is not None:
            h *= tl.load(scale_p + o_state, mask=at, other=0.0)
        acc = tl.dot(h.to(dtype), dg, acc, input_precision=PREC)
    o_R = ((split * H + head) * D + k[:, None]) * 4 * D + gate * D + u[None, :]
    tl.store(dR_p + o_R, acc, mask=(k < D)[:, None] & (u < D)[None, :])
