"""The launches of the sLSTM's Triton kernels, for whichever framework hosts them.

`launch(kernel, programs, *arguments, **constants)` is the host's (backends/torch/slstm.py,
backends/jax/slstm_triton.py). Programs that share a head wait for each other, so all of a launch
must be on the device at once. Where the host can say so, that launch is cooperative: then CUDA
refuses what would never end.
"""

from typing import NamedTuple

from keras_xlstm.backends.kernels.mlstm.tiles import power


class Device(NamedTuple):
    """What launches depend on."""

    shared_memory: int  # bytes that a program may have
    processors: int
    precision: str  # of products in the dtype at hand, as tl.dot names it
    triton: tuple  # its version
    cooperative: bool = False  # whether launches can be
    all_shared_memory: int = 0  # bytes that programs of a processor may have together
    clusters: int = 0  # programs of the largest cluster for kernels in PTX; 0: it takes no PTX
    interpreted: bool = False


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


def saved(shape, itemsize, device, exp_forget):
    """The shape of what the backward pass needs, for x of this shape."""
    B, T, _, H, D = shape
    if clustered(D, itemsize, device) or wide(D, itemsize, device):
        return B, T, H, D, 8
    return 6 if exp_forget else 7, B, T, H, D


class Launches:
    """How the work of a call is cut, rows and units of a program, and its launches."""

    def __init__(self, launch, device, B, T, H, D, itemsize):
        self.launch, self.device = launch, device
        self.B, self.T, self.H, self.D, self.itemsize = B, T, H, D, itemsize
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
    def memory(self):
        """Words that stand for shared memory, where kernels in PTX are interpreted."""
        if not ((self.clustered or self.wide) and self.device.interpreted):
            return 0
        return self.groups * self.tiles * max(48 * self.D, 8192)

    @property
    def groups(self):
        """Parts of the work that do not meet: a head's rows."""
        return self.H * -(-self.B // self.BB)

    @property
    def together(self):
        """Groups of one launch."""
        return self.resident // self.tiles

    def _launch_clustered(self, kernel, arguments, **constants):
        programs, warps = self.clustered
        if programs > 1:
            constants["cluster"] = programs
        self.launch(
            kernel, self.groups * programs, *arguments, D=self.D, N=programs, W=warps,
            num_warps=warps, num_stages=1, **constants,
        )  # fmt: skip

    def forward(self, given, first, states, h, saved, last, exp_forget, memory=None):
        """`given` (x, R, bias, hold, reset, scale), `first` h before in x's dtype, `states` (h, c,
        n, m) before; writes h, what the backward pass needs, and the states after."""
        sizes = self.B, self.T, self.H
        if self.clustered:
            self._launch_clustered(
                _kernels("cluster").forward,
                (*given, *states, h, saved, *last, memory, *sizes), EXP_FORGET=exp_forget,
            )  # fmt: skip
            return
        if self.whole:
            self.launch(
                _kernels("recurrence_whole").forward, self.groups, *given, *states, h, saved,
                *last, *sizes,
                EXP_FORGET=exp_forget, **self.forward_constants,
            )  # fmt: skip
            return

        def arguments(start, stop, group):
            before = states if start == 0 else last
            more = (memory,) if self.wide else ()
            return *given, first, *before, h, saved, *last, *more, *sizes, start, stop, group

        kernels = _kernels("grid" if self.wide else "recurrence_split")
        self._launch_split(kernels.forward, arguments, 0, False, EXP_FORGET=exp_forget)

    def backward(self, given, after, c, n, dx, d_first, exp_forget, clip, memory=None):
        """`given` (dh, saved, R, hold, reset, scale, c and n before), `after` gradients of h, c, n
        after; writes dx, and the gradients of h, c, n before."""
        options = {"EXP_FORGET": exp_forget, "CLIP": clip > 0}
        sizes = self.B, self.T, self.H
        if self.clustered:
            self._launch_clustered(
                _kernels("cluster").backward,
                (*given, *after, dx, *d_first, memory, *sizes, clip), **options,
            )  # fmt: skip
            return
        if self.whole:
            self.launch(
                _kernels("recurrence_whole").backward, self.groups, *given, *after, c, n, dx,
                *d_first,
                *sizes, clip, **options, **self.backward_constants,
            )  # fmt: skip
            return

        def arguments(start, stop, group):
            behind = after if stop == self.T else d_first
            written = (dx, *d_first, memory) if self.wide else (c, n, dx, *d_first)
            return *given, *behind, *written, *sizes, start, stop, group, clip

        kernels = _kernels("grid" if self.wide else "recurrence_split")
        self._launch_split(kernels.backward, arguments, -1, True, **options)

    def _launch_split(self, kernel, arguments, start, reverse, **constants):
        """Groups side by side, as many as are resident at once; or, where the programs of one
        group are not, a launch for each step. `arguments(start, stop, first group)`."""
        constants |= self.backward_constants if reverse else self.forward_constants
        steps = range(start, self.T)
        if not self.waits:
            for t in reversed(steps) if reverse else steps:
                programs = self.groups * self.tiles
                self.launch(kernel, programs, *arguments(t, t + 1, 0), WAIT=False, **constants)
            return
        if self.device.cooperative:
            constants["launch_cooperative_grid"] = True
        for group in range(0, self.groups, self.together):
            programs = min(self.together, self.groups - group) * self.tiles
            self.launch(kernel, programs, *arguments(start, self.T, group), WAIT=True, **constants)

    def kernel_gradient(self, h, dx, first, reset, scale, new):
        """The recurrent kernel's, in parts (parts, H, D, 4, D) that `new(shape)` makes room for."""
        B, T, H, D = self.B, self.T, self.H, self.D
        large = self.itemsize == 2 and D >= 256 and self.device.shared_memory > 190_000
        size = 128 if large else min(64, power(D))
        tile = {"BK": size, "BN": size, "L": 64 if self.itemsize == 2 else 32}
        # Programs of several splits side by side hide each other's waits.
        most = 2 if self.itemsize == 4 else 4 if large else 8
        across = -(-D // size)
        programs = 4 * H * across * across
        splits = max(1, min(most * self.processors // programs, B * T // 256))
        rows = -(-B * T // (splits * tile["L"])) * tile["L"]
        dR = new((splits, H, D, 4, D))
        self.launch(
            _kernels("kernel_gradient").kernel_gradient, splits * programs,
            h, dx, first, reset, scale, dR,
            B, T, H, rows, D=D, PREC=self.device.precision, num_warps=8 if large else 4, **tile,
        )  # fmt: skip
        return dR
