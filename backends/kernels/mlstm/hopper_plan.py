"""Launches of the mLSTM's kernels for NVIDIA's Hopper, which read and write by TMA descriptors.

`run` is a pass of plan.py; each function makes one of its launches.
"""

from keras_xlstm.backends.kernels.mlstm.hopper_dq_dk import hopper_dq_dk
from keras_xlstm.backends.kernels.mlstm.hopper_fused import hopper_fused
from keras_xlstm.backends.kernels.mlstm.hopper_intra_chunk import hopper_intra_chunk


def states_and_rows(run, reverse, has_state, halves, L, BZ, **constants):
    K, V = run.K, run.V
    run.parts = V // BZ * (L + K) if halves else V // BZ * L + K
    launch = run.launch(
        hopper_fused, run.BH * (V // BZ), REVERSE=reverse, DX=K, DZ=V, BZ=BZ, L=L,
        LC=run.chunk, HAS_STATE=has_state, HALVES=halves, **constants,
    )  # fmt: skip
    keys, values = (run.B * run.T, run.H * K), (run.B * run.T, run.H * V)
    written, read = [(run.BH * (run.NC + n) * K, V) for n in (0 if reverse else 1, 1)]
    # Of x, y, z, the states that are written and those that are read, out, h.
    describe = run.host.describe(
        (keys, (L, K)), (keys, (L, K)), (values, (L, BZ)), (written, (K, BZ)),
        (read, (L, BZ)), (values, (L, BZ)), (values, (L, BZ)),
    )  # fmt: skip

    def call(stream, *given):
        launch(stream, *describe(given[:7]), *given[7:])

    return call


def pair(run, **constants):
    K, V, L = run.K, run.V, run.chunk
    items = run.BH * run.NC
    launch = run.launch(
        hopper_dq_dk, min(items, run.device.processors), K=K, V=V, L=L, **constants
    )  # fmt: skip
    keys, values = (run.B * run.T, run.H * K), (run.B * run.T, run.H * V)
    entering, leaving = [(run.BH * (run.NC + n) * K, V) for n in (1, 0)]
    # Of dh, v, q, k, the states and their gradients, dq, dk.
    describe = run.host.describe(
        (values, (L, V)), (values, (L, V)), (keys, (L, K)), (keys, (L, K)),
        (entering, (K, V)), (leaving, (K, V)), (keys, (L, K)), (keys, (L, K)),
    )  # fmt: skip

    def call(stream, *given):
        launch(stream, *describe(given[:8]), *given[8:], items)

    return call


def intra_chunk(run, role, DX, DZ, BZ, BO, L, LN, PROGRAMS, **constants):
    turn = run.chunk // L * (DZ // BZ)
    items = run.BH * run.NC * turn
    # A multiple of `turn`, so that long blocks and short ones alternate.
    programs = max(PROGRAMS * run.device.processors // turn, 1) * turn
    launch = run.launch(
        hopper_intra_chunk, min(items, programs), ROLE=role, DX=DX, DZ=DZ, BZ=BZ, BO=BO, L=L, LN=LN,
        LC=run.chunk, SEG=run.common["SEG"], **constants,
    )  # fmt: skip
    steps = run.B * run.T, run.H * DX
    out_steps = run.B * run.T, run.H * DZ
    scan_chunk_states = run.BH * (run.NC + (1 if role in ("h", "dq") else 0))
    if role in ("h", "dv"):
        state, tile = (scan_chunk_states * DX, DZ), (LN, BZ)
    else:
        state, tile = (scan_chunk_states * DZ, DX), (DZ, LN)
    # Of x, y, z, S, out and h.
    describe = run.host.describe(
        (steps, (L, DX)), (steps, (LN, DX)), (out_steps, (LN, BZ)), (state, tile),
        (out_steps, (L, BO)), (steps, (LN, DX)),
    )  # fmt: skip

    def call(stream, x, y, z, s, n, out, own, dot, h, *rest):
        *matrices, h = describe((x, y, z, s, out, h))
        launch(stream, *matrices, n, own, dot, h, *rest, items)

    return call
