"""What single lanes of a warp do: loads, stores, products, messages between programs.

Tensors have one axis, an element a lane, so that a lane's registers are where the tensor cores'
instruction m16n8k16 wants them: with g = lane // 4 and q = lane % 4, a lane holds rows g and g + 8
of a (registers 0 and 1; two columns each), row g of b, and columns 2 q, 2 q + 1 of rows g and
g + 8 of the result. No tensor changes its layout, no step waits for a whole program. Each function
is a line or two of PTX; interpreted, the same in Triton's own terms.

`at` is a mask of whole numbers. Shared memory is addressed in words of 32 bits; where programs form
a cluster of N, all of them hear what is sent. Interpreted, `memory` is an array of the caller's.
"""

import triton
import triton.language as tl

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
MISSING = tl.constexpr(-1)  # two numbers that no arithmetic makes: NaN of all bits


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


@triton.jit
def load(p, at):
    """float32"""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1];}",
            "=&f,l,r", [p, at], tl.float32, False, 1,
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
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u16 $0, [$1];}",
            "=&r,l,r", [p, at], tl.int32, False, 1,
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
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.s8 $0, [$1];}",
            "=&r,l,r", [p, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        return tl.load(p, mask=at != 0, other=0).to(tl.int32)


@triton.jit
def store(p, x, at):
    """float32"""
    if PTX:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.b32 [$1], $2;}",
            "=r,l,r,r", [p, x.to(tl.int32, bitcast=True), at], tl.int32, False, 1,
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
            "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.b32 [$1], $2;}",
            "=r,l,r,r", [p, word, at], tl.int32, False, 1,
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


@triton.constexpr_function
def _declared(words):
    return f"{{.shared .align 16 .b32 exchanged[{words}]; mov.u32 $0, exchanged;}}"


@triton.jit
def shared_memory(lane, memory_p, WORDS: tl.constexpr):
    """Once in a program: where its words are."""
    if PTX:
        return tl.inline_asm_elementwise(_declared(WORDS), "=r,r", [lane], tl.int32, False, 1)
    else:
        return memory_p + tl.program_id(0) * WORDS


@triton.constexpr_function
def _meeting(programs):
    if programs == 1:
        return "bar.sync 0; mov.b32 $0, $1;"
    return "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.b32 $0, $1;"


@triton.jit
def meet(lane, N: tl.constexpr):
    """All lanes of a cluster wait for each other."""
    if PTX:
        tl.inline_asm_elementwise(_meeting(N), "=r,r", [lane], tl.int32, False, 1)


@triton.jit
def meet_here(lane):
    """All lanes of this program wait for each other."""
    if PTX:
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, $1;", "=r,r", [lane], tl.int32, False, 1)


