"""Steps of the mLSTM's kernels for NVIDIA's Hopper, which read and write matrices by TMA.

`run` is a pass of plan.py, to which each function adds one step. Buffers come by their names in a
kernel.
"""

from keras_xlstm.backends.kernels.plan import Matrix


def _parameters(buffers, matrices):
    """By pointers, or by descriptors of those in `matrices`: {name: (shape, tile)}."""
    found = {}
    for name, buffer in buffers.items():
        if name in matrices:
            found[f"{name}_d"] = buffer and Matrix(buffer, *matrices[name])
        else:
            found[f"{name}_p"] = buffer
    return found


def parts_of_inner(run, halves):
    """So many numbers of a chunk, from `fused`, are the product of a state and its gradient."""
    L, NZ = run.fused["L"], run.V // run.fused["BZ"]
    return NZ * (L + run.K) if halves else NZ * L + run.K


def fused(run, reads, writes, eps=0.0, *, REVERSE, HAS_STATE, halves=False):
    """States and rows in one. What `reads` and `writes` lack, is not for this direction."""
    from keras_xlstm.backends.kernels.mlstm.hopper_fused import hopper_fused

    K, V, L, BZ = run.K, run.V, run.fused["L"], run.fused["BZ"]
    optional = ("f", "h", "fn", "inner", "rho", "sign", "b", "br", "peak")
    reads = {name: None for name in optional if name not in writes} | reads
    keys, values = (run.B * run.T, run.H * K), (run.B * run.T, run.H * V)
    written, read = [(run.BH * (run.NC + n) * K, V) for n in (0 if REVERSE else 1, 1)]
    matrices = {
        "x": (keys, (L, K)), "y": (keys, (L, K)), "z": (values, (L, BZ)),
        "s": (written, (K, BZ)), "f": (read, (L, BZ)), "out": (values, (L, BZ)),
        "h": (values, (L, BZ)),
    }  # fmt: skip
    constants = run.fused | {
        "REVERSE": REVERSE, "DX": K, "DZ": V, "LC": run.chunk, "HAS_STATE": HAS_STATE,
        "HALVES": halves,
    }  # fmt: skip
    reads = _parameters(reads, matrices) | run.sizes | {"eps": eps}
    run.add(hopper_fused, run.BH * (V // BZ), reads, _parameters(writes, matrices), constants)


def dq_dk(run, reads, writes, **constants):
    from keras_xlstm.backends.kernels.mlstm.hopper_dq_dk import hopper_dq_dk

    K, V, L = run.K, run.V, run.chunk
    items = run.BH * run.NC
    keys, values = (run.B * run.T, run.H * K), (run.B * run.T, run.H * V)
    entering, leaving = [(run.BH * (run.NC + n) * K, V) for n in (1, 0)]
    matrices = {
        "dh": (values, (L, V)), "v": (values, (L, V)), "C": (entering, (K, V)),
        "dC": (leaving, (K, V)), **dict.fromkeys(("q", "k", "dq", "dk"), (keys, (L, K))),
    }  # fmt: skip
    reads = _parameters(reads, matrices) | run.sizes | {"items": items}
    run.add(
        hopper_dq_dk, min(items, run.device.processors), reads, _parameters(writes, matrices),
        constants | {"K": K, "V": V, "L": L},
    )  # fmt: skip


def intra_chunk(run, role, DX, DZ, reads, writes, numbers, PROGRAMS, **constants):
    from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import hopper_intra_chunk

    L, LN, BZ, BO = (constants[name] for name in ("L", "LN", "BZ", "BO"))
    turn = run.chunk // L * (DZ // BZ)
    items = run.BH * run.NC * turn
    # A multiple of `turn`, so that long blocks and short ones alternate.
    programs = max(PROGRAMS * run.device.processors // turn, 1) * turn
    steps, out_steps = (run.B * run.T, run.H * DX), (run.B * run.T, run.H * DZ)
    borders = run.BH * (run.NC + (1 if role in ("h", "dq") else 0))
    state = (borders * DZ, DX), (DZ, LN)
    if role in ("h", "dv"):
        state = (borders * DX, DZ), (LN, BZ)
    matrices = {
        "x": (steps, (L, DX)), "y": (steps, (LN, DX)), "z": (out_steps, (LN, BZ)), "s": state,
        "out": (out_steps, (L, BO)), "h": (steps, (LN, DX)),
    }  # fmt: skip
    constants |= {"ROLE": role, "DX": DX, "DZ": DZ, "LC": run.chunk, "SEG": run.common["SEG"]}
    reads = _parameters(reads, matrices) | numbers | {"items": items}
    run.add(
        hopper_intra_chunk, min(items, programs), reads, _parameters(writes, matrices), constants
    )
