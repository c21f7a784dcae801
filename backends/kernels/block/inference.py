"""What a block computes around the memory, in Triton. Results are rounded where layers round them.

Names: _p pointers; N steps. Tensors are contiguous.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm.cell import tanh


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def rms_norm(x_p, scale_p, y_p, eps, D: tl.constexpr, P: tl.constexpr):
    """One step's D features; P is D as a power of two."""
    c = tl.arange(0, P)
    within, at = c < D, tl.program_id(0).to(tl.int64) * D + c
    x = tl.load(x_p + at, mask=within, other=0.0).to(tl.float32)
    scale = tl.load(scale_p + c, mask=within, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)) * scale
    tl.store(y_p + at, y.to(y_p.dtype.element_ty), mask=within)


@triton.jit
def head_norm(x_p, gamma_p, gate_p, y_p, eps, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """One head of D units of one step, normalised; P is D as a power of two. With a gate, times its
    sigmoid."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    within, at = c < D, row * D + c
    x = tl.load(x_p + at, mask=within, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_p + (row % H) * D + c, mask=within, other=0.0).to(tl.float32)
    x = tl.where(within, x - tl.sum(x, 0) / D, 0.0)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)) * gamma
    y = y.to(y_p.dtype.element_ty)
    if gate_p is not None:
        gate = _sigmoid(tl.load(gate_p + at, mask=within, other=0.0).to(tl.float32))
        gate = gate.to(y_p.dtype.element_ty).to(tl.float32)
        y = (y.to(tl.float32) * gate).to(y_p.dtype.element_ty)
    tl.store(y_p + at, y, mask=within)


@triton.jit
def gated_unit(x_p, y_p, F: tl.constexpr, BF: tl.constexpr, GELU: tl.constexpr):
    """BF units of activation(x[:F]) * x[F:], for one step."""
    tiles: tl.constexpr = (F + BF - 1) // BF
    row = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * BF + tl.arange(0, BF)
    gate = tl.load(x_p + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
    up = tl.load(x_p + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
    if GELU:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = gate * _sigmoid(gate)
    gate = gate.to(y_p.dtype.element_ty).to(tl.float32)
    tl.store(y_p + row * F + c, (gate * up).to(y_p.dtype.element_ty), mask=c < F)


@triton.jit
def _gate(
    x_p, kernel_p, bias_p, y_p, cap, row, D: tl.constexpr, BD: tl.constexpr, H: tl.constexpr,
    PH: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, PH)
    total = tl.zeros((BD, PH), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(x_p + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        within = (d[:, None] < D) & (h[None, :] < H)
        total += x[:, None] * tl.load(
            kernel_p + d[:, None] * H + h[None, :], mask=within, other=0.0
        )
    y = tl.sum(total, 0) + tl.load(bias_p + h, mask=h < H, other=0.0)
    if CAP:
        y = cap * tanh(y / cap, False)
    tl.store(y_p + row * H + h, y, mask=h < H)


@triton.jit
def gate_pair(
    x_p, i_kernel_p, f_kernel_p, i_bias_p, f_bias_p, i_p, f_p, cap, D: tl.constexpr,
    BD: tl.constexpr, H: tl.constexpr, PH: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The input or the forget gates of one step, in float32, bounded by `cap` if CAP."""
    row = (tl.program_id(0) // 2).to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        _gate(x_p, i_kernel_p, i_bias_p, i_p, cap, row, D, BD, H, PH, CAP)
    else:
        _gate(x_p, f_kernel_p, f_bias_p, f_p, cap, row, D, BD, H, PH, CAP)


@triton.jit
def _product(
    x_p, w_p, y_p, tile, part, N, M, WHOLE: tl.constexpr, K: tl.constexpr, KS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM columns of x (N, K) @ w (K, M), over KS of the rows of w; WHOLE: all
    parts have so many."""
    n, m = tl.arange(0, BN), tile * BM + tl.arange(0, BM)
    total = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(part * KS, (part + 1) * KS, BK, num_stages=ST):
        k = start + tl.arange(0, BK)
        if WHOLE:
            w = tl.load(w_p + k[:, None] * M + m[None, :])
        else:
            w = tl.load(w_p + k[:, None] * M + m[None, :], mask=k[:, None] < K, other=0.0)
        within = (n[:, None] < N) & (k[None, :] < K)
        x = tl.load(x_p + n[:, None] * K + k[None, :], mask=within, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    o = (part * N + n[:, None]) * M + m[None, :]
    tl.store(y_p + o, total.to(y_p.dtype.element_ty), mask=n[:, None] < N)


@triton.jit
def products(
    x_p, w0_p, w1_p, w2_p, w3_p, y0_p, y1_p, y2_p, y3_p, N: tl.constexpr, K: tl.constexpr,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, PARTS: tl.constexpr,
    KS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, K) times up to four kernels (K, M); with PARTS, sums over parts of K by themselves."""
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    WHOLE: tl.constexpr = K == KS * PARTS
    E0: tl.constexpr = M0 // BM
    E1: tl.constexpr = E0 + M1 // BM
    E2: tl.constexpr = E1 + M2 // BM
    if tile < E0:
        _product(
                x_p, w0_p, y0_p, tile, part, N, M0, WHOLE, K, KS, BN, BM, BK, ST, PRECISION
            )  # fmt: skip
    elif tile < E1:
        if M1:
            _product(
                x_p, w1_p, y1_p, tile - E0, part, N, M1, WHOLE, K, KS, BN, BM, BK, ST, PRECISION
            )  # fmt: skip
    elif tile < E2:
        if M2:
            _product(
                x_p, w2_p, y2_p, tile - E1, part, N, M2, WHOLE, K, KS, BN, BM, BK, ST, PRECISION
            )  # fmt: skip
    else:
        if M3:
            _product(
                x_p, w3_p, y3_p, tile - E2, part, N, M3, WHOLE, K, KS, BN, BM, BK, ST, PRECISION
            )  # fmt: skip


@triton.jit
def _byte(x, scale, kind):
    """x * scale as a whole number within +-127, rounded as layers round: first to `kind`."""
    x = (x * scale).to(kind).to(tl.float32)
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: halves become even
    return tl.minimum(tl.maximum(x, -127.0), 127.0).to(tl.int32)


@triton.jit
def _byte_product(
    x_p, w_p, scale_p, y_p, eps, tile, part, M, WHOLE: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, KS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ST: tl.constexpr,
):  # fmt: skip
    """As `_product`, of one row and of bytes w, whose columns were multiplied by `scale`; P is K as
    a power of two. The row becomes bytes, as in a quantised layer. Without tensor cores: they take
    16 bits, or bytes in another order, and to make these of w takes longer than to read it."""
    c, m = tl.arange(0, P), tile * BM + tl.arange(0, BM)
    row = tl.load(x_p + c, mask=c < K, other=0.0)
    kind: tl.constexpr = x_p.dtype.element_ty
    most = (tl.max(tl.abs(row.to(tl.float32)), 0) + eps).to(kind).to(tl.float32)
    x_scale = (127.0 / most).to(kind).to(tl.float32)
    total = tl.zeros((BK, BM), tl.int32)
    for start in tl.range(part * KS, (part + 1) * KS, BK, num_stages=ST):
        k = start + tl.arange(0, BK)
        if WHOLE:
            w = tl.load(w_p + k[:, None] * M + m[None, :])
        else:
            w = tl.load(w_p + k[:, None] * M + m[None, :], mask=k[:, None] < K, other=0)
        x = tl.load(x_p + k, mask=k < K, other=0.0).to(tl.float32)
        total += _byte(x, x_scale, kind)[:, None] * w.to(tl.int32)
    y = tl.sum(total, 0).to(tl.float32) / (x_scale * tl.load(scale_p + m).to(tl.float32))
    tl.store(y_p + part * M + m, y.to(y_p.dtype.element_ty))


@triton.jit
def byte_products(
    x_p, w0_p, w1_p, w2_p, w3_p, s0_p, s1_p, s2_p, s3_p, y0_p, y1_p, y2_p, y3_p, eps,
    K: tl.constexpr, P: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    M3: tl.constexpr, PARTS: tl.constexpr, KS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ST: tl.constexpr,
):  # fmt: skip
    """As `products`, of one row and of bytes, whose columns were multiplied by scales (M,). Apart
    from it, for which these arguments would be too many."""
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    WHOLE: tl.constexpr = K == KS * PARTS
    E0: tl.constexpr = M0 // BM
    E1: tl.constexpr = E0 + M1 // BM
    E2: tl.constexpr = E1 + M2 // BM
    if tile < E0:
        _byte_product(x_p, w0_p, s0_p, y0_p, eps, tile, part, M0, WHOLE, K, P, KS, BM, BK, ST)
    elif tile < E1:
        if M1:
            _byte_product(
                x_p, w1_p, s1_p, y1_p, eps, tile - E0, part, M1, WHOLE, K, P, KS, BM, BK, ST
            )  # fmt: skip
    elif tile < E2:
        if M2:
            _byte_product(
                x_p, w2_p, s2_p, y2_p, eps, tile - E1, part, M2, WHOLE, K, P, KS, BM, BK, ST
            )  # fmt: skip
    else:
        if M3:
            _byte_product(
                x_p, w3_p, s3_p, y3_p, eps, tile - E2, part, M3, WHOLE, K, P, KS, BM, BK, ST
            )  # fmt: skip


@triton.jit
def add_parts(parts_p, x_p, y_p, PARTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """x plus the sum of the parts of a product."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_p + part * COUNT + c, mask=c < COUNT, other=0.0)
    total = total.to(y_p.dtype.element_ty).to(tl.float32)
    x = tl.load(x_p + c, mask=c < COUNT, other=0.0).to(tl.float32)
    tl.store(y_p + c, (x + total).to(y_p.dtype.element_ty), mask=c < COUNT)
