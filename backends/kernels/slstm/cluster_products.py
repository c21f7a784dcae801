"""Of cluster.py: a warp's part of the recurrent kernel, in registers, and products with it."""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm import mailbox, warp


@triton.jit
def load_kernel_columns(R_p, head, u, q, at, D: tl.constexpr):
    """a of the products: rows are gates by units, columns the units before. Column 8 h + 2 q + l of
    the product s of a chunk is unit 8 q + 4 s + 2 h + l of it: what a lane reads at once."""
    R = ()
    for j in tl.static_range(2 * (D // 32)):
        for part in tl.static_range(8):  # gates i, f; columns 0 to 7, 8 to 15; gates z, o
            k = j // 2 * 32 + q * 8 + j % 2 * 4 + part // 2 % 2 * 2
            p = R_p + (head * D + k).to(tl.int64) * 4 * D + (part // 4 * 2 + part % 2) * D + u
            low, high = warp.load_half(p, at), warp.load_half(p + 4 * D, at)
            R += (low | (high << 16),)
    return R


@triton.jit
def load_kernel_rows(
    R_p, head, first, w, g, q, D: tl.constexpr, U: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """a of the products backwards: rows are 16 units, columns the gates of this thread block's
    units, in the order of `load_kernel_columns`."""
    R = ()
    for j in tl.static_range(2 * CHUNKS):
        for part in tl.static_range(4 * TILES):  # units g, g + 8; columns 0 to 7, 8 to 15; tiles
            k = first + j // 2 * 32 % U + q * 8 + j % 2 * 4 + part // 2 % 2 * 2
            to = tl.minimum(w * TILES + part // 4, D // 16 - 1) * 16 + g + part % 2 * 8
            p = R_p + (head * D + to).to(tl.int64) * 4 * D + j // 2 * 32 // U * D + k
            R += (warp.load_pair(p),)
    return R


@triton.jit
def recurrent(
    i0, i1, f0, f1, z0, z1, v0, v1, h, R, starts, dtype: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The cells' i, f, z, o with what h before adds to them."""
    # Products of even and odd columns do not wait for each other.
    zero = tl.zeros((LANES,), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for j in tl.static_range(CHUNKS):
        w0, w1, w2, w3 = h[4 * j], h[4 * j + 1], h[4 * j + 2], h[4 * j + 3]
        if starts is not None:
            w0, w1 = tl.where(starts != 0, 0, w0), tl.where(starts != 0, 0, w1)
            w2, w3 = tl.where(starts != 0, 0, w2), tl.where(starts != 0, 0, w3)
        i0, i1, f0, f1 = warp.product(R, 16 * j, w0, w1, i0, i1, f0, f1, dtype, LANES)
        z0, z1, v0, v1 = warp.product(R, 16 * j + 4, w0, w1, z0, z1, v0, v1, dtype, LANES)
        s0, s1, s2, s3 = warp.product(R, 16 * j + 8, w2, w3, s0, s1, s2, s3, dtype, LANES)
        s4, s5, s6, s7 = warp.product(R, 16 * j + 12, w2, w3, s4, s5, s6, s7, dtype, LANES)
    i0, i1, f0, f1 = i0 + s0, i1 + s1, f0 + s2, f1 + s3
    return i0, i1, f0, f1, z0 + s4, z1 + s5, v0 + s6, v1 + s7


@triton.jit
def send_products(
    memory, slot, rank, lane, w, dg, R, dtype: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    W: tl.constexpr, GATES: tl.constexpr, CHUNKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What the gate gradients add to the gradients of h, to the lanes whose cells they are."""
    LANES: tl.constexpr = 32 * W
    zero = tl.zeros((LANES,), tl.float32)
    for tile in tl.static_range(TILES):
        # Products of even and odd columns do not wait for each other.
        p0, p1, p2, p3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in tl.static_range(CHUNKS):
            p0, p1, p2, p3 = warp.product(
                R, (2 * j * TILES + tile) * 4, dg[4 * j], dg[4 * j + 1], p0, p1, p2, p3,
                dtype, LANES,
            )  # fmt: skip
            s0, s1, s2, s3 = warp.product(
                R, ((2 * j + 1) * TILES + tile) * 4, dg[4 * j + 2], dg[4 * j + 3],
                s0, s1, s2, s3, dtype, LANES,
            )  # fmt: skip
        # Of units g and g + 8: two warps.
        to = w * TILES + tile
        word = slot + 2 * GATES + rank * 64 * W + to * 2 % W * 64 + lane % 32 * 2
        program, in_bounds = tl.minimum(to * 2 // W, N - 1), (to < D // 16).to(tl.int32)
        mailbox.send_two(memory, word, program, p0 + s0, p1 + s1, in_bounds, N)
        mailbox.send_two(memory, word + 64, program, p2 + s2, p3 + s3, in_bounds, N)
