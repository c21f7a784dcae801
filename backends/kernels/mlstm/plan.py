"""The launches of the mLSTM's Triton kernels as plans (kernels/plan.py)."""

from typing import NamedTuple

from keras_xlstm.backends.kernels import plan
from keras_xlstm.backends.kernels.mlstm import hopper_plan, tiles
from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.kernels.plan import Buffer, Plan, present

BORDERS = 128  # that one step of `chunks` goes along
_BLOCK = 1024  # elements of a state that one program of `scan_chunk_states` carries


class Call(NamedTuple):
    """Sizes and options of one call."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    gate_dtypes: tuple  # of i and f
    segments: bool
    sigmoid: bool
    chunk: int
    eps: float = 0.0  # of the forward pass


def _kernels():
    """Triton is imported for the first plan."""
    from keras_xlstm.backends.kernels.mlstm import gates, inter_chunk, intra_chunk, step

    return {
        "gates": gates.gates, "chunks": gates.chunks, "gate_gradients": gates.gate_gradients,
        "chunk_states": inter_chunk.chunk_states, "intra_chunk": intra_chunk.intra_chunk,
        "scan_chunk_states": inter_chunk.scan_chunk_states, "step": step.step,
    }  # fmt: skip


def _pointers(buffers):
    """The parameters of buffers by their names in a kernel."""
    return {f"{name}_p": buffer for name, buffer in buffers.items()}


class _Pass:
    """Sizes and tiles of both passes, and the buffers that they share."""

    def __init__(self, device, call, aligned):
        self.device, self.kernels = device, _kernels()
        self.B, self.T, self.H, self.K, self.V, self.dtype = call[:6]
        self.chunk, self.BH, self.NC = call.chunk, call.B * call.H, -(-call.T // call.chunk)
        self.counts = {"T": self.T, "H": self.H, "NC": self.NC}
        self.sizes = self.counts | {"scale": self.K**-0.5}
        self.common = {
            "LC": self.chunk, "SEG": call.segments, "EVEN": self.T % self.chunk == 0,
            "PREC": device.precision,
        }  # fmt: skip
        # Sums of whole logs stay exact in float32 up to 2^24: a floor of log f, as LEAST_LOG.
        self.gates_common = {
            "LC": self.chunk, "LEAST": -float(min(1e5, 2**24 // self.chunk)),
            "SIGMOID": call.sigmoid, "SEG": call.segments,
            "num_warps": 1 if self.chunk <= 128 else 4,
        }  # fmt: skip
        self.state_tiles = tiles.chunk_states(
            self.K, self.V, self.dtype, self.chunk, device.shared_memory, triton=True
        )
        parts = -(-self.K // self.state_tiles["BX"]) * -(-self.V // self.state_tiles["BZ"])
        # Serial programs read and write least, but there must be enough of them.
        self.serial = 10 * self.BH * parts >= 9 * device.processors
        self.programs = self.BH * parts * (1 if self.serial else self.NC)
        if not self.serial:
            parts = -(-self.K * self.V // _BLOCK) + -(-self.K // _BLOCK)
        self.parts = parts  # of `inner`
        self.aligned, fused = aligned, None
        if device.hopper and not call.segments:
            fused = tiles.hopper_fused(
                self.K, self.V, self.dtype, self.BH, self.T, self.chunk, device.processors
            )
        # What states and rows in one is called with, or None: a backward pass, which may be aligned
        # where the forward pass was not, wants the parts of `gates` all the same.
        self.parts_of_gates, self.fused = fused, fused if aligned else None
        self.q, self.k = (Buffer(name, call[:4], self.dtype) for name in "qk")
        self.v, self.h = (Buffer(name, (*call[:3], self.V), self.dtype) for name in "vh")
        self.i, self.f = (
            Buffer(name, call[:3], dtype)
            for name, dtype in zip("if", call.gate_dtypes, strict=True)
        )
        self.segments = Buffer("segments", call[:2], "int32") if call.segments else None
        self.saved = saved(call)
        self.steps = []

    def vectors(self, *names):
        return [Buffer(name, (self.BH, self.NC * self.chunk)) for name in names]

    def states(self, *names):
        """Buffers of a state, or of its gradient: (C, n), with a third name m."""
        shapes = (self.B, self.H, self.K, self.V), (self.B, self.H, self.K), (self.B, self.H)
        return [Buffer(name, shape) for name, shape in zip(names, shapes, strict=False)]

    def add(self, kernel, grid, reads, writes, constants):
        if not self.device.pipelined:
            constants = plan.without_pipeline(constants)
        self.steps.append(plan.step(kernel, grid, reads, writes, constants))

    def add_pointers(self, name, grid, reads, writes, numbers, **constants):
        """Of a kernel of plain pointers."""
        reads = _pointers(reads) | numbers
        self.add(self.kernels[name], grid, reads, _pointers(writes), constants)

    def add_chunk_states(self, reads, writes, **constants):
        """What chunks add to the state, or the states at all borders; then all are that."""
        through, m = self.saved["through"], self.saved["m"]
        reads = dict.fromkeys(("rho", "fs", "fn")) | reads | {"through": through, "m": m}
        writes = {"inner": None} | writes
        more = {"seg": self.segments, "chunk": self.saved["sums"]}
        self.add_pointers(
            "chunk_states", self.programs, reads | more, writes, self.sizes, DX=self.K, DZ=self.V,
            SERIAL=self.serial, **constants, **self.common, **self.state_tiles,
        )  # fmt: skip
        if self.serial:
            return
        reads = {name: reads[name] for name in ("s0", "n0", "fs", "fn", "through", "m")}
        numbers = {name: self.sizes[name] for name in ("NC", "scale")}
        self.add_pointers(
            "scan_chunk_states", self.BH * self.parts, reads, writes, numbers, KV=self.K * self.V,
            K=self.K, BLOCK=_BLOCK, ST=3, num_warps=4, **constants,
        )  # fmt: skip

    def add_intra_chunk(self, role, DX, DZ, reads, writes, eps=0.0):
        """Rows of a chunk. What `reads` and `writes` lack, the role does not know."""
        common = {"seg": self.segments, "m": self.saved["m"], "chunk": self.saved["sums"]}
        lacking = {name: None for name in _OPTIONAL if name not in writes}
        reads, numbers = lacking | common | reads, self.sizes | {"eps": eps}
        if self.aligned and self.device.hopper:
            constants = tiles.hopper_intra_chunk(role, DX, DZ, self.dtype, self.T, self.chunk)
            if constants:
                hopper_plan.intra_chunk(self, role, DX, DZ, reads, writes, numbers, **constants)
                return
        memory = self.device.shared_memory
        own = tiles.intra_chunk(role, DX, DZ, self.dtype, self.chunk, memory, triton=True)
        grid = self.BH * self.NC * (self.chunk // own["L"]) * -(-DZ // own["BZ"])
        self.add_pointers(
            "intra_chunk", grid, reads, writes, numbers, ROLE=role, DX=DX, DZ=DZ, **self.common,
            **own,
        )  # fmt: skip


# Of `intra_chunk`: what some role lacks.
_OPTIONAL = "own", "dot", "h", "sign", "rho", "b", "br", "peak"


def _state_dtype(dtype):
    """Of the states at the borders; float16's range would not do."""
    return dtype if dtype == "bfloat16" else "float32"


