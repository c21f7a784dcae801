"""What single lanes of a warp do: arithmetic, loads, stores, products.

Tensors have one axis, an element a lane, so that a lane's registers are where the tensor cores'
instruction m16n8k16 wants them: with g = lane // 4 and q = lane % 4, a lane holds rows g and g + 8
of a (registers 0 and 1; two columns each), row g of b, and columns 2 q, 2 q + 1 of rows g and
g + 8 of the result. No tensor changes its layout. Each function is a line or two of PTX;
interpreted, the same in Triton's own terms. `at` is a mask of whole numbers.

mailbox.py is what lanes tell each other.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
_STORE = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.b32 [$1], $2;}"
)


@triton.jit
def exp(x):
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], tl.float32, True, 1
        )
    else:
        return tl.exp(x)


@triton.jit
def log(x):
    if PTX:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
        return y * 0.6931471805599453
    else:
        return tl.log(x)


@triton.jit
def reciprocal(x):
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return 1.0 / x


@triton.constexpr_function
def _loading(kind):
    return (
        "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; "
        f"@p ld.global.{kind} $0, [$1];}}"
    )  # fmt: skip


@triton.jit
def load(p, at):
    """float32"""
    if PTX:
        return tl.inline_asm_elementwise(
            _loading("b32"), "=&f,l,r", [p, at], tl.float32, False, 1,
        )  # fmt: skip
    else:
        return tl.load(p, mask=at != 0, other=0.0)


@triton.jit
def load_four(p, at):
    """Four float32 side by side, at a multiple of 16 bytes."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{.reg .pred p; setp.ne.s32 p, $5, 0;
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];}""",
            "=&f,=&f,=&f,=&f,l,r", [p, at], (tl.float32, tl.float32, tl.float32, tl.float32),
            False, 1,
        )  # fmt: skip
    else:
        return load(p, at), load(p + 1, at), load(p + 2, at), load(p + 3, at)


@triton.jit
def load_half(p, at):
    """The bits of a number of 16."""
    if PTX:
        return tl.inline_asm_elementwise(
            _loading("u16"), "=&r,l,r", [p, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        x = tl.load(p, mask=at != 0, other=0.0)
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def load_pair(p):
    """The bits of two numbers of 16, at a multiple of 4 bytes."""
    if PTX:
        return tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [p], tl.int32, False, 1)
    else:
        low = tl.load(p).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (tl.load(p + 1).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def soon(p, at):
    """Asks for what will be loaded: memory takes longer than a step, its cache does not."""
    if PTX:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p prefetch.global.L2 [$1];}",
            "=r,l,r", [p, at], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def load_flag(p, at):
    if PTX:
        return tl.inline_asm_elementwise(
            _loading("s8"), "=&r,l,r", [p, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        return tl.load(p, mask=at != 0, other=0).to(tl.int32)


@triton.jit
def store(p, x, at):
    """float32"""
    if PTX:
        tl.inline_asm_elementwise(
            _STORE, "=r,l,r,r", [p, x.to(tl.int32, bitcast=True), at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(p, x, mask=at != 0)


@triton.jit
def store_four(p, a, b, c, d, at):
    """Four float32 side by side, at a multiple of 16 bytes."""
    if PTX:
        a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
        c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(
            """{.reg .pred p; setp.ne.s32 p, $6, 0; mov.b32 $0, 0;
            @p st.global.v4.b32 [$1], {$2, $3, $4, $5};}""",
            "=r,l,r,r,r,r,r", [p, a, b, c, d, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        store(p, a, at)
        store(p + 1, b, at)
        store(p + 2, c, at)
        store(p + 3, d, at)


@triton.jit
def store_pair(p, word, at):
    """Two numbers of 16 bits, at a multiple of 4 bytes."""
    if PTX:
        tl.inline_asm_elementwise(
            _STORE, "=r,l,r,r", [p, word, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = p.dtype.element_ty
        tl.store(p, word.to(tl.int16).to(dtype, bitcast=True), mask=at != 0)
        tl.store(p + 1, (word >> 16).to(tl.int16).to(dtype, bitcast=True), mask=at != 0)


@triton.jit
def number(bits, dtype: tl.constexpr):
    """float32, of bits of a number of 16."""
    if dtype == tl.float16:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def pair(low, high, dtype: tl.constexpr):
    """Two float32 as a word of two numbers of 16 bits, never MISSING: NaN is 0x7fff."""
    if PTX:
        BF16: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        F16: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(
            F16 if dtype == tl.float16 else BF16, "=r,f,f", [low, high], tl.int32, True, 1
        )
    else:
        low = tl.where(low == low, low, float("nan")).to(dtype).to(tl.int16, bitcast=True)
        high = tl.where(high == high, high, float("nan")).to(dtype).to(tl.int16, bitcast=True)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def other(x, LANES: tl.constexpr):
    """x of the lane whose g is one more or, where it is odd, one less."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 4, 0x1f, 0xffffffff;", "=r,r", [x], tl.int32, False, 1
        )
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (LANES // 8, 2, 4)), (0, 2, 1)))
        return tl.reshape(tl.permute(tl.join(odd, even), (0, 2, 1)), (LANES,))


@triton.jit
def _columns(words, dtype: tl.constexpr, LANES: tl.constexpr):
    """(warps, 8, 8) of a register: row g, columns 2 q and 2 q + 1."""
    x = tl.join(number(words & 0xFFFF, dtype), number((words >> 16) & 0xFFFF, dtype))
    return tl.reshape(x, (LANES // 32, 8, 8))


@triton.jit
def _by_side(left, right):
    """Two (warps, 8, n) as (warps, 8, 2 n)."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (left.shape[0], 8, 16))


@triton.jit
def product(a, o: tl.constexpr, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr, LANES: tl.constexpr):
    """c + a b of every warp: a (16, 16) is words o to o + 3 of a, b (16, 8), c (16, 8)."""
    if PTX:
        BF16: tl.constexpr = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        F16: tl.constexpr = (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return tl.inline_asm_elementwise(
            F16 if dtype == tl.float16 else BF16, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[o], a[o + 1], a[o + 2], a[o + 3], b0, b1, c0, c1, c2, c3],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        b = _by_side(_columns(b0, dtype, LANES), _columns(b1, dtype, LANES))
        b = tl.permute(b, (0, 2, 1))
        a0, a1 = _columns(a[o], dtype, LANES), _columns(a[o + 1], dtype, LANES)
        a2, a3 = _columns(a[o + 2], dtype, LANES), _columns(a[o + 3], dtype, LANES)
        upper, lower = tl.dot(_by_side(a0, a2), b), tl.dot(_by_side(a1, a3), b)
        d0, d1 = tl.split(tl.reshape(upper, (LANES, 2)))
        d2, d3 = tl.split(tl.reshape(lower, (LANES, 2)))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def load_gates(p, step, at):
    """Bits of i, f, z, o at p, which are `step` apart."""
    return (
        load_half(p, at), load_half(p + step, at), load_half(p + 2 * step, at),
        load_half(p + 3 * step, at),
    )  # fmt: skip


@triton.jit
def numbers(i, f, z, o, dtype: tl.constexpr):
    return number(i, dtype), number(f, dtype), number(z, dtype), number(o, dtype)


@triton.jit
def two_units(x0, x1, odd, dtype: tl.constexpr, LANES: tl.constexpr):
    """Of unit u, rows 2 q and 2 q + 1, a word of units u and u + 1 (or u - 1) in one row."""
    own = pair(x0, x1, dtype)
    # An even lane gives its odd row, an odd lane its even one.
    got = other(own, LANES)
    return tl.where(odd, ((got >> 16) & 0xFFFF) | (own & -65536), (own & 0xFFFF) | (got << 16))
