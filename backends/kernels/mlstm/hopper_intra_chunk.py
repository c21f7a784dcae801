"""The mLSTM within a chunk on NVIDIA's Hopper: what intra_chunk.py computes, in Gluon.

That kernel is bound by L2 traffic, as each thread block of 64 rows reads the tiles that it shares
with others. Here a thread block has 128 rows and an SM to itself (in small heads two of 64 rows
share an SM). One warp loads tiles by TMA (hopper_intra_chunk_load.py) ahead of the warps that
multiply them, through all blocks of rows that the thread block takes. The weights of a tile of
pairs are computed while the products before them run. Names as in intra_chunk.py.
"""

from collections import namedtuple

from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk_load import (
    Matrices,
    Rings,
    Tiles,
    load_tiles,
    work_item,
)
from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    init_slot,
    new_ring,
    release,
    store_rows,
    transposed,
    wait,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

NEVER = gl.constexpr(-(2.0**100))
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def rounded(x):
    return gl.floor(x + 0.5)


@gluon.jit
def exp2(x):
    """Without the care for subnormal results, which takes three instructions more."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


# What `compute` reads and writes itself.
Pointers = namedtuple("Pointers", "n own dot sign rho seg m chunk row row_rest b br peak")
# Of a block of rows [L]: exponents (in "h" b, br and peak), sign, segments; of its chunk: where its
# batch's segments are, those before it and at its end, m at its start, what leaves it.
Rows = namedtuple(
    "Rows", "row rest peak sign seg_b seg before last border out_whole out_rest leaving"
)


@gluon.jit
def _load_rows(
    p, m_b, batch, long, c, rows, o_vec, T, NC, ROLE: gl.constexpr, LC: gl.constexpr,
    SEG: gl.constexpr,
):  # fmt: skip
    # What a role has no use for is 0: Triton 3.6 returns no None.
    seg_b, seg, before, last, peak, sign = 0, 0, 0, 0, 0, 0
    out_whole, out_rest, leaving = 0, 0, 0
    border = gl.load(m_b)
    if SEG:
        seg_b = p.seg + batch.to(gl.int64) * T
        seg = gl.load(seg_b + c * LC + rows)
        before = gl.load(seg_b + gl.maximum(c * LC - 1, 0))
        before = gl.where(c == 0, 0, before)
        last = gl.load(seg_b + c * LC + LC - 1)
    if ROLE == "h":
        row = gl.load(p.b + o_vec + rows)
        rest = gl.load(p.br + o_vec + rows)
        peak = gl.load(p.peak + o_vec + rows)
    else:
        row = gl.load(p.row + o_vec + rows)
        rest = gl.load(p.row_rest + o_vec + rows)
    if ROLE == "dq":
        sign = gl.load(p.sign + o_vec + rows)
    if ROLE == "dk" or ROLE == "dv":
        p_chunk = p.chunk + (long * NC + c) * 4
        out_whole, out_rest = gl.load(p_chunk), gl.load(p_chunk + 1)
        leaving = gl.load(m_b + 1)
    return Rows(
        row, rest, peak, sign, seg_b, seg, before, last, border, out_whole, out_rest, leaving
    )  # fmt: skip


@gluon.jit
def _over_border(x, z_s, z_ring, kz, mma: gl.constexpr, TURNED: gl.constexpr):
    """x . S [L, BZ], the last product of it on its way, and the count of z's ring."""
    L: gl.constexpr = x.shape[0]
    DX: gl.constexpr = x.shape[1]
    LN: gl.constexpr = z_s.shape[1]
    BZ: gl.constexpr = z_s.shape[2]
    acc = gl.zeros([L, BZ], gl.float32, mma)
    for s in gl.static_range(DX // LN):
        slot = wait(z_ring, kz)
        if TURNED:
            S = transposed(z_s.index(slot), BZ, LN).permute([1, 0])
        else:
            S = z_s.index(slot)
        xs = x.slice(s * LN, LN, dim=1)
        acc = warpgroup_mma(xs, S, acc, use_acc=s > 0, is_async=True)
        if s > 0:
            acc = warpgroup_mma_wait(1, deps=[acc])
            release(z_ring, kz - 1)
        kz += 1
    return acc, kz


@gluon.jit
def _row_weights(a, ROLE: gl.constexpr, SEG: gl.constexpr):
    """The rows' whole exponents and the weight of what comes over the border; in "h" also the
    exponents as they were and what was taken off."""
    REVERSE: gl.constexpr = ROLE == "dk" or ROLE == "dv"
    row, row_m, whole = a.row, 0, 0
    if ROLE == "h":
        if SEG:
            entering = gl.where(a.seg == a.before, a.border, NEVER)
            row_m = (a.row + a.rest) + gl.maximum(a.peak, entering)
        else:
            row_m = (a.row + a.rest) + gl.maximum(a.peak, a.border)
        whole = rounded(row_m)
        row = a.row - whole
    if REVERSE:
        w = gl.exp((row + (a.out_whole - rounded(a.leaving))) + (a.rest + a.out_rest))
    else:
        w = gl.exp((row + rounded(a.border)) + a.rest)
    if SEG:
        w = gl.where(a.seg == (a.last if REVERSE else a.before), w, 0.0)
    return row, w, row_m, whole


@gluon.jit
def _dots(x, y_s, y_ring, ky):
    """Row by row x . y, y being entry ky."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    slot = wait(y_ring, ky)
    y = y_s.index(slot).load(wide)
    dots = gl.sum(x.load(wide).to(gl.float32) * y.to(gl.float32), 1)
    release(y_ring, ky)
    return dots


@gluon.jit
def _row_dots(tiles, rings, x, kx, ky, w, mma_p: gl.constexpr, ROLE: gl.constexpr):
    """ "h": w x . n; "dq": x . h, whose tiles come before those of y."""
    L: gl.constexpr = tiles.x.shape[1]
    DX: gl.constexpr = tiles.x.shape[2]
    LN: gl.constexpr = tiles.y.shape[1]
    if ROLE == "h":
        dots = gl.zeros([L, LN], gl.float32, mma_p)
        for s in gl.static_range(DX // LN):
            n_s = tiles.n.index(kx % tiles.n.shape[0])
            n = n_s.slice(s * LN, LN).load(gl.SliceLayout(0, mma_p))
            dots += x.slice(s * LN, LN, dim=1).load(mma_p).to(gl.float32) * n[None, :]
        r = gl.sum(dots, 1) * w
    else:
        r = _dots(x.slice(0, LN), tiles.y, rings.y, ky)
        if L > LN:
            lower = _dots(x.slice(LN, LN), tiles.y, rings.y, ky + 1)
            r = gl.reshape(gl.permute(gl.join(r, lower), [1, 0]), [L])
    return r


@gluon.jit
def _within_chunk(
    ky, kz, acc, r, tiles, rings, x, row, a, rho_row, c, first, rows, mma: gl.constexpr,
    mma_p: gl.constexpr, ROLE: gl.constexpr, LC: gl.constexpr, SEG: gl.constexpr,
):  # fmt: skip
    REVERSE: gl.constexpr = ROLE == "dk" or ROLE == "dv"
    L: gl.constexpr = tiles.x.shape[1]
    LN: gl.constexpr = tiles.y.shape[1]
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_col: gl.constexpr = gl.SliceLayout(0, mma_p)
    row_2 = (a.rest * LOG2_E)[:, None]
    acc = warpgroup_mma_init(acc)
    for j in range(first if REVERSE else 0, LC if REVERSE else first + L, LN):
        slot = wait(rings.y, ky)
        p = warpgroup_mma(
            x, tiles.y.index(slot).permute([1, 0]), gl.zeros([L, LN], gl.float32, mma_p),
            use_acc=False, is_async=True,
        )  # fmt: skip
        cols = j + gl.arange(0, LN, by_col)
        # Whole numbers are added before anything rounds.
        log_w = row[:, None] + tiles.v.index(slot * 3).load(by_col)[None, :]
        log_rest = row_2 + (tiles.v.index(slot * 3 + 1).load(by_col) * LOG2_E)[None, :]
        weight = exp2(log_w * LOG2_E + log_rest)
        if ROLE == "dk":
            rho_col = tiles.v.index(slot * 3 + 2).load(by_col)
        # The weights as well, lest the compiler move them behind the wait.
        p, acc, weight = warpgroup_mma_wait(0, deps=[p, acc, weight])
        release(rings.y, ky)
        release(rings.z, kz - 1)
        ky += 1
        if ROLE == "dq":
            p += rho_row[:, None]
        if ROLE == "dk":
            p += rho_col[None, :]
        p *= weight
        if REVERSE:
            keep = rows[:, None] <= cols[None, :]
        else:
            keep = rows[:, None] >= cols[None, :]
        if SEG:
            seg_col = gl.load(a.seg_b + c * LC + cols)
            p = gl.where(keep & (a.seg[:, None] == seg_col[None, :]), p, 0.0)
        elif (j < first + L) if REVERSE else (j + LN > first):
            p = gl.where(keep, p, 0.0)
        if ROLE == "h":
            r += gl.sum(p, 1)
        p = gl.convert_layout(p.to(gl.bfloat16), operand)
        slot = wait(rings.z, kz)
        acc = warpgroup_mma(p, tiles.z.index(slot), acc, is_async=True)
        kz += 1
    return ky, kz, acc, r


@gluon.jit
def _normalized(p, acc, r, row, rest, row_m, whole, o_vec, rows, scale, eps, jz):
    """h of "h"; writes what the other roles read of its rows."""
    r *= scale
    floor = gl.exp(gl.where(whole > -80.0, -whole, 80.0))
    d = gl.maximum(gl.abs(r), floor) + eps * gl.exp(row_m - whole)
    acc *= gl.convert_layout(scale / d, gl.SliceLayout(1, acc.type.layout))[:, None]
    if jz == 0:
        gl.store(p.row + o_vec + rows, row)
        gl.store(p.row_rest + o_vec + rows, rest - gl.log(d))
        of_r = gl.where(r > 0, 1.0, -1.0)
        gl.store(p.sign + o_vec + rows, gl.where(gl.abs(r) > floor, of_r, 0.0))
    return acc


@gluon.jit
def compute(
    tiles, rings, out_s, out_d, p, T, H, NC, scale, eps, items,
    ROLE: gl.constexpr, DZ: gl.constexpr, LC: gl.constexpr, SEG: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = tiles.x.shape[1]
    LN: gl.constexpr = tiles.y.shape[1]
    BZ: gl.constexpr = tiles.z.shape[2]
    BO: gl.constexpr = out_s.shape[1]
    REVERSE: gl.constexpr = ROLE == "dk" or ROLE == "dv"
    TURNED: gl.constexpr = ROLE == "dq" or ROLE == "dk"
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, BZ, 16])
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, LN, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    by_acc: gl.constexpr = gl.SliceLayout(1, mma)
    by_z: gl.constexpr = gl.SliceLayout(0, mma)
    o_own = gl.arange(0, L, by_acc)[:, None] * (H * DZ) + gl.arange(0, BZ, by_z)[None, :]
    kx = 0
    ky = 0
    kz = 0
    turn = 0
    for i in range(gl.program_id(0), items, gl.num_programs(0)):
        c, bh, first, jz = work_item(i, turn, items, H, NC, L, LC, DZ // BZ, ROLE, SMALL)
        turn += 1
        batch, head, long = bh // H, bh % H, bh.to(gl.int64)
        o_row = (batch.to(gl.int64) * T + c * LC + first) * H + head
        o_vec = (long * NC + c) * LC
        slot_n = long * (NC if REVERSE else NC + 1) + c
        m_b = p.m + long * (NC + 1) + c
        rows = first + gl.arange(0, L, by_row)
        # All that is read from here, before anything waits.
        a = _load_rows(p, m_b, batch, long, c, rows, o_vec, T, NC, ROLE, LC, SEG)
        if TURNED:
            n = gl.load(p.n + slot_n * DZ + gl.arange(0, DZ, by_z))

        # Over the border.
        x = tiles.x.index(wait(rings.x, kx))
        acc, kz = _over_border(x, tiles.z, rings.z, kz, mma, TURNED)
        row, w, row_m, whole = _row_weights(a, ROLE, SEG)
        r, rho_row = 0.0, 0.0  # where the role has none
        if ROLE == "h" or ROLE == "dq":
            r = _row_dots(tiles, rings, x, kx, ky, w, mma_p, ROLE)
        if ROLE == "dq":
            ky += L // LN
            rho_row = -a.sign * gl.convert_layout(r, by_row)
            gl.store(p.rho + o_vec + rows, rho_row)
        acc = warpgroup_mma_wait(0, deps=[acc])
        acc *= gl.convert_layout(w, by_acc)[:, None]
        if ROLE == "dq":
            acc += gl.convert_layout(w * rho_row, by_acc)[:, None] * n[None, :]
        if ROLE == "dk":
            acc += gl.convert_layout(w, by_acc)[:, None] * n[None, :]

        if TURNED and SMALL:
            own = gl.load(p.own + o_row * DZ + o_own)

        # Within the chunk.
        ky, kz, acc, r = _within_chunk(
            ky, kz, acc, r, tiles, rings, x, row, a, rho_row, c, first, rows, mma, mma_p,
            ROLE, LC, SEG,
        )  # fmt: skip
        release(rings.x, kx)
        kx += 1
        if TURNED and not SMALL:
            own = gl.load(p.own + o_row * DZ + o_own)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(rings.z, kz - 1)

        if ROLE == "h":
            acc = _normalized(
                p, acc, r, row, a.rest, row_m, whole, o_vec, rows, scale, eps, jz
            )  # fmt: skip
        else:
            acc *= scale
        if TURNED:
            dot = gl.sum(own.to(gl.float32) * acc, 1)
            gl.store(p.dot + o_vec + first + gl.arange(0, L, by_acc), dot)
        to = batch * T + c * LC + first
        at = head * DZ + jz * BZ
        if BO < BZ:
            half, other = gl.split(gl.permute(gl.reshape(acc, [L, 2, BO]), [0, 2, 1]))
            store_rows(out_s, out_d, half, to, at)
            store_rows(out_s, out_d, other, to, at + BO)
        else:
            store_rows(out_s, out_d, acc, to, at)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H", "NC", "items"])
def hopper_intra_chunk(
    x_d, y_d, z_d, s_d, out_d, n_p, own_p, dot_p, h_d, sign_p, rho_p, seg_p, m_p, chunk_p,
    row_p, row_rest_p, col_p, col_rest_p, b_p, br_p, peak_p,
    T, H, NC, scale, eps, items,
    ROLE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr, BO: gl.constexpr,
    L: gl.constexpr, LN: gl.constexpr, LC: gl.constexpr, SEG: gl.constexpr, XS: gl.constexpr,
    ST: gl.constexpr, SMALL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `intra_chunk`; see intra_chunk.py. `items`: blocks of L rows by BZ columns, in all ("dq"
    and "dk" have all columns in one); T is a multiple of LC. SMALL: of small heads, for which
    q or k for the gates is read before the columns, and chunks come in another order. _d:
    descriptors of matrices (steps, heads * features) and (borders * rows, columns)."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = Tiles(
        gl.allocate_shared_memory(gl.bfloat16, [XS, L, DX], x_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [ST, LN, DX], y_d.layout),
        gl.allocate_shared_memory(gl.bfloat16, [ST, LN, BZ], z_d.layout),
        gl.allocate_shared_memory(gl.float32, [3 * ST, LN], flat),
        # Of "h" alone, whose sum over n is by the tile of x.
        gl.allocate_shared_memory(gl.float32, [XS, DX if ROLE == "h" else 32], flat),
    )
    out_s = gl.allocate_shared_memory(gl.bfloat16, [L, BO], out_d.layout)
    rings = Rings(new_ring(XS), new_ring(ST), new_ring(ST))
    for s in gl.static_range(XS):
        init_slot(rings.x, s, 33 if ROLE == "h" else 1, 1)
    for s in gl.static_range(ST):
        init_slot(rings.y, s, 33, 1)
        init_slot(rings.z, s, 1, 1)
    fence_async_shared()
    pointers = Pointers(
        n_p, own_p, dot_p, sign_p, rho_p, seg_p, m_p, chunk_p, row_p, row_rest_p, b_p, br_p,
        peak_p,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (compute, (
                tiles, rings, out_s, out_d, pointers, T, H, NC, scale, eps, items,
                ROLE, DZ, LC, SEG, SMALL,
            )),
            (load_tiles, (
                tiles, rings, Matrices(x_d, y_d, z_d, s_d, h_d), n_p, col_p, col_rest_p, rho_p,
                T, H, NC, items, ROLE, DZ, LC, SMALL,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip
