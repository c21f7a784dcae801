"""Tile sizes of the mLSTM's kernels, in Triton and in Pallas: a table for what was tuned, rules for
all else. Dtypes by name."""

import functools

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CHUNKS = (16, 32, 64, 128, 256, 512)
_HOPPER = 232_448  # bytes of shared memory
# Tiles found by benchmarks/tune_torch.py for bfloat16 on an H200. Of `intra_chunk`: rows L, columns
# LN, a slice BS of the border product, stages, warps; by role and sizes as powers of two.
_INTRA_CHUNK = {
    ("h", 64, 128): (64, 32, 64, 3, 4),
    ("h", 128, 256): (64, 32, 32, 3, 4),
    ("h", 256, 512): (128, 32, 64, 3, 8),
    ("dq", 128, 64): (64, 32, 64, 3, 4),
    ("dq", 256, 128): (64, 32, 64, 3, 4),
    ("dq", 512, 256): (128, 32, 64, 2, 8),
    ("dk", 128, 64): (64, 32, 64, 3, 4),
    ("dk", 256, 128): (64, 32, 64, 3, 4),
    ("dk", 512, 256): (128, 32, 64, 2, 8),
    ("dv", 64, 128): (64, 32, 64, 3, 4),
    ("dv", 128, 256): (64, 64, 64, 2, 4),
    ("dv", 256, 512): (128, 32, 64, 3, 8),
}
# Of Triton alone, which can bound the registers of a thread, the last here: a third program then
# runs on a processor. Without the bound the same tiles are slower than those above.
_TRITON = {
    ("dq", 256, 128): (64, 16, 64, 3, 4, 168),
    ("dk", 256, 128): (64, 16, 64, 3, 4, 168),
    ("dv", 128, 256): (64, 32, 32, 3, 4, None),
    ("dk", 512, 256): (128, 16, 64, 3, 8, None),
}
# Of `hopper_intra_chunk`, bfloat16 alone: rows and columns of a program, buffers of x, of y and z,
# programs of a processor; by role and sizes.
_HOPPER_INTRA_CHUNK = {
    ("h", 128, 256): (128, 256, 2, 2, 1), ("dq", 256, 128): (128, 128, 1, 3, 1),
    ("dk", 256, 128): (128, 128, 1, 3, 1), ("dv", 128, 256): (128, 256, 2, 2, 1),
    ("h", 256, 512): (128, 256, 1, 2, 1), ("dv", 256, 512): (128, 256, 1, 2, 1),
    ("dq", 128, 64): (128, 64, 2, 3, 1), ("dk", 128, 64): (64, 64, 2, 3, 2),
}  # fmt: skip
# Of `hopper_fused`, bfloat16 alone: values of a program, steps that the state takes at once,
# stages; registers of a thread for rows and for the state, with which nothing waits for a product
# that it does not need.
_HOPPER_FUSED = {(128, 256): (128, 32, 3, 144, 200), (64, 128): (64, 64, 4, 144, 168)}
# Tried in turn where the table has nothing that fits: on other sizes, dtypes and devices.
_INTRA_CHUNK_ANY = (
    (64, 32, 64, 2, 4), (64, 32, 64, 2, 8), (64, 32, 32, 1, 4), (32, 32, 32, 1, 8),
    (32, 16, 16, 1, 4), (16, 16, 16, 1, 4),
)  # fmt: skip
# Of `chunk_states`: BX, BZ, steps L, stages, warps. The first is for Triton in float32 and float16,
# where 4 warps spill; in bfloat16 4 are faster.
_CHUNK_STATES = (
    (128, 256, 64, 3, 8), (128, 128, 64, 3, 4), (64, 128, 64, 3, 4), (64, 64, 32, 2, 4),
    (32, 32, 16, 1, 4),
)  # fmt: skip


def power(n, least=16):
    """The power of two that holds n; products want 16."""
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def unsupported(K, V, chunk_size, dtype, shared_memory):
    """Why no tiles serve heads of these sizes, chunks of this many steps or a device of this much
    shared memory, or None."""
    if K > 512 or V > 1024:
        return f"it takes up to 512 key and 1024 value dimensions a head, not {K} and {V}"
    if chunk_size not in (None, *_CHUNKS):
        return f"its chunk sizes are {', '.join(map(str, _CHUNKS))}, not {chunk_size}"
    roles = ("h", K, V), ("dq", V, K), ("dk", V, K), ("dv", K, V)
    if any(intra_chunk(*role, dtype, 16, shared_memory) is None for role in roles):
        return f"heads of {K}/{V} are too large for the device's shared memory"
    return None


def intra_chunk(role, DX, DZ, dtype, chunk, shared_memory, triton=False):
    """Of `intra_chunk` in a role, as its constants, or None where none fit; `shared_memory` in
    bytes; `triton`: for Triton itself, not Pallas."""
    size = _SIZES[dtype]
    state_size = 2 if dtype == "bfloat16" else 4  # of what enters the second product
    BX, BZ = min(power(DX), 512 // size), power(DZ)
    if role in ("h", "dv"):  # the others sum over all of their columns
        BZ = min(BZ, 512 // size)
    NX = -(-DX // BX)

    def fits(L, LN, BS, stages, warps):
        x = L if NX == 1 else stages * L  # read once, or along with y; two tiles are unrolled
        within = size * (BX * (x + stages * LN) * min(NX, 2) + stages * LN * BZ)
        within += state_size * L * LN + 2 * (state_size - size) * LN * BZ
        border = stages * (size * L * BS + state_size * BS * BZ)
        return max(within, border) + 8192 <= shared_memory and L * BZ <= warps * 32 * 128

    known = (role, power(DX), power(DZ)) if dtype == "bfloat16" else None
    registers = None
    if triton and known in _TRITON and shared_memory >= _HOPPER:
        L, LN, BS, stages, warps, registers = _TRITON[known]
    elif known in _INTRA_CHUNK and shared_memory >= _HOPPER:
        L, LN, BS, stages, warps = _INTRA_CHUNK[known]
    else:
        found = next((tiles for tiles in _INTRA_CHUNK_ANY if fits(*tiles)), None)
        if found is None:
            return None
        L, LN, BS, stages, warps = found
    L = min(L, chunk)
    LN, BS = min(LN, L), min(BS, BX)
    found = {
        "L": L, "LN": LN, "BX": BX, "BZ": BZ, "BS": BS, "ST": stages, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip
    return found | {"maxnreg": registers} if registers else found


def hopper_intra_chunk(role, DX, DZ, dtype, T, chunk):
    """Of `hopper_intra_chunk` in a role, as its constants, or None where `intra_chunk` is."""
    if dtype != "bfloat16" or (role, DX, DZ) not in _HOPPER_INTRA_CHUNK:
        return None
    if chunk % 128 or T % chunk:  # its tiles are copied whole
        return None
    L, BZ, XS, ST, programs = _HOPPER_INTRA_CHUNK[role, DX, DZ]
    # BO columns leave at once; what the warps that copy leave over goes to those that multiply.
    found = {
        "BZ": BZ, "BO": BZ if programs == 1 and BZ <= 64 else BZ // 2, "L": L, "LN": 64, "XS": XS,
        "ST": ST, "SMALL": DZ <= 64, "PROGRAMS": programs, "REGISTERS": 24, "num_warps": L // 16,
    }  # fmt: skip
    if programs > 1:
        found["maxnreg"] = 65536 // (programs * 32 * (L // 16 + 4)) // 8 * 8
    return found


def hopper_fused(K, V, dtype, heads, T, chunk, processors):
    """Of `hopper_fused`, in both directions, as its constants, or None where `chunk_states` and
    `intra_chunk` are the ones."""
    if dtype != "bfloat16" or (K, V) not in _HOPPER_FUSED or chunk not in (128, 256) or T % chunk:
        return None
    BZ, BY, stages, for_rows, for_state = _HOPPER_FUSED[K, V]
    programs = heads * (V // BZ)
    # One is on a processor at a time. Were many processors to wait for the last, the others' time
    # would be less.
    if programs < 0.75 * processors * -(-programs // processors):
        return None
    return {
        "BZ": BZ, "L": 64, "BY": BY, "ST": stages, "TWO_SUMS": BZ <= 64, "ROWS_REGISTERS": for_rows,
        "STATE_REGISTERS": for_state, "num_warps": 4,
    }  # fmt: skip


def hopper_dq_dk(K, V, chunk):
    """Of `hopper_dq_dk`, where `hopper_fused` runs, or None where `intra_chunk` makes dq and dk."""
    if (K, V, chunk) != (64, 128, 128):  # all tiles of a chunk are on chip
        return None
    return {"AHEAD": 2, "REGISTERS": 24, "num_warps": 8}


def chunk_states(DX, DZ, dtype, chunk, shared_memory, triton=False):
    """Of `chunk_states`, likewise."""
    size = _SIZES[dtype]
    wide = 1 if dtype == "bfloat16" else 2
    for BX, BZ, L, stages, warps in _CHUNK_STATES[0 if triton and wide == 2 else 1 :]:
        BX, BZ, L = min(BX, power(DX)), min(BZ, power(DZ)), min(L, chunk)
        needed = max((stages + wide - 1) * size * L * (BX + BZ), 2 * wide * BX * BZ)
        if needed + 4096 <= shared_memory and BX * BZ <= warps * 32 * 128 // wide:
            break
    return {"BX": BX, "BZ": BZ, "L": L, "ST": stages, "num_warps": warps, "num_stages": stages}


def chunk_steps(T, K, V, dtype):
    """Steps of a chunk. Longer ones write fewer states and compute more pairs."""
    best = 256 if dtype != "float32" and K * V > 8192 else 128
    return min(best, power(T))


def step(heads, K, V):
    """Values of a program of a single step in Triton, all keys of which it holds, and warps."""
    size = 4096  # of a program's state; few heads want many programs
    if heads * V >= 64 * 1024:
        size = 8192 if heads * V < 160 * 1024 else 16384
    return min(max(size // power(K), 16), power(V)), 4


def pallas_step(heads, K, V):
    """Keys and values of a tile of a single step in Pallas, which loads two ahead, and warps."""
    many = isinstance(heads, int) and heads * V >= 160 * 1024  # it may be a symbol
    BK, BV, warps = (128, 64, 16) if many and K >= 256 else (32, 64, 4)
    return min(BK, K), min(BV, V), warps
