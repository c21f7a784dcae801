"""The launches of the sLSTM's Triton kernels as plans (kernels/plan.py).

Programs that share a head wait for each other, so all of a launch must be on the device at once.
Where the host can say so, that launch is cooperative: then CUDA refuses what would never end.
"""

from typing import NamedTuple

from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.kernels.plan import SIZES, Buffer, Plan, present, step, without_pipeline


def unsupported(D, itemsize, shared_memory):
    """Why the kernels cannot run heads of D units, or None."""
    if D > 1024:
        return f"it takes up to 1024 units a head, not {D}"
    if not _split(D, 8, itemsize, shared_memory):
        return f"heads of {D} units are too large for the device's shared memory"
    return None


def _kernels(name):
    """A module of kernels: Triton is imported on the first launch."""
    from keras_xlstm.backends.kernels.slstm import (
        cluster,
        grid,
        kernel_gradient,
        recurrence_split,
        recurrence_whole,
    )

    modules = cluster, grid, kernel_gradient, recurrence_split, recurrence_whole
    return {module.__name__.rpartition(".")[2]: module for module in modules}[name]


def _whole(D, BB, itemsize, shared_memory):
    """Whether one program can hold the recurrent kernel of a head; float32's is there in parts."""
    DP = power(D)
    needed = (4 * DP * DP * itemsize + 16 * DP * BB) * itemsize // 2
    return DP <= (64 if itemsize == 4 else 128) and needed <= shared_memory


