"""The mLSTM's launches, forward and backward, for whichever framework hosts them.

The host has (backends/torch/mlstm_plan.py, backends/jax/mlstm_triton.py)

    device                      what is launched on; see `Device`
    launch(kernel, programs, **constants)   a function of a stream and the kernel's arguments
    describe(*matrices)         a function that turns tensors into TMA descriptors, each of a matrix
                                (rows, columns) and a tile
    parts(*parts)               buffers side by side, each a shape, or a shape and a dtype's name:
                                `new(like)` makes the memory, `of(memory, known)` the buffers

What calls with tensors alike have in common (sizes, tiles, compiled kernels) is worked out once, as
a small sequence's kernels run for less time than Python takes to ask for them.
"""

from typing import NamedTuple

from keras_xlstm.backends.kernels.mlstm import tiles
from keras_xlstm.backends.kernels.mlstm.gates import chunks, gate_gradients, gates
from keras_xlstm.backends.kernels.mlstm.inter_chunk import chunk_states, scan_chunk_states
from keras_xlstm.backends.kernels.mlstm.intra_chunk import intra_chunk
from keras_xlstm.backends.kernels.mlstm.tiles import power

_BLOCK = 1024  # elements of a state that one program of `scan_chunk_states` carries


class Device(NamedTuple):
    """What launches depend on."""

    shared_memory: int  # bytes that a program may have
    processors: int
    hopper: bool  # whether kernels for NVIDIA's Hopper run
    precision: str  # of products in the dtype at hand, as tl.dot names it


class Call(NamedTuple):
    """Sizes and options of one call."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    segments: bool
    sigmoid: bool
    chunk: int
    aligned: bool = True  # every tensor's memory, to 16 bytes: TMA wants it


def _hopper():
    # Gluon, their language, may be another in another Triton: only where they run.
    from keras_xlstm.backends.kernels.mlstm import hopper_plan

    return hopper_plan


class _Launches:
    """Sizes and tiles of both passes: a few launches, always the same."""

    repeats = True

    def __init__(self, host, call):
        self.host, self.device = host, host.device
        self.B, self.T, self.H, self.K, self.V, self.dtype, segments, sigmoid, chunk, _ = call
        self.BH, self.NC, self.chunk = self.B * self.H, -(-self.T // chunk), chunk
        self.aligned = call.aligned
        self.sizes = self.T, self.H, self.NC, self.K**-0.5
        self.common = {
            "LC": chunk, "SEG": segments, "EVEN": self.T % chunk == 0,
            "PREC": self.device.precision,
        }  # fmt: skip
        # Sums of whole logs stay exact in float32 up to 2^24: a floor of log f, as LEAST_LOG.
        self.gates_common = {
            "LC": chunk, "LEAST": -float(min(1e5, 2**24 // chunk)), "SIGMOID": sigmoid,
            "SEG": segments, "num_warps": 1 if chunk <= 128 else 4,
        }  # fmt: skip
        self.state_tiles = tiles.chunk_states(
            self.K, self.V, self.dtype, chunk, self.device.shared_memory, triton=True
        )
        self.parts = -(-self.K // self.state_tiles["BX"]) * -(-self.V // self.state_tiles["BZ"])
        # Serial programs read and write least, but there must be enough of them.
        self.serial = 10 * self.BH * self.parts >= 9 * self.device.processors
        self.programs = self.BH * self.parts * (1 if self.serial else self.NC)
        if not self.serial:
            self.parts = -(-self.K * self.V // _BLOCK) + -(-self.K // _BLOCK)
        self.in_one = None  # or what the kernel for states and rows in one is called with
        if self.device.hopper and not segments:
            self.in_one = tiles.hopper_fused(
                self.K, self.V, self.dtype, self.BH, self.T, chunk, self.device.processors
            )
        self.kept = kept(host, call)
        # Of states that are written, but that nobody will read.
        B, H, K, V = self.B, self.H, self.K, self.V
        self.unread = host.parts((B, H, K, V), (B, H, K), (B, H))
        self.launches = []

    def launch(self, kernel, programs, **constants):
        self.launches.append(launch := self.host.launch(kernel, programs, **constants))
        return launch

    def states(self, reverse, has_state):
        """`chunk_states`, and `scan_chunk_states` or None."""
        first = self.launch(
            chunk_states, self.programs, DX=self.K, DZ=self.V, SERIAL=self.serial, REVERSE=reverse,
            HAS_STATE=has_state, **self.common, **self.state_tiles,
        )  # fmt: skip
        if self.serial:
            return first, None
        return first, self.launch(
            scan_chunk_states, self.BH * self.parts, KV=self.K * self.V, K=self.K, BLOCK=_BLOCK,
            HAS_STATE=has_state, REVERSE=reverse, ST=3, num_warps=4,
        )  # fmt: skip

    def intra_chunk(self, role, DX, DZ):
        if self.aligned and self.device.hopper:
            constants = tiles.hopper_intra_chunk(role, DX, DZ, self.dtype, self.T, self.chunk)
            if constants:
                return _hopper().intra_chunk(self, role, DX, DZ, **constants)
        memory = self.device.shared_memory
        own = tiles.intra_chunk(role, DX, DZ, self.dtype, self.chunk, memory, triton=True)
        rows = self.chunk // own["L"]
        programs = self.BH * self.NC * rows * -(-DZ // own["BZ"])
        return self.launch(intra_chunk, programs, ROLE=role, DX=DX, DZ=DZ, **self.common, **own)

    def states_and_rows(self, reverse, has_state, halves=False):
        """Both in one, or None where that is not for these sizes."""
        if not self.aligned or not self.in_one:
            return None
        return _hopper().states_and_rows(self, reverse, has_state, halves, **self.in_one)

    @property
    def known(self):
        """Whether the kernels are compiled, so that addresses serve as well as tensors."""
        return all(launch.known for launch in self.launches)


def _state_dtype(dtype):
    """Of the states at the borders; float16's range would not do."""
    return dtype if dtype == "bfloat16" else "float32"


