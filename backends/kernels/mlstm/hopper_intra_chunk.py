"""The mLSTM within a chunk on NVIDIA's Hopper: what intra_chunk.py computes, in Gluon.

There the L2 cache's traffic binds, as programs of 64 rows each read the tiles that they share. Here
a program has 128 rows and the processor to itself (in small heads two of 64 share it): one warp has
tiles copied (by TMA) ahead of those that multiply them, through all the program's blocks of rows.
The weights of a block of pairs are made while the products before them run. Names as in
intra_chunk.py.
"""

from keras_xlstm.backends.kernels.mlstm.hopper_ring import (
    load_tiles,
    store_rows,
    transposed,
    work_item,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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


@gluon.jit
def _dots(x, y_s, y_full, y_empty, ky, ST: gl.constexpr):
    """Row by row x . y, y being the next tile of its ring."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    slot = ky % ST
    mbarrier.wait(y_full.index(slot), (ky // ST) & 1)
    y = y_s.index(slot).load(wide)
    dots = gl.sum(x.load(wide).to(gl.float32) * y.to(gl.float32), 1)
    mbarrier.arrive(y_empty.index(slot), count=1)
    return dots


@gluon.jit
def compute(
    x_s, y_s, z_s, v_s, n_s, out_s, x_full, x_empty, y_full, y_empty, z_full, z_empty, out_d,
    n_p, own_p, dot_p, sign_p, rho_p, seg_p, m_p, chunk_p, row_p, row_rest_p, b_p, br_p,
    peak_p, T, H, NC, scale, eps, items,
    ROLE: gl.constexpr, DX: gl.constexpr, DZ: gl.constexpr, BZ: gl.constexpr, BO: gl.constexpr,
    L: gl.constexpr, LN: gl.constexpr, LC: gl.constexpr, SEG: gl.constexpr, XS: gl.constexpr,
    ST: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    REVERSE: gl.constexpr = ROLE == "dk" or ROLE == "dv"
    TURNED: gl.constexpr = ROLE == "dq" or ROLE == "dk"
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, BZ, 16])
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [L // 16, 1], [16, LN, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    by_col: gl.constexpr = gl.SliceLayout(0, mma_p)
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
        m_b = m_p + long * (NC + 1) + c
        rows = first + gl.arange(0, L, by_row)
        # All that is read from here, before anything waits.
        border = gl.load(m_b)
        if SEG:
            seg_b = seg_p + batch.to(gl.int64) * T
            seg = gl.load(seg_b + c * LC + rows)
            before = gl.load(seg_b + gl.maximum(c * LC - 1, 0))
            before = gl.where(c == 0, 0, before)
            last = gl.load(seg_b + c * LC + LC - 1)
        if ROLE == "h":
            b = gl.load(b_p + o_vec + rows)
            row_rest = gl.load(br_p + o_vec + rows)
            peak = gl.load(peak_p + o_vec + rows)
        else:
            row = gl.load(row_p + o_vec + rows)
            row_rest = gl.load(row_rest_p + o_vec + rows)
        if ROLE == "dq":
            sign = gl.load(sign_p + o_vec + rows)
        if REVERSE:
            p_chunk = chunk_p + (long * NC + c) * 4
            out_whole, out_rest = gl.load(p_chunk), gl.load(p_chunk + 1)
            leaving = gl.load(m_b + 1)
        if TURNED:
            n = gl.load(n_p + slot_n * DZ + gl.arange(0, DZ, by_z))

        # Over the border.
        acc = gl.zeros([L, BZ], gl.float32, mma)
        mbarrier.wait(x_full.index(kx % XS), (kx // XS) & 1)
        x = x_s.index(kx % XS)
        for s in gl.static_range(DX // LN):
            slot = kz % ST
            mbarrier.wait(z_full.index(slot), (kz // ST) & 1)
            if TURNED:
                S = transposed(z_s.index(slot), DZ, LN).permute([1, 0])
            else:
                S = z_s.index(slot)
            xs = x.slice(s * LN, LN, dim=1)
            acc = warpgroup_mma(xs, S, acc, use_acc=s > 0, is_async=True)
            if s > 0:
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(z_empty.index((kz - 1) % ST), count=1)
            kz += 1
        # The row's exponents, and the weight of what comes over the border.
        if ROLE == "h":
            if SEG:
                entering = gl.where(seg == before, border, NEVER)
                row_m = (b + row_rest) + gl.maximum(peak, entering)
            else:
                row_m = (b + row_rest) + gl.maximum(peak, border)
            whole = rounded(row_m)
            row = b - whole
        if REVERSE:
            w = gl.exp((row + (out_whole - rounded(leaving))) + (row_rest + out_rest))
        else:
            w = gl.exp((row + rounded(border)) + row_rest)
        if SEG:
            w = gl.where(seg == (last if REVERSE else before), w, 0.0)
        if ROLE == "h":
            dots = gl.zeros([L, LN], gl.float32, mma_p)
            for s in gl.static_range(DX // LN):
                n = n_s.index(kx % XS).slice(s * LN, LN).load(by_col)
                dots += x.slice(s * LN, LN, dim=1).load(mma_p).to(gl.float32) * n[None, :]
            r = gl.sum(dots, 1) * w
        if ROLE == "dq":
            r = _dots(x.slice(0, LN), y_s, y_full, y_empty, ky, ST)
            if L > LN:
                lower = _dots(x.slice(LN, LN), y_s, y_full, y_empty, ky + 1, ST)
                r = gl.reshape(gl.permute(gl.join(r, lower), [1, 0]), [L])
            ky += L // LN
            rho_row = -sign * gl.convert_layout(r, by_row)
            gl.store(rho_p + o_vec + rows, rho_row)
        acc = warpgroup_mma_wait(0, deps=[acc])
        acc *= gl.convert_layout(w, by_acc)[:, None]
        if ROLE == "dq":
            acc += gl.convert_layout(w * rho_row, by_acc)[:, None] * n[None, :]
        if ROLE == "dk":
            acc += gl.convert_layout(w, by_acc)[:, None] * n[None, :]

        if TURNED and SMALL:
            own = gl.load(own_p + o_row * DZ + o_own)

        # Within the chunk.
        row_2 = (row_rest * LOG2_E)[:, None]
        acc = warpgroup_mma_init(acc)
        for j in range(first if REVERSE else 0, LC if REVERSE else first + L, LN):
            slot = ky % ST
            mbarrier.wait(y_full.index(slot), (ky // ST) & 1)
            p = warpgroup_mma(
                x, y_s.index(slot).permute([1, 0]), gl.zeros([L, LN], gl.float32, mma_p),
                use_acc=False, is_async=True,
            )  # fmt: skip
            cols = j + gl.arange(0, LN, by_col)
            # Whole numbers are added before anything rounds.
            log_w = row[:, None] + v_s.index(slot * 3).load(by_col)[None, :]
            rest = row_2 + (v_s.index(slot * 3 + 1).load(by_col) * LOG2_E)[None, :]
            weight = exp2(log_w * LOG2_E + rest)
            if ROLE == "dk":
                rho_col = v_s.index(slot * 3 + 2).load(by_col)
            # The weights as well, lest the compiler move them behind the wait.
            p, acc, weight = warpgroup_mma_wait(0, deps=[p, acc, weight])
            mbarrier.arrive(y_empty.index(slot), count=1)
            mbarrier.arrive(z_empty.index((kz - 1) % ST), count=1)
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
                seg_col = gl.load(seg_b + c * LC + cols)
                p = gl.where(keep & (seg[:, None] == seg_col[None, :]), p, 0.0)
            elif (j < first + L) if REVERSE else (j + LN > first):
                p = gl.where(keep, p, 0.0)
            if ROLE == "h":
                r += gl.sum(p, 1)
            p = gl.convert_layout(p.to(gl.bfloat16), operand)
            slot = kz % ST
            mbarrier.wait(z_full.index(slot), (kz // ST) & 1)
            acc = warpgroup_mma(p, z_s.index(slot), acc, is_async=True)
            kz += 1
        mbarrier.arrive(x_empty.index(kx % XS), count=1)
        kx += 1
        if TURNED and not SMALL:
            own = gl.load(own_p + o_row * DZ + o_own)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(z_empty.index((kz - 1) % ST), count=1)

        if ROLE == "h":
            r *= scale
            floor = gl.exp(gl.where(whole > -80.0, -whole, 80.0))
            d = gl.maximum(gl.abs(r), floor) + eps * gl.exp(row_m - whole)
            acc *= gl.convert_layout(scale / d, by_acc)[:, None]
            if jz == 0:
                gl.store(row_p + o_vec + rows, row)
                gl.store(row_rest_p + o_vec + rows, row_rest - gl.log(d))
                of_r = gl.where(r > 0, 1.0, -1.0)
                gl.store(sign_p + o_vec + rows, gl.where(gl.abs(r) > floor, of_r, 0.0))
        else:
            acc *= scale
        if TURNED:
            dot = gl.sum(own.to(gl.float32) * acc, 1)
            gl.store(dot_p + o_vec + first + gl.arange(0, L, by_acc), dot)
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
    x_s = gl.allocate_shared_memory(gl.bfloat16, [XS, L, DX], x_d.layout)
    y_s = gl.allocate_shared_memory(gl.bfloat16, [ST, LN, DX], y_d.layout)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [ST, LN, BZ], z_d.layout)
    v_s = gl.allocate_shared_memory(gl.float32, [3 * ST, LN], flat)
    # Of "h" alone, whose sum over n is by the tile of x.
    n_s = gl.allocate_shared_memory(gl.float32, [XS, DX if ROLE == "h" else 32], flat)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [L, BO], out_d.layout)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], layout)
    x_empty = gl.allocate_shared_memory(gl.int64, [XS, 1], layout)
    y_full = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    y_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    z_full = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    z_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], layout)
    for s in gl.static_range(XS):
        mbarrier.init(x_full.index(s), count=33 if ROLE == "h" else 1)
        mbarrier.init(x_empty.index(s), count=1)
    for s in gl.static_range(ST):
        mbarrier.init(y_full.index(s), count=33)  # the tile, and each thread's parts of vectors
        mbarrier.init(y_empty.index(s), count=1)
        mbarrier.init(z_full.index(s), count=1)
        mbarrier.init(z_empty.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (
                x_s, y_s, z_s, v_s, n_s, out_s, x_full, x_empty, y_full, y_empty, z_full, z_empty,
                out_d, n_p, own_p, dot_p, sign_p, rho_p, seg_p, m_p, chunk_p, row_p,
                row_rest_p, b_p, br_p, peak_p, T, H, NC, scale, eps, items,
                ROLE, DX, DZ, BZ, BO, L, LN, LC, SEG, XS, ST, SMALL,
            )),
            (load_tiles, (
                x_s, y_s, z_s, v_s, n_s, x_full, x_empty, y_full, y_empty, z_full, z_empty,
                x_d, y_d, z_d, s_d, h_d, n_p, col_p, col_rest_p, rho_p, T, H, NC, items,
                ROLE, DX, DZ, BZ, L, LN, LC, XS, ST, SMALL,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip
