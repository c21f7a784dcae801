"""The mLSTM's launches on PyTorch tensors, forward and backward.

What calls with tensors alike have in common (sizes, tiles, compiled kernels) is worked out once, as
a small sequence's kernels run for less time than Python takes to ask for them.
"""

import functools

import torch
from keras_xlstm.backends import mlstm_tiles as tiles
from keras_xlstm.backends.mlstm_tiles import power
from keras_xlstm.backends.torch import machine
from keras_xlstm.backends.torch.machine import name, precision
from keras_xlstm.backends.torch.mlstm_attend import attend
from keras_xlstm.backends.torch.mlstm_gates import chunks, gate_gradients, gates
from keras_xlstm.backends.torch.mlstm_kernels import borders, states
from keras_xlstm.backends.torch.operators import Launch, Parts

_BLOCK = 1024  # elements of a state that one program of `borders` carries


class _Launches:
    """Sizes and tiles of both passes."""

    def __init__(self, given, q, v, segment_ids, sigmoid, chunk):
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.BH, self.NC = v.shape[-1], self.B * self.H, -(-self.T // chunk)
        self.chunk, self.dtype = chunk, name(q.dtype)
        self.device = q.device
        self.shared_memory = machine.shared_memory(q.device)
        # TMA, which the kernels for Hopper use, wants it.
        self.aligned = all(t is None or t.data_ptr() % 16 == 0 for t in given)
        self.sizes = self.T, self.H, self.NC, self.K**-0.5
        self.common = {
            "LC": chunk, "SEG": segment_ids is not None, "EVEN": self.T % chunk == 0,
            "PREC": precision(q.dtype),
        }  # fmt: skip
        # Sums of whole logs stay exact in float32 up to 2^24: a floor of log f, as LEAST_LOG.
        self.gates_common = {
            "LC": chunk, "LEAST": -float(min(1e5, 2**24 // chunk)), "SIGMOID": sigmoid,
            "SEG": segment_ids is not None, "num_warps": 1 if chunk <= 128 else 4,
        }  # fmt: skip
        self.state_tiles = tiles.states(
            self.K, self.V, self.dtype, chunk, self.shared_memory, triton=True
        )
        self.parts = -(-self.K // self.state_tiles["BX"]) * -(-self.V // self.state_tiles["BZ"])
        # Serial programs read and write least, but there must be enough of them.
        self.serial = 10 * self.BH * self.parts >= 9 * machine.processors(q.device)
        self.programs = self.BH * self.parts * (1 if self.serial else self.NC)
        if not self.serial:
            self.parts = -(-self.K * self.V // _BLOCK) + -(-self.K // _BLOCK)
        self.in_one = None  # or what the kernel for states and rows in one is called with
        if machine.hopper(q.device) and segment_ids is None:
            self.in_one = tiles.hopper_serial(
                self.K, self.V, self.dtype, self.BH, self.T, chunk, machine.processors(q.device)
            )
        self.launches = []

    def launch(self, kernel, programs, **constants):
        self.launches.append(launch := Launch(kernel, programs, **constants))
        return launch

    def states(self, reverse, has_state):
        """`states`, and `borders` or None."""
        first = self.launch(
            states, self.programs, DX=self.K, DZ=self.V, SERIAL=self.serial, REVERSE=reverse,
            HAS_STATE=has_state, **self.common, **self.state_tiles,
        )  # fmt: skip
        if self.serial:
            return first, None
        return first, self.launch(
            borders, self.BH * self.parts, KV=self.K * self.V, K=self.K, BLOCK=_BLOCK,
            HAS_STATE=has_state, REVERSE=reverse, ST=3, num_warps=4,
        )  # fmt: skip

    def attend(self, role, DX, DZ):
        if self.aligned and machine.hopper(self.device):
            constants = tiles.hopper(role, DX, DZ, self.dtype, self.T, self.chunk)
            if constants:
                return self._attend_hopper(role, DX, DZ, **constants)
        own = tiles.attend(role, DX, DZ, self.dtype, self.chunk, self.shared_memory, triton=True)
        rows = self.chunk // own["L"]
        programs = self.BH * self.NC * rows * -(-DZ // own["BZ"])
        return self.launch(attend, programs, ROLE=role, DX=DX, DZ=DZ, **self.common, **own)

    def states_and_rows(self, reverse, has_state):
        """Both in one, or None where that is not for these sizes."""
        if not self.aligned or not self.in_one:
            return None
        return self._states_and_rows(reverse, has_state, **self.in_one)

    def _states_and_rows(self, reverse, has_state, L, BZ, **constants):
        from keras_xlstm.backends.torch.mlstm_hopper_serial import serial_hopper

        K, V = self.K, self.V
        self.parts = V // BZ * L + K
        launch = self.launch(
            serial_hopper, self.BH * (V // BZ), REVERSE=reverse, DX=K, DZ=V, BZ=BZ, L=L,
            LC=self.chunk, HAS_STATE=has_state, **constants,
        )  # fmt: skip
        keys, values = (self.B * self.T, self.H * K), (self.B * self.T, self.H * V)
        written, read = [(self.BH * (self.NC + n) * K, V) for n in (0 if reverse else 1, 1)]
        # Of x, y, z, the states that are written and those that are read, out.
        describe = _describe(
            (keys, (L, K)), (keys, (L, K)), (values, (L, BZ)), (written, (K, BZ)),
            (read, (L, BZ)), (values, (L, BZ)),
        )  # fmt: skip

        def call(stream, *given):
            launch(stream, *describe(given[:6]), *given[6:])

        return call

    def _attend_hopper(self, role, DX, DZ, BZ, BO, L, LN, PROGRAMS, **constants):
        from keras_xlstm.backends.torch.mlstm_hopper import attend_hopper

        turn = self.chunk // L * (DZ // BZ)
        items = self.BH * self.NC * turn
        # A multiple of `turn`, so that long blocks and short ones alternate.
        programs = max(PROGRAMS * machine.processors(self.device) // turn, 1) * turn
        launch = self.launch(
            attend_hopper, min(items, programs), ROLE=role, DX=DX, DZ=DZ, BZ=BZ, BO=BO, L=L, LN=LN,
            LC=self.chunk, SEG=self.common["SEG"], **constants,
        )  # fmt: skip
        steps = self.B * self.T, self.H * DX
        out_steps = self.B * self.T, self.H * DZ
        borders = self.BH * (self.NC + (1 if role in ("h", "dq") else 0))
        if role in ("h", "dv"):
            state, tile = (borders * DX, DZ), (LN, BZ)
        else:
            state, tile = (borders * DZ, DX), (DZ, LN)
        # Of x, y, z, S, out and h.
        describe = _describe(
            (steps, (L, DX)), (steps, (LN, DX)), (out_steps, (LN, BZ)), (state, tile),
            (out_steps, (L, BO)), (steps, (LN, DX)),
        )  # fmt: skip

        def call(stream, x, y, z, s, n, out, own, dot, h, *rest):
            *matrices, h = describe((x, y, z, s, out, h))
            launch(stream, *matrices, n, own, dot, h, *rest, items)

        return call

    @property
    def known(self):
        """Whether the kernels are compiled, so that addresses serve as well as tensors."""
        return all(launch.known for launch in self.launches)


def state_dtype(dtype):
    """Of the states at the borders; float16's range would not do."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def kept(q, v, chunk):
    """What the backward pass needs: five vectors (row exponents and signs, columns), chunk sums, m
    at the borders, decays, what `chunks` says of parts, states and normalisers at the borders."""
    B, T, H, K = q.shape
    BH, NC = B * H, -(-T // chunk)
    return Parts(
        *[(BH, NC * chunk)] * 5, (BH, NC, 4), (BH, NC + 1), (BH, NC), (BH, NC, 4, 4),
        ((BH, NC + 1, K, v.shape[-1]), state_dtype(q.dtype)), (BH, NC + 1, K),
    )  # fmt: skip


class Forward(_Launches):
    """(q, k, v, i, f, C, n, m, segment_ids), results (h, C, n, m), eps -> what `kept` describes."""

    def __init__(self, given, sigmoid, chunk):
        q, _, v, _, _, C, _, m, segment_ids = given
        super().__init__(given, q, v, segment_ids, sigmoid, chunk)
        self.kept, self.own = kept(q, v, chunk), Parts(*[(self.BH, self.NC * chunk)] * 3)
        parts = chunk // self.in_one["L"] if self.in_one else 0
        self.gates = self.launch(gates, self.BH * self.NC, PARTS=parts, **self.gates_common)
        self.chunks = self.launch(
            chunks, self.BH, HAS_STATE=m is not None, N=128, PARTS=parts, num_warps=4
        )  # fmt: skip
        self.both = self.states_and_rows(False, C is not None)
        if not self.both:
            self.first, self.second = self.states(False, C is not None)
            self.h = self.attend("h", self.K, self.V)

    def __call__(self, stream, given, results, eps):
        known, like = self.known, given[0]
        kept, own = self.kept.new(like), self.own.new(like)
        if known:
            given, results = addresses(given), addresses(results)
        q, k, v, i, f, C, n, m, seg = given
        h, C_last, n_last, m_last = results
        u, u_rest, row, row_rest, sign, sums, at, through, parts, S, N = self.kept.of(kept, known)
        b, b_rest, peak = self.own.of(own, known)
        T, H, NC, scale = self.sizes
        self.gates(stream, i, f, seg, u, u_rest, b, b_rest, peak, sums, parts, T, H, NC)
        self.chunks(stream, sums, m, at, through, m_last, parts, NC)
        last, none = (C_last, n_last), (None, None, None)
        if self.both:
            self.both(
                stream, q, k, v, S, None, h, N, C, n, *last, *none, sign, at, parts, row, row_rest,
                u, u_rest, b, b_rest, peak, *self.sizes, eps,
            )  # fmt: skip
            return kept
        self.first(
            stream, k, v, u, u_rest, None, seg, sums, at, through, S, N, C, n, *last, *none,
            *self.sizes,
        )  # fmt: skip
        if self.second:
            self.second(stream, S, N, C, n, through, at, *last, *none, NC, scale)
        self.h(
            stream, q, k, v, S, N, h, *none, sign, None, seg, at, sums, row, row_rest, u, u_rest,
            b, b_rest, peak, *self.sizes, eps,
        )  # fmt: skip
        return kept


class Backward(_Launches):
    """(dh, dC, dn, q, k, v, i, f, segment_ids, h, kept), results (dq, dk, dv, di, df, dC, dn)."""

    def __init__(self, given, sigmoid, chunk):
        _, dC, _, q, _, v, _, _, segment_ids, _, _ = given
        super().__init__(given, q, v, segment_ids, sigmoid, chunk)
        BH, NC, K, V = self.BH, self.NC, self.K, self.V
        self.both = self.states_and_rows(True, dC is not None)
        if not self.both:
            self.first, self.second = self.states(True, dC is not None)
            self.dv = self.attend("dv", K, V)
        self.kept = kept(q, v, chunk)
        self.own = Parts(
            *[(BH, NC * chunk)] * 3, ((BH, NC, K, V), state_dtype(q.dtype)), (BH, NC, K),
            (BH, NC, self.parts),
        )  # fmt: skip
        self.dq, self.dk = self.attend("dq", V, K), self.attend("dk", V, K)
        self.gate_gradients = self.launch(
            gate_gradients, BH * NC, PARTS=self.parts, P=power(self.parts), **self.gates_common
        )

    def __call__(self, stream, given, results):
        known, kept, own = self.known, given[-1], self.own.new(given[0])
        if known:
            given, results = addresses(given), addresses(results)
        dh, dC, dn, q, k, v, i, f, seg, h, _ = given
        dq, dk, dv, di, df, *d_first = results
        u, u_rest, row, row_rest, sign, sums, at, through, parts, S, N = self.kept.of(kept, known)
        rho, q_dot, k_dot, dS, dN, inner = self.own.of(own, known)
        T, H, NC, scale = self.sizes
        rows, cols, none = (row, row_rest), (u, u_rest), (None, None, None)
        rest = *none, *self.sizes, 0.0
        self.dq(
            stream, dh, v, k, S, N, dq, q, q_dot, h, sign, rho, seg, at, sums, *rows, *cols, *rest
        )
        turned = None, None, rho, seg, at, sums, *cols, *rows, *rest
        if self.both:
            self.both(
                stream, k, q, dh, dS, S, dv, dN, dC, dn, *d_first, N, inner, rho, None, at, parts,
                *cols, *rows, *none, *self.sizes, 0.0,
            )  # fmt: skip
        else:
            self.first(
                stream, q, dh, *rows, rho, seg, sums, at, through, dS, dN, dC, dn, *d_first, S, N,
                inner, *self.sizes,
            )  # fmt: skip
            if self.second:
                self.second(stream, dS, dN, dC, dn, through, at, *d_first, S, N, inner, NC, scale)
            self.dv(stream, k, q, dh, dS, dN, dv, None, None, *turned)
        self.dk(stream, v, dh, q, dS, dN, dk, k, k_dot, *turned)
        self.gate_gradients(stream, i, f, seg, q_dot, k_dot, inner, di, df, T, H, NC)


def addresses(tensors):
    return [None if t is None else t.data_ptr() for t in tensors]


def _describe(*matrices):
    """A function of bfloat16 tensors (or their addresses, or None) that makes them descriptors;
    of each the shape as a matrix, and that of a tile. Memory is used again, and to make
    descriptors anew takes longer than a small kernel."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    known = []
    for whole, tile in matrices:
        layout = gl.NVMMASharedLayout.get_default_for(list(tile), gl.bfloat16)
        known.append((whole, (whole[1], 1), list(tile), layout))

    @functools.lru_cache(maxsize=64)
    def of(j, place):
        return TensorDescriptor(_Place(place), *known[j])

    def describe(tensors):
        places = (t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors)
        return [None if place is None else of(j, place) for j, place in enumerate(places)]

    return describe


class _Place:
    """The address of a bfloat16 tensor, as descriptors want it."""

    dtype = torch.bfloat16

    def __init__(self, place):
        self.place = place

    def data_ptr(self):
        return self.place