@triton.jit
def put(memory, word, value):
    """In this program's memory alone."""
    if PTX:
        tl.inline_asm_elementwise(
            "mov.b32 $0, 0; st.volatile.shared.b32 [$1], $2;", "=&r,r,r",
            [memory + 4 * word, value], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(memory + word, value)


@triton.jit
def put_two(memory, word, value):
    """One value in two words, at a multiple of two."""
    if PTX:
        tl.inline_asm_elementwise(
            "mov.b32 $0, 0; st.volatile.shared.v2.b32 [$1], {$2, $2};", "=&r,r,r",
            [memory + 4 * word, value], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(memory + word, value)
        tl.store(memory + word + 1, value)


@triton.jit
def get(memory, word):
    """float32, of this program's memory."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.volatile.shared.b32 $0, [$1];", "=f,r", [memory + 4 * word], tl.float32, False, 1
        )
    else:
        return tl.load(memory + word).to(tl.float32, bitcast=True)


@triton.jit
def put_gates(memory, word, a, b, c, d):
    """Four float32, at a multiple of four words."""
    a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    if PTX:
        tl.inline_asm_elementwise(
            "mov.b32 $0, 0; st.volatile.shared.v4.b32 [$1], {$2, $3, $4, $5};", "=&r,r,r,r,r,r",
            [memory + 4 * word, a, b, c, d], tl.int32, False, 1,
        )  # fmt: skip
    else:
        put(memory, word, a)
        put(memory, word + 1, b)
        put(memory, word + 2, c)
        put(memory, word + 3, d)


@triton.jit
def get_gates(memory, word, at):
    """Four float32, at a multiple of four words; zeros where `at` is."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{.reg .pred p; setp.ne.s32 p, $5, 0;
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            @p ld.volatile.shared.v4.b32 {$0, $1, $2, $3}, [$4];}""",
            "=&f,=&f,=&f,=&f,r,r", [memory + 4 * word, at],
            (tl.float32, tl.float32, tl.float32, tl.float32), False, 1,
        )  # fmt: skip
    else:
        return (
            get(memory, word), get(memory, word + 1), get(memory, word + 2), get(memory, word + 3),
        )  # fmt: skip


@triton.jit
def put_four(memory, word, value, at):
    """One value in four words, at a multiple of four."""
    if PTX:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; "
            "@p st.volatile.shared.v4.b32 [$1], {$2, $2, $2, $2};}",
            "=r,r,r,r", [memory + 4 * word, value, at], tl.int32, False, 1,
        )  # fmt: skip
    else:
        for j in tl.static_range(4):
            tl.store(memory + word + j, value, mask=at != 0)


@triton.constexpr_function
def _sending(programs):
    code = "{.reg .b32 a; mov.b32 $0, 0;\n"
    if programs == 1:
        return code + "st.volatile.shared.b32 [$1], $2;}"
    for rank in range(programs):
        code += f"mapa.shared::cluster.u32 a, $1, {rank}; st.shared::cluster.b32 [a], $2;\n"
    return code + "}"


@triton.jit
def send(memory, word, value, N: tl.constexpr):
    """To all programs of the cluster."""
    if PTX:
        tl.inline_asm_elementwise(
            _sending(N), "=&r,r,r", [memory + 4 * word, value], tl.int32, False, 1
        )
    else:
        tl.store(memory + word, value)


@triton.constexpr_function
def _sending_two(programs):
    code = "{.reg .pred p; .reg .b32 a; mov.b32 $0, 0; setp.ne.s32 p, $5, 0;\n"
    if programs == 1:
        return code + "@p st.volatile.shared.v2.b32 [$1], {$3, $4};}"
    code += "mapa.shared::cluster.u32 a, $1, $2;\n"
    return code + "@p st.shared::cluster.v2.b32 [a], {$3, $4};}"


@triton.jit
def send_two(memory, word, program, x, y, at, N: tl.constexpr):
    """Two float32, at a multiple of two words, to one program of the cluster."""
    x, y = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
    if PTX:
        tl.inline_asm_elementwise(
            _sending_two(N), "=&r,r,r,r,r,r", [memory + 4 * word, program, x, y, at], tl.int32,
            False, 1,
        )  # fmt: skip
    else:
        tl.store(memory + word, x, mask=at != 0)
        tl.store(memory + word + 1, y, mask=at != 0)


@triton.constexpr_function
def _receiving_two(parts, stride):
    results = [f"${j}" for j in range(2 * parts)]
    code = "{.reg .pred p; .reg .b32 m;\nAGAIN:\n"
    for j in range(parts):
        two = ", ".join(results[2 * j : 2 * j + 2])
        code += f"ld.volatile.shared.v2.b32 {{{two}}}, [${2 * parts} + {4 * stride * j}];\n"
    code += "mov.b32 m, 0;\n" + "".join(f"max.u32 m, m, {x};\n" for x in results)
    return code + "setp.eq.u32 p, m, 0xffffffff;\n@p bra AGAIN;}"


@triton.constexpr_function
def _results(count, inputs):
    return "=&r," * count + inputs


@triton.constexpr_function
def _words(count):
    return (tl.int32,) * count


@triton.jit
def receive_two(memory, word, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums of two float32 over PARTS places, STRIDE words apart, once all have come."""
    if PTX:
        found = tl.inline_asm_elementwise(
            _receiving_two(PARTS, STRIDE), _results(2 * PARTS, "r"), [memory + 4 * word],
            _words(2 * PARTS), False, 1,
        )  # fmt: skip
    else:
        found = ()
        for j in tl.static_range(PARTS):
            found += (tl.load(memory + word + j * STRIDE), tl.load(memory + word + j * STRIDE + 1))
    x, y = found[0].to(tl.float32, bitcast=True), found[1].to(tl.float32, bitcast=True)
    for j in tl.static_range(1, PARTS):
        x += found[2 * j].to(tl.float32, bitcast=True)
        y += found[2 * j + 1].to(tl.float32, bitcast=True)
    return x, y


@triton.constexpr_function
def _receiving(chunks, waits):
    results = [f"${j}" for j in range(4 * chunks)]
    code = "{.reg .pred p; .reg .b32 m;\nAGAIN:\n"
    for j in range(chunks):  # the first of two addresses is that of even chunks
        four = ", ".join(results[4 * j : 4 * j + 4])
        code += f"ld.volatile.shared.v4.b32 {{{four}}}, [${4 * chunks + j % 2} + {64 * j}];\n"
    if not waits:
        return code + "}"
    code += "mov.b32 m, 0;\n" + "".join(f"max.u32 m, m, {x};\n" for x in results)
    return code + "setp.eq.u32 p, m, 0xffffffff;\n@p bra AGAIN;}"


@triton.jit
def receive(memory, word, swap, CHUNKS: tl.constexpr, WAIT: tl.constexpr):
    """Four words of every chunk of 16, with WAIT once all have come; chunks are swapped in pairs
    (16) or not (0)."""
    if PTX:
        even = memory + 4 * (word + swap)
        odd = memory + 4 * (word - swap)
        return tl.inline_asm_elementwise(
            _receiving(CHUNKS, WAIT), _results(4 * CHUNKS, "r,r"), [even, odd], _words(4 * CHUNKS),
            False, 1,
        )  # fmt: skip
    else:
        found = ()
        for j in tl.static_range(CHUNKS):
            for k in tl.static_range(4):
                x = tl.load(memory + word + 16 * j + k + (swap if j % 2 == 0 else -swap))
                found += (x,)
        return found


@triton.constexpr_function
def _far(chunks, waits):
    """Only what is missing is read again: all programs read all of h, through one cache."""
    results = [f"${j}" for j in range(4 * chunks)]
    loads = [
        f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(results[4 * j : 4 * j + 4])}}}, "
        f"[${4 * chunks} + {64 * j}];\n"
        for j in range(chunks)
    ]
    if not waits:
        return "{" + "".join(loads) + "}"
    size = -(-chunks // 4)  # a few predicates are all there are
    parts = [range(j, min(j + size, chunks)) for j in range(0, chunks, size)]
    code = "{.reg .pred p<5>; .reg .b32 m;\n"
    code += "".join(f"setp.eq.u32 p{n}, 0, 0;\n" for n in range(len(parts))) + "AGAIN:\n"
    for n, part in enumerate(parts):
        code += "".join(f"@p{n} " + loads[j] for j in part)
    for n, part in enumerate(parts):
        code += "mov.b32 m, 0;\n"
        code += "".join(f"max.u32 m, m, {x};\n" for j in part for x in results[4 * j : 4 * j + 4])
        code += f"setp.eq.u32 p{n}, m, 0xffffffff;\n"
    code += "mov.pred p4, p0;\n"
    code += "".join(f"or.pred p4, p4, p{n};\n" for n in range(1, len(parts)))
    return code + "@p4 bra AGAIN;}"


@triton.jit
def receive_far(p, CHUNKS: tl.constexpr, WAIT: tl.constexpr):
    """As `receive`, of chunks of 32 numbers of 16 bits in the device's memory, which all programs
    see."""
    if PTX:
        return tl.inline_asm_elementwise(
            _far(CHUNKS, WAIT), _results(4 * CHUNKS, "l"), [p], _words(4 * CHUNKS), False, 1
        )
    else:
        found = ()
        for j in tl.static_range(CHUNKS):
            for k in tl.static_range(4):
                found += (load_pair(p + 32 * j + 2 * k),)
        return found
