"""Compiles the Triton kernels that a call launches, for a GPU that need not be there.

python tests/compile_kernels.py 90:128/256:bfloat16    # the mLSTM, keys/values of a head
python tests/compile_kernels.py 90:192:bfloat16        # the sLSTM, units of a head; or several

Prints a line per kernel: what was asked for, name, registers, shared memory and its limit, bytes
spilled to the stack.
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import triton
from keras_xlstm.backends.torch import device, driver, launch, mlstm, slstm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int8: "*i8",
}  # fmt: skip

_OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid", "maxnreg")


def signature(kernel, args, kwargs):
    """As Triton's launcher would infer it: signature, constants, divisible arguments."""
    names = list(inspect.signature(kernel.fn).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    kinds, constants, divisible = {}, {}, {}
    for j, name in enumerate(names):
        value, parameter = given[name], kernel.params[j]
        if parameter.is_constexpr or value is None or value is True or value is False:
            kinds[name], constants[(j,)] = "constexpr", value
        elif hasattr(value, "block_shape"):
            kinds[name] = f"tensordesc<bf16{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            kinds[name], divisible[(j,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            kinds[name] = "fp32"
        elif parameter.do_not_specialize:
            kinds[name] = "i32"
        elif value == 1:
            kinds[name], constants[(j,)] = "constexpr", 1
        else:
            kinds[name] = "i32"
            if value % 16 == 0:
                divisible[(j,)] = [["tt.divisibility", 16]]
    return kinds, constants, divisible


class Compiler:
    """Compiles in place of a launch, and keeps what the kernel needs."""

    def __init__(self, target):
        self.target, self.seen = target, {}
        self.launches = []  # (kernel, launch, what Triton compiled), in order

    def launch(self, launch, stream, *args):
        kernel, kwargs = launch.kernel, dict(launch.constants)
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        kinds, constants, divisible = signature(kernel, args, kwargs)
        role = kwargs.get("ROLE", "reverse" if kwargs.get("REVERSE") else "")
        gluon = kernel.is_gluon()
        source = (GluonASTSource if gluon else ASTSource)(kernel, kinds, constants, divisible)
        compiled = triton.compile(source, target=self.target, options=options)
        # Sums in the order in which programs happen to arrive would differ from run to run.
        assert "atomic" not in compiled.asm["ttgir"], kernel
        for buffers in in_flight(compiled.asm["ttgir"]) if not gluon else ():  # it waits itself
            assert set(buffers) <= {compiled.metadata.num_stages}, (kernel, role, buffers)
        used = {}
        if self.target.backend == "cuda":
            used = resources(compiled)
            # What a launch by the driver itself takes a program to have.
            assert driver._parameters(compiled) is not None, (kernel, compiled.src.signature)
        flags = "".join(k[0] for k in ("SEG", "SERIAL", "HAS_STATE", "CLIP") if kwargs.get(k))
        file = kernel.fn.__module__.rpartition(".")[2]
        if file in ("cluster", "grid"):
            only_lanes(compiled.asm["ttgir"])
        name = f"{file}.{kernel.fn.__name__} {role} {flags}"
        self.launches.append((name, launch, compiled))
        # What PTX declares comes on top of what Triton asks for.
        used["SHARED"] = compiled.metadata.shared + used.pop("SHARED", 0)
        self.seen[name] = used


def only_lanes(ttgir):
    """The kernels in PTX count on it: an element a lane, nothing moved between lanes by Triton."""
    layouts = re.findall(
        r"#ttg.blocked<\{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\]", ttgir
    )
    assert layouts == [("1", "32")], layouts
    assert "convert_layout" not in ttgir
    assert "local_" not in ttgir


def in_flight(ttgir):
    """Of each product that still reads shared memory while the next tiles are fetched (on Hopper):
    how many buffers each operand has. One with fewer than the loop has stages is overwritten too
    early, as Triton 3.6 and 3.9 do with an operand that something else reads, too."""
    counts, of, operands = {}, {}, None
    for line in ttgir.splitlines():
        name = line.split(" = ")[0].strip()
        if alloc := re.search(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", line):
            counts[name] = int(alloc[1])
        elif slot := re.search(r"memdesc_index (%\w+)", line):
            of[name] = slot[1]
        elif dot := re.search(r"warp_group_dot (%\w+), (%\w+)", line):
            operands = [counts[of[o]] for o in dot.groups() if of.get(o) in counts]
        elif re.search(r"warp_group_dot_wait .*pendings = [1-9]", line):
            yield operands


def resources(compiled):
    """Registers and bytes of spills, as the disassembler reports them."""
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [os.path.join(folder, "cuobjdump"), "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    found["SHARED"] = max(0, found["SHARED"] - 1024)  # which newer devices keep for themselves
    return found


def compile_mlstm(K, V, dtype, hopper):
    """A training step, the way of few heads, a single step; on Hopper, what is for it alone."""
    q, k = (torch.empty(2, 512, 2, K, dtype=dtype, requires_grad=True) for _ in "qk")
    v = torch.empty(2, 512, 2, V, dtype=dtype, requires_grad=True)
    i, f = (torch.empty(2, 512, 2, requires_grad=True) for _ in "if")
    state = [torch.empty(2, 2, K, V), torch.empty(2, 2, K), torch.empty(2, 2)]
    ids = torch.zeros(2, 512, dtype=torch.int32)
    options = {"input_gate": "exp", "eps": 1e-6, "chunk_size": None}
    device.processors = lambda device: 1
    for device.hopper in ([lambda device: True] if hopper else []) + [lambda device: False]:
        for given in (ids, None) if device.hopper(None) else (None,):
            launch._KNOWN.clear()
            h, _ = mlstm.mlstm(q, k, v, i, f, None, given, **options)
            torch.autograd.grad(h.float().sum(), (q, k, v, i, f))
    device.processors = lambda device: 10**9
    with torch.no_grad():
        mlstm.mlstm(q, k, v, i, f, state, ids, **options)
        mlstm.mlstm(*(t[:, :1] for t in (q, k, v, i, f)), state, None, **options)


def compile_slstm(D, dtype):
    """A training step from a fresh state, and one with everything that a call can have."""
    x = torch.empty(16, 64, 4, 2, D, dtype=dtype, requires_grad=True)
    R = torch.empty(2, D, 4, D, dtype=dtype, requires_grad=True)
    bias = torch.empty(4, 2, D, requires_grad=True)
    state = tuple(torch.empty(16, 2, D) for _ in "hcnm")
    flags = torch.zeros(16, 64, dtype=torch.bool)
    device.processors = lambda device: 10**9
    for s, flag, scale, clip in ((None, None, None, None), (state, flags, state[0], 10.0)):
        h, _ = slstm.slstm(x, R, bias, s, flag, flag, scale, "sigmoid", clip)
        torch.autograd.grad(h.float().sum(), (x, R, bias))


# Bytes of shared memory that a program may have.
MEMORY = {"80": 166_912, "86": 101_376, "90": 232_448, "100": 232_448, "gfx942": 65_536}


def compile_all(arch, sizes, dtype):
    """A `Compiler` that has compiled the kernels of this call."""
    launch._KNOWN.clear()
    sizes, dtype = [int(n) for n in sizes.split("/")], getattr(torch, dtype)
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    launched = Compiler(target)
    launch.Launch.__call__ = lambda self, *arguments: launched.launch(self, *arguments)
    device.shared_memory = device.all_shared_memory = lambda device: MEMORY[arch]
    device.clusters = lambda device: 0 if amd else 8 if arch == "90" else 1
    if len(sizes) == 2:
        compile_mlstm(*sizes, dtype, hopper=arch == "90")
    else:
        compile_slstm(*sizes, dtype)
    return launched


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        arch, *rest = asked.split(":")
        for name, used in compile_all(arch, *rest).seen.items():
            numbers = used.get("REG", "-"), used["SHARED"], MEMORY[arch], used.get("STACK", 0)
            print(asked, name, *numbers, flush=True)