def kept(host, call):
    """What the backward pass needs: five vectors (row exponents and signs, columns), chunk sums, m
    at the borders, decays, what `chunks` says of parts, states and normalisers at the borders."""
    BH, NC = call.B * call.H, -(-call.T // call.chunk)
    return host.parts(
        *[(BH, NC * call.chunk)] * 5, (BH, NC, 4), (BH, NC + 1), (BH, NC), (BH, NC, 4, 4),
        ((BH, NC + 1, call.K, call.V), _state_dtype(call.dtype)), (BH, NC + 1, call.K),
    )  # fmt: skip


class Forward(_Launches):
    """(q, k, v, i, f, C, n, m, segment_ids), results (h, C, n, m) or (h,), eps -> as `kept`."""

    def __init__(self, host, call, has_state):
        super().__init__(host, call)
        self.own = host.parts(*[(self.BH, self.NC * self.chunk)] * 3)
        parts = self.chunk // self.in_one["L"] if self.in_one else 0
        self.gates = self.launch(gates, self.BH * self.NC, PARTS=parts, **self.gates_common)
        self.chunks = self.launch(
            chunks, self.BH, HAS_STATE=has_state, N=128, PARTS=parts, num_warps=4
        )  # fmt: skip
        self.both = self.states_and_rows(False, has_state)
        if not self.both:
            self.first, self.second = self.states(False, has_state)
            self.h = self.intra_chunk("h", self.K, self.V)

    def __call__(self, stream, given, results, eps):
        known, like = self.known, given[0]
        kept, own = self.kept.new(like), self.own.new(like)
        if known:
            given, results = addresses(given), addresses(results)
        q, k, v, i, f, C, n, m, seg = given
        h, *last = results
        if not last:
            unread = self.unread.new(like)
            last = self.unread.of(unread, known)
        C_last, n_last, m_last = last
        u, u_rest, row, row_rest, sign, sums, at, through, parts, S, N = self.kept.of(kept, known)
        b, b_rest, peak = self.own.of(own, known)
        T, H, NC, scale = self.sizes
        self.gates(stream, i, f, seg, u, u_rest, b, b_rest, peak, sums, parts, T, H, NC)
        self.chunks(stream, sums, m, at, through, m_last, parts, NC)
        last, none = (C_last, n_last), (None, None, None)
        if self.both:
            self.both(
                stream, q, k, v, S, None, h, None, N, C, n, *last, *none, sign, at, parts, row,
                row_rest, u, u_rest, b, b_rest, peak, *self.sizes, eps,
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
    """(dh, dC, dn, q, k, v, i, f, segment_ids, h, kept), results (dq, dk, dv, di, df[, dC, dn])."""

    def __init__(self, host, call, has_state):
        super().__init__(host, call)
        BH, NC, K, V = self.BH, self.NC, self.K, self.V
        pair = tiles.hopper_dq_dk(K, V, self.chunk) if self.aligned and self.in_one else None
        self.both = self.states_and_rows(True, has_state, halves=bool(pair))
        if not self.both:
            self.first, self.second = self.states(True, has_state)
            self.dv = self.intra_chunk("dv", K, V)
        rho, dN = (BH, NC * self.chunk), (BH, NC, K)
        if pair:
            rho, dN = (BH, 2, NC * self.chunk), (BH, NC + 1, 2, K)
            self.pair = _hopper().pair(self, **pair)
        else:
            self.pair = None
            self.dq, self.dk = self.intra_chunk("dq", V, K), self.intra_chunk("dk", V, K)
        self.own = host.parts(
            rho, *[(BH, NC * self.chunk)] * 2, ((BH, NC, K, V), _state_dtype(self.dtype)), dN,
            (BH, NC, self.parts),
        )  # fmt: skip
        self.gate_gradients = self.launch(
            gate_gradients, BH * NC, PARTS=self.parts, P=power(self.parts), **self.gates_common
        )

    def __call__(self, stream, given, results):
        known, like, kept = self.known, given[0], given[-1]
        own = self.own.new(like)
        if known:
            given, results = addresses(given), addresses(results)
        dh, dC, dn, q, k, v, i, f, seg, h, _ = given
        dq, dk, dv, di, df, *d_first = results
        if not d_first:
            unread = self.unread.new(like)
            d_first = self.unread.of(unread, known)[:2]
        u, u_rest, row, row_rest, sign, sums, at, through, parts, S, N = self.kept.of(kept, known)
        rho, q_dot, k_dot, dS, dN, inner = self.own.of(own, known)
        T, H, NC, scale = self.sizes
        rows, cols, none = (row, row_rest), (u, u_rest), (None, None, None)
        rest = *none, *self.sizes, 0.0
        if self.pair:
            dC_first, dn_first = d_first
            self.both(
                stream, k, q, dh, dS, S, dv, h, dN, dC, dn, dC_first, None, N, inner, rho, sign, at,
                parts, *cols, *rows, *none, *self.sizes, 0.0,
            )  # fmt: skip
            self.pair(
                stream, dh, v, q, k, S, dS, dq, dk, q_dot, k_dot, N, dN, dn_first, rho, at, sums,
                *rows, *cols, *self.sizes,
            )  # fmt: skip
        else:
            self.dq(
                stream, dh, v, k, S, N, dq, q, q_dot, h, sign, rho, seg, at, sums, *rows, *cols,
                *rest,
            )  # fmt: skip
            turned = None, None, rho, seg, at, sums, *cols, *rows, *rest
            if self.both:
                self.both(
                    stream, k, q, dh, dS, S, dv, None, dN, dC, dn, *d_first, N, inner, rho, None,
                    at, parts, *cols, *rows, *none, *self.sizes, 0.0,
                )  # fmt: skip
            else:
                self.first(
                    stream, q, dh, *rows, rho, seg, sums, at, through, dS, dN, dC, dn, *d_first, S,
                    N, inner, *self.sizes,
                )  # fmt: skip
                if self.second:
                    self.second(
                        stream, dS, dN, dC, dn, through, at, *d_first, S, N, inner, NC, scale
                    )
                self.dv(stream, k, q, dh, dS, dN, dv, None, None, *turned)
            self.dk(stream, v, dh, q, dS, dN, dk, k, k_dot, *turned)
        self.gate_gradients(stream, i, f, seg, q_dot, k_dot, inner, di, df, T, H, NC)


def addresses(tensors):
    return [t if t is None or type(t) is int else t.data_ptr() for t in tensors]