def saved(call):
    """What the backward pass needs, by name: row exponents and signs, columns, chunk sums, m at the
    borders, decays, what `chunks` says of parts, states and normalisers at the borders."""
    BH, NC = call.B * call.H, -(-call.T // call.chunk)
    shapes = dict.fromkeys(("u", "u_rest", "row", "row_rest", "sign"), (BH, NC * call.chunk))
    shapes |= {"sums": (BH, NC, 4), "m": (BH, NC + 1), "through": (BH, NC)}
    shapes |= {"parts": (BH, NC, 4, 4), "S": (BH, NC + 1, call.K, call.V)}
    shapes |= {"N": (BH, NC + 1, call.K)}
    dtypes = {"S": _state_dtype(call.dtype)}
    return {
        name: Buffer(f"saved {name}", shape, dtypes.get(name, "float32"))
        for name, shape in shapes.items()
    }


class _Forward(_Pass):
    """Adds the steps of a forward pass."""

    def __init__(self, device, call, has_state, aligned):
        super().__init__(device, call, aligned)
        self.first = C, n, _ = self.states("C", "n", "m") if has_state else (None, None, None)
        self.last = C_last, n_last, _ = self.states("C last", "n last", "m last")
        self.scratch = self.b, self.b_rest, self.peak = self.vectors("b", "b_rest", "peak")
        kept = self.saved
        self.add_gates(has_state)
        reads = {
            "x": self.q,
            "y": self.k,
            "z": self.v,
            "col": kept["u"],
            "col_rest": kept["u_rest"],
        }
        reads |= {"b": self.b, "br": self.b_rest, "peak": self.peak}
        writes = {name: kept[name] for name in ("row", "row_rest", "sign")} | {"out": self.h}
        before, borders = {"s0": C, "n0": n}, {"s": kept["S"], "n": kept["N"]}
        after = borders | {"s_last": C_last, "n_last": n_last}
        options = {"REVERSE": False, "HAS_STATE": has_state}
        if self.fused:
            reads |= before | {"m": kept["m"], "parts": kept["parts"]}
            hopper_plan.fused(self, reads, after | writes, call.eps, **options)
            return
        self.add_chunk_states(
            before | {"x": self.k, "z": self.v, "w": kept["u"], "wr": kept["u_rest"]},
            after, **options,
        )  # fmt: skip
        self.add_intra_chunk("h", self.K, self.V, reads | borders, writes, call.eps)

    def add_gates(self, has_state):
        kept = self.saved
        parts = self.chunk // self.parts_of_gates["L"] if self.parts_of_gates else 0
        writes = {
            "u": kept["u"], "ur": kept["u_rest"], "b": self.b, "br": self.b_rest, "own": self.peak,
            "chunk": kept["sums"], "parts": kept["parts"],
        }  # fmt: skip
        self.add_pointers(
            "gates", self.BH * self.NC, {"i": self.i, "f": self.f, "seg": self.segments}, writes,
            self.counts, PARTS=parts, **self.gates_common,
        )  # fmt: skip
        writes = {"m": kept["m"], "through": kept["through"], "last": self.last[2]}
        self.add_pointers(
            "chunks", self.BH, {"chunk": kept["sums"], "m0": self.first[2]},
            writes | {"parts": kept["parts"]}, {"NC": self.NC}, HAS_STATE=has_state,
            N=BORDERS, PARTS=parts, num_warps=4,
        )  # fmt: skip


def forward(device, call, has_state, states, trains, aligned=True):
    """q, k, v, i, f, C, n, m, segments -> h, with `states` the last C, n, m; saved if it trains."""
    run = _Forward(device, call, has_state, aligned)
    saved = tuple(run.saved.values())
    return Plan(
        present(run.q, run.k, run.v, run.i, run.f, *run.first, run.segments),
        (run.h, *(run.last if states else ())), saved if trains else (),
        (*run.scratch, *(() if states else run.last), *(() if trains else saved)),
        tuple(run.steps),
    )  # fmt: skip


class _Backward(_Pass):
    """Adds the steps of a backward pass."""

    def __init__(self, device, call, has_state, aligned):
        super().__init__(device, call, aligned)
        BH, NC = self.BH, self.NC
        self.has_state = has_state
        # Or dq and dk each by a step of its own.
        self.pair = tiles.hopper_dq_dk(self.K, self.V, self.chunk) if self.fused else None
        self.dh = Buffer("dh", self.v.shape, self.dtype)
        self.dC, self.dn = self.states("dC", "dn") if has_state else (None, None)
        self.first = self.states("dC first", "dn first")
        inputs = self.q, self.k, self.v, self.i, self.f
        self.dq, self.dk, self.dv, self.di, self.df = self.results = [
            Buffer(f"d{b.name}", b.shape, b.dtype) for b in inputs
        ]
        self.rho, self.q_dot, self.k_dot = self.vectors("rho", "q_dot", "k_dot")
        self.dN = Buffer("dN", (BH, NC, self.K))
        if self.pair:
            self.rho = Buffer("rho", (BH, 2, NC * self.chunk))
            self.dN = Buffer("dN", (BH, NC + 1, 2, self.K))
        self.dS = Buffer("dS", (BH, NC, self.K, self.V), _state_dtype(self.dtype))
        if self.fused:
            self.parts = hopper_plan.parts_of_inner(self, halves=bool(self.pair))
        self.inner = Buffer("inner", (BH, NC, self.parts))
        self.scratch = self.rho, self.q_dot, self.k_dot, self.dS, self.dN, self.inner
        kept = self.saved
        row, u = (kept["row"], kept["row_rest"]), (kept["u"], kept["u_rest"])
        names = "row", "row_rest", "col", "col_rest"
        self.rows = dict(zip(names, row + u, strict=True))
        self.turned = dict(zip(names, u + row, strict=True))
        if self.pair:
            self.add_fused({"h": self.h, "sign": kept["sign"]}, {"rho": self.rho, "n_last": None})
            self.add_dq_dk()
        else:
            self.add_dq()
            self.add_states_and_dv()
            self.add_intra_chunk_of_columns(
                "dk", {"x": self.v, "y": self.dh, "z": self.q, "own": self.k},
                {"out": self.dk, "dot": self.k_dot},
            )  # fmt: skip
        self.add_gate_gradients()

    def borders(self):
        """What the gradients of states are written to."""
        written = {"s": self.dS, "n": self.dN, "inner": self.inner}
        return written | dict(zip(("s_last", "n_last"), self.first, strict=True))

    def add_fused(self, reads, writes):
        kept = self.saved
        reads = self.turned | reads | {
            "x": self.k, "y": self.q, "z": self.dh, "f": kept["S"], "fn": kept["N"],
            "m": kept["m"], "parts": kept["parts"], "s0": self.dC, "n0": self.dn,
        }  # fmt: skip
        hopper_plan.fused(
            self, reads, self.borders() | {"out": self.dv} | writes, halves=bool(self.pair),
            REVERSE=True, HAS_STATE=self.has_state,
        )  # fmt: skip

    def add_dq_dk(self):
        kept = self.saved
        reads = self.rows | {
            "dh": self.dh, "v": self.v, "q": self.q, "k": self.k, "C": kept["S"], "dC": self.dS,
            "n": kept["N"], "dn": self.dN, "rho": self.rho, "m": kept["m"], "chunk": kept["sums"],
        }  # fmt: skip
        writes = {"dq": self.dq, "dk": self.dk, "q_dot": self.q_dot, "k_dot": self.k_dot}
        hopper_plan.dq_dk(self, reads, writes | {"dn_first": self.first[1]}, **self.pair)

    def add_dq(self):
        kept = self.saved
        reads = self.rows | {
            "x": self.dh, "y": self.v, "z": self.k, "s": kept["S"], "n": kept["N"], "own": self.q,
            "h": self.h, "sign": kept["sign"],
        }  # fmt: skip
        writes = {"out": self.dq, "dot": self.q_dot, "rho": self.rho}
        self.add_intra_chunk("dq", self.V, self.K, reads, writes)

    def add_states_and_dv(self):
        kept = self.saved
        if self.fused:
            self.add_fused({"rho": self.rho}, {})
            return
        reads = {
            "x": self.q, "z": self.dh, "w": kept["row"], "wr": kept["row_rest"], "rho": self.rho,
            "s0": self.dC, "n0": self.dn, "fs": kept["S"], "fn": kept["N"],
        }  # fmt: skip
        self.add_chunk_states(reads, self.borders(), REVERSE=True, HAS_STATE=self.has_state)
        reads = {"x": self.k, "y": self.q, "z": self.dh}
        self.add_intra_chunk_of_columns("dv", reads, {"out": self.dv})

    def add_intra_chunk_of_columns(self, role, reads, writes):
        reads = reads | self.turned | {"s": self.dS, "n": self.dN, "rho": self.rho}
        sizes = (self.V, self.K) if role == "dk" else (self.K, self.V)
        self.add_intra_chunk(role, *sizes, reads, writes)

    def add_gate_gradients(self):
        reads = {
            "i": self.i, "f": self.f, "seg": self.segments, "q_dot": self.q_dot,
            "k_dot": self.k_dot, "inner": self.inner,
        }  # fmt: skip
        self.add_pointers(
            "gate_gradients", self.BH * self.NC, reads, {"di": self.di, "df": self.df},
            self.counts, PARTS=self.parts, P=power(self.parts), **self.gates_common,
        )  # fmt: skip


def backward(device, call, has_state, states, aligned=True):
    """dh, dC, dn (with `has_state`: gradients of the last state), q, k, v, i, f, segments, h ->
    dq, dk, dv, di, df, with `states` the first state's dC, dn."""
    run = _Backward(device, call, has_state, aligned)
    given = run.dh, run.dC, run.dn, run.q, run.k, run.v, run.i, run.f, run.segments, run.h
    return Plan(
        present(*given), (*run.results, *(run.first if states else ())), tuple(run.saved.values()),
        (*run.scratch, *(() if states else run.first)), tuple(run.steps),
    )  # fmt: skip


def single_step(call, overwrites=False):
    """q, k, v, i, f, C, n, m -> h and the next C, n, m, of one step that is not trained through.
    If it `overwrites`, the next C stands where C was, and is no output. (Of n and m all thread
    blocks of a head read all.)"""
    B, _, H, K, V = call[:5]
    shapes = {name: (B, 1, H, K) for name in "qk"} | {"v": (B, 1, H, V)}
    inputs = [Buffer(name, shape, call.dtype) for name, shape in shapes.items()]
    inputs += [Buffer(name, (B, 1, H), dtype)
               for name, dtype in zip("if", call.gate_dtypes, strict=True)]  # fmt: skip
    states = {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
    inputs += [Buffer(name, shape) for name, shape in states.items()]
    outputs = [Buffer("h", shapes["v"], call.dtype)]
    outputs += [Buffer(f"{name}_out", shape) for name, shape in states.items()]
    writes = _pointers({b.name: b for b in outputs})
    if overwrites:
        writes["C_out_p"] = next(b for b in inputs if b.name == "C")
        outputs = [b for b in outputs if b.name != "C_out"]
    BV, warps = tiles.step(B * H, K, V)
    constants = {
        "K": K, "V": V, "P": power(K), "BV": BV, "SIGMOID": call.sigmoid, "num_warps": warps,
    }  # fmt: skip
    reads = _pointers({b.name: b for b in inputs}) | {"scale": K**-0.5, "eps": call.eps}
    only = plan.step(_kernels()["step"], B * H * -(-V // BV), reads, writes, constants)
    return Plan(tuple(inputs), tuple(outputs), (), (), (only,))