def _split(D, BB, itemsize, shared_memory):
    """Units of a program, units of a round, bytes of shared memory; or None: nothing fits."""
    KR = min(power(D), 256 if itemsize == 2 else 128)
    rows = max(16, BB * itemsize // 2)
    for BU in (16, 8) if itemsize == 2 else (8,):
        needed = 4 * itemsize * KR * (BU * -(-D // KR) + rows) + 2048
        if needed <= shared_memory:
            return BU, KR, needed
    return None


def _warps(D, BB, itemsize, triton):
    """Of a program of `split`: as few as have registers enough. Triton holds the recurrent kernel
    in them from 3.9 on, in shared memory before."""
    return 8 if BB == 32 or itemsize == 4 or (D > 512 and triton >= (3, 9)) else 4


def clustered(D, itemsize, device):
    """Programs of a head and their warps, by the kernels in PTX; or None.

    A warp has 8 units. One for each of a processor's four schedulers is the fastest; more units
    cluster, up to what registers can hold of the recurrent kernel.
    """
    if itemsize != 2 or D % 32 or D > 256:
        return None
    if device.interpreted:  # tensors' sizes are powers of two, and programs run one after another
        return None if D & (D - 1) else (1, D // 8)
    if D // 32 <= device.clusters:
        return D // 32, 4
    return (1, 8) if D == 64 and device.clusters else None


def wide(D, itemsize, device):
    """Whether programs of 16 units in PTX are what heads of D units take, which do not cluster."""
    return itemsize == 2 and D % 32 == 0 and device.clusters > 0 and (D > 128 or device.interpreted)


class Call(NamedTuple):
    """Sizes and options of one call, and which of its arguments are there."""

    B: int
    T: int
    H: int
    D: int
    dtype: str
    bias: bool = False
    state: bool = False
    hold: bool = False
    reset: bool = False
    scale: bool = False
    exp_forget: bool = False


def saved(call, device):
    """What the backward pass needs."""
    B, T, H, D = call[:4]
    itemsize = SIZES[call.dtype]
    if clustered(D, itemsize, device) or wide(D, itemsize, device):
        return Buffer("saved", (B, T, H, D, 8))
    return Buffer("saved", (6 if call.exp_forget else 7, B, T, H, D))


class Cut:
    """How the work of a call is cut: rows and units of a thread block, and their constants."""

    def __init__(self, device, B, T, H, D, itemsize):
        self.device, self.B, self.T, self.H, self.D = device, B, T, H, D
        self.processors = self.resident = device.processors
        memory = device.shared_memory
        self.clustered = clustered(D, itemsize, device)
        self.wide = not self.clustered and wide(D, itemsize, device)
        if self.clustered or self.wide:
            self.BB, self.whole = 8, False
            self.tiles = 1 if self.clustered else D // 16
            self.waits = self.tiles <= self.resident
            self.exchanges = self.wide and self.waits
            self.forward_constants = self.backward_constants = {
                "D": D, "num_warps": 8, "num_stages": 1,
            }  # fmt: skip
            return
        self.whole = _whole(D, 8, itemsize, memory)
        # Few rows: less work in each step's chain of dependent operations, as long as there are
        # processors for all the programs.
        cut = _split(D, 8, itemsize, memory)
        for BB in (8, 16) if itemsize == 4 else (8, 16, 32):
            larger = _split(D, BB, itemsize, memory)
            if not (_whole(D, BB, itemsize, memory) if self.whole else larger):
                break
            self.BB, cut = BB, larger or cut
            self.tiles = 1 if self.whole else -(-D // cut[0])
            if self.groups * self.tiles <= self.processors:
                break
        if self.whole:
            self.forward_constants = {"DP": power(D), "BB": self.BB, "num_warps": 8}
            self.backward_constants = dict(self.forward_constants)
        else:
            BU, KR, needed = cut
            S = _warps(D, self.BB, itemsize, device.triton)
            self.forward_constants = {"KR": KR, "BB": self.BB, "BU": BU, "num_warps": S}
            self.backward_constants = self.forward_constants | {"S": S}
            if S == 4:  # then the registers, too, are enough for two programs a processor
                self.resident *= max(1, min(2, device.all_shared_memory // needed))
        for constants in (self.forward_constants, self.backward_constants):
            constants |= {"D": D, "PREC": device.precision, "num_stages": 1}
        # Programs that wait for each other must all be resident.
        self.waits = self.tiles <= self.resident
        # Whether what programs exchange must hold a NaN of all bits that they never write.
        self.exchanges = self.waits and not self.whole

    @property
    def groups(self):
        """Parts of the work that do not meet: a head's rows."""
        return self.H * -(-self.B // self.BB)

    @property
    def together(self):
        """Groups of one launch."""
        return self.resident // self.tiles

    @property
    def memory(self):
        """What stands for shared memory where kernels in PTX are interpreted, or None."""
        if not ((self.clustered or self.wide) and self.device.interpreted):
            return None
        words = self.groups * self.tiles * max(48 * self.D, 8192)
        return Buffer("memory", (words,), "int32", bit=0)

    def steps(self, name, reads, writes, first, after_first, **constants):
        """The launches of the kernels "forward" or "backward". `first`: what the first one reads of
        states before, in place of which later ones read `after_first`."""
        constants |= self.forward_constants if name == "forward" else self.backward_constants
        if self.clustered or self.wide:
            writes = writes | {"memory_p": self.memory}
        if self.clustered:
            programs, warps = self.clustered
            constants |= {"N": programs, "W": warps, "num_warps": warps}
            kernel = getattr(_kernels("cluster"), name)
            grid = self.groups * programs
            return [step(kernel, grid, reads | first, writes, constants, cluster=programs)]
        if self.whole:
            kernel = getattr(_kernels("recurrence_whole"), name)
            return [step(kernel, self.groups, reads | first, writes, constants)]
        kernel = getattr(_kernels("grid" if self.wide else "recurrence_split"), name)

        def part(start, stop, group, programs, states, **more):
            more_reads = {"start": start, "stop": stop, "group": group}
            return step(kernel, programs, reads | states | more_reads, writes, constants | more)

        start = 0 if name == "forward" else -1  # which stands for the initial state
        if not self.waits:  # the programs of one group are not all resident: step by step
            turns = range(start, self.T) if name == "forward" else range(self.T - 1, start - 1, -1)
            programs = self.groups * self.tiles
            return [
                part(t, t + 1, 0, programs, after_first if j else first, WAIT=False)
                for j, t in enumerate(turns)
            ]
        more = {"WAIT": True}
        if self.device.cooperative:
            more["launch_cooperative_grid"] = True
        return [
            part(start, self.T, group, min(self.together, self.groups - group) * self.tiles, first,
                 **more)
            for group in range(0, self.groups, self.together)
        ]  # fmt: skip


def _cut(device, call):
    return Cut(device, call.B, call.T, call.H, call.D, SIZES[call.dtype])


def _buffers(call, cut):
    """{name: Buffer, or None of what the call has not}"""
    B, T, H, D = call[:4]
    dtype, bit = call.dtype, 1 if cut.exchanges else None
    rows, steps, none = (B, H, D), (B, T), None
    found = [Buffer("R", (H, D, 4, D), dtype)]
    found += [Buffer(name, rows) for name in ("h1", "c1", "n1", "m1", "dh1", "dc1", "dn1")]
    found += [Buffer("bias", (4, H, D))] if call.bias else []
    found += [Buffer("hold", steps, "int8")] if call.hold else []
    found += [Buffer("reset", steps, "int8")] if call.reset else []
    found += [Buffer("scale", rows)] if call.scale else []
    if call.state:
        found += [Buffer("first", rows, dtype), *(Buffer(f"{s}0", rows) for s in "hcnm")]
    optional = "bias", "hold", "reset", "scale", "first", "h0", "c0", "n0", "m0"
    return dict.fromkeys(optional, none) | {b.name: b for b in found}, bit


def _parameters(buffers, names):
    return {f"{name}_p": buffers[name] for name in names.split()}


def forward(device, call, trains):
    """x, R, bias, hold, reset, scale, first (h before, in x's dtype), h0, c0, n0, m0 -> h, h1, c1,
    n1, m1; `saved` if it trains. R is in x's dtype."""
    cut = _cut(device, call)
    buffers, bit = _buffers(call, cut)
    B, T, H, D = call[:4]
    x, h = Buffer("x", (B, T, 4, H, D), call.dtype), Buffer("h", (B, T, H, D), call.dtype, bit)
    kept = saved(call, device) if trains else None
    buffers |= {"x": x, "h": h, "saved": kept}
    reads = _parameters(buffers, "x R bias hold reset scale") | {"B": B, "T": T, "H": H}
    if not (cut.clustered or cut.whole):
        reads |= _parameters(buffers, "first")
    before = _parameters(buffers, "h0 c0 n0 m0")
    behind = {f"{s}0_p": buffers[f"{s}1"] for s in "hcnm"}
    writes = _parameters(buffers, "h saved h1 c1 n1 m1")
    steps = cut.steps("forward", reads, writes, before, behind, EXP_FORGET=call.exp_forget)
    inputs = "x", "R", "bias", "hold", "reset", "scale", "first", "h0", "c0", "n0", "m0"
    return Plan(
        present(*(buffers[name] for name in inputs)),
        tuple(buffers[name] for name in ("h", "h1", "c1", "n1", "m1")),
        present(kept), present(cut.memory), tuple(steps),
    )  # fmt: skip


def backward(device, call, clip):
    """dh, dh1, dc1, dn1, R, hold, reset, scale, first, c0, n0, h, c1, n1 -> dx, dh0, dc0, dn0, dR:
    the recurrent kernel's gradient in parts (parts, H, D, 4, D)."""
    cut = _cut(device, call)
    buffers, bit = _buffers(call, cut)
    B, T, H, D = call[:4]
    buffers |= {name: Buffer(name, (B, T, H, D), call.dtype) for name in ("dh", "h")}
    buffers |= {name: Buffer(name, (B, H, D)) for name in ("dh0", "dc0", "dn0")}
    buffers["dx"] = Buffer("dx", (B, T, 4, H, D), call.dtype, bit)
    buffers["saved"] = saved(call, device)
    gradient = _kernel_gradient(device, call, buffers)
    reads = _parameters(buffers, "dh saved R hold reset scale c0 n0")
    reads |= {"B": B, "T": T, "H": H, "clip": clip}
    if not (cut.clustered or cut.wide):
        reads |= _parameters(buffers, "c1 n1")
    after = _parameters(buffers, "dh1 dc1 dn1")
    before = {f"d{s}1_p": buffers[f"d{s}0"] for s in "hcn"}
    writes = _parameters(buffers, "dx dh0 dc0 dn0")
    options = {"EXP_FORGET": call.exp_forget, "CLIP": clip > 0}
    steps = cut.steps("backward", reads, writes, after, before, **options)
    inputs = (
        "dh", "dh1", "dc1", "dn1", "R", "hold", "reset", "scale", "first", "c0", "n0", "h", "c1",
        "n1",
    )  # fmt: skip
    return Plan(
        present(*(buffers[name] for name in inputs)),
        (*(buffers[name] for name in ("dx", "dh0", "dc0", "dn0")), gradient.arguments["dR_p"]),
        (buffers["saved"],), present(cut.memory), (*steps, gradient),
    )  # fmt: skip


def _kernel_gradient(device, call, buffers):
    """Of the recurrent kernel, in parts."""
    B, T, H, D = call[:4]
    itemsize = SIZES[call.dtype]
    large = itemsize == 2 and D >= 256 and device.shared_memory > 190_000
    size = 128 if large else min(64, power(D))
    L = 64 if itemsize == 2 else 32
    # Programs of several splits side by side hide each other's waits.
    most = 2 if itemsize == 4 else 4 if large else 8
    across = -(-D // size)
    programs = 4 * H * across * across
    splits = max(1, min(most * device.processors // programs, B * T // 256))
    reads = _parameters(buffers, "h dx first reset scale")
    reads |= {"B": B, "T": T, "H": H, "rows": -(-B * T // (splits * L)) * L}
    constants = {
        "BK": size, "BN": size, "L": L, "D": D, "PREC": device.precision,
        "num_warps": 8 if large else 4,
    }  # fmt: skip
    constants = constants if device.pipelined else without_pipeline(constants)
    dR = Buffer("dR", (splits, H, D, 4, D))
    kernel = _kernels("kernel_gradient").kernel_gradient
    return step(kernel, splits * programs, reads, {"dR_p": dR}, constants)
