"""What the lanes of the sLSTM's kernels in PTX tell each other (warp.py): through shared
memory, of their own thread block and of the others in a cluster, and through the device's memory.

Shared memory is addressed in words of 32 bits. A word that is awaited is MISSING until it comes.
Interpreted, `memory` is an array of the caller's, and a cluster one thread block.
"""

from keras_xlstm.backends.kernels.load_triton import tl, triton
from keras_xlstm.backends.kernels.slstm.warp import PTX, load_pair

MISSING = tl.constexpr(-1)  # two numbers that no arithmetic makes: NaN of all bits
PAUSE = 200  # cycles from one's own message to the first look for the others'


@triton.constexpr_function
def _declared(words):
    return f"{{.shared .align 16 .b32 exchanged[{words}]; mov.u32 $0, exchanged;}}"


@triton.jit
def shared_memory(lane, memory_p, WORDS: tl.constexpr):
    """Once in a thread block: where its words are."""
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
    """All lanes of this thread block wait for each other."""
    if PTX:
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, $1;", "=r,r", [lane], tl.int32, False, 1)


@triton.constexpr_function
def _putting(count, masked):
    values = "$2" if count == 1 else "{" + ", ".join(["$2"] * count) + "}"
    store = f"st.volatile.shared{'' if count == 1 else f'.v{count}'}.b32 [$1], {values};"
    if masked:
        return "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p " + store + "}"
    return "mov.b32 $0, 0; " + store


@triton.jit
def put(memory, word, value, at=None, COUNT: tl.constexpr = 1):
    """One value in COUNT words, at a multiple of COUNT, of this thread block's memory alone."""
    if PTX and at is None:
        tl.inline_asm_elementwise(
            _putting(COUNT, False), "=&r,r,r", [memory + 4 * word, value], tl.int32, False, 1
        )
    elif PTX:
        tl.inline_asm_elementwise(
            _putting(COUNT, True), "=&r,r,r,r", [memory + 4 * word, value, at], tl.int32, False, 1
        )
    else:
        for j in tl.static_range(COUNT):
            tl.store(memory + word + j, value, mask=None if at is None else at != 0)


@triton.jit
def get(memory, word):
    """float32, of this thread block's memory."""
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
    """To all thread blocks of the cluster."""
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
    """Two float32, at a multiple of two words, to one thread block of the cluster."""
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
def _pausing(cycles):
    code = "{.reg .pred p; .reg .u32 a, b; mov.u32 a, %clock;\nLATER: mov.u32 b, %clock;\n"
    return code + f"sub.u32 b, b, a; setp.lt.u32 p, b, {cycles};\n@p bra LATER;}}\n"


@triton.constexpr_function
def _far(chunks, waits):
    """All thread blocks read all of h, through one cache, and what is read too early is in the
    way of what it waits for: a pause first, and only what is missing is read again."""
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
    code = "{.reg .pred p<5>; .reg .b32 m;\n" + _pausing(PAUSE)
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
    """As `receive`, of chunks of 32 numbers of 16 bits in the device's memory, which all thread
    blocks see."""
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
