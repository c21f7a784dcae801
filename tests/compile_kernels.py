"""Compiles the Triton kernels of a call's plan, for a GPU that need not be there.

python tests/compile_kernels.py 90:128/256:bfloat16    # the mLSTM, keys/values of a head
python tests/compile_kernels.py 90:192:bfloat16        # the sLSTM, units of a head; or several
python tests/compile_kernels.py 90:block:bfloat16      # what blocks compute around the memory

Prints a line per kernel: what was asked for, name, registers, shared memory and its limit, bytes
spilled to the stack.
"""

import os
import re
import subprocess
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton
from keras_xlstm.backends.kernels.block import plan as block
from keras_xlstm.backends.kernels.mlstm import plan as mlstm
from keras_xlstm.backends.kernels.mlstm import tiles
from keras_xlstm.backends.kernels.plan import Device, source
from keras_xlstm.backends.kernels.slstm import plan as slstm
from keras_xlstm.backends.torch import device, driver
from triton.backends.compiler import GPUTarget


class Compiler:
    """Compiles the kernels of plans, and keeps what they need."""

    def __init__(self, target, pipelined):
        self.target, self.pipelined, self.seen = target, pipelined, {}
        self.launches = []  # (name, step, what Triton compiled), in order

    def compile(self, step):
        kernel, constants = step.kernel, step.constants
        role = constants.get("ROLE", "reverse" if constants.get("REVERSE") else "")
        given, options = source(kernel, step.arguments, constants)
        compiled = triton.compile(given, target=self.target, options=options)
        if not self.pipelined:
            in_loops = compiled.metadata.num_stages if "scf.for" in compiled.asm["ttgir"] else 1
            assert in_loops == constants.get("ST", 1) == 1, (kernel, role)
            fetched = re.findall(r"\w*async_\w+", compiled.asm["ttgir"])
            assert not [name for name in fetched if "async_copy" in name or "tma" in name], fetched
        # Sums in the order in which programs happen to arrive would differ from run to run.
        assert "atomic" not in compiled.asm["ttgir"], kernel
        if not kernel.is_gluon():  # which waits itself
            for buffers in in_flight(compiled.asm["ttgir"]):
                assert set(buffers) <= {compiled.metadata.num_stages}, (kernel, role, buffers)
        used = {}
        if self.target.backend == "cuda":
            used = resources(compiled)
            # What a launch by the driver itself takes a program to have.
            assert driver.packed_parameters(compiled) is not None, (kernel, given.signature)
        flags = "".join(k[0] for k in ("SEG", "SERIAL", "HAS_STATE", "CLIP") if constants.get(k))
        file = kernel.fn.__module__.rpartition(".")[2]
        if file in ("cluster", "grid"):
            only_lanes(compiled.asm["ttgir"])
        name = f"{file}.{kernel.fn.__name__} {role} {flags}"
        self.launches.append((name, step, compiled))
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


# Bytes of shared memory that a program may have.
MEMORY = {
    "80": 166_912, "86": 101_376, "89": 101_376, "90": 232_448, "100": 232_448, "120": 101_376,
    "gfx942": 65_536,
}  # fmt: skip


def plans_of_mlstm(device, K, V, dtype):
    """A training step, the way of few heads, a single step; on Hopper, what is for it alone."""
    chunk = tiles.chunk_steps(512, K, V, dtype)
    gates = "float32", "float32"
    for hopper in (True, False) if device.hopper else (False,):
        of = device._replace(processors=1, hopper=hopper)
        for segments in (True, False) if hopper else (False,):
            call = mlstm.Call(2, 512, 2, K, V, dtype, gates, segments, False, chunk, 1e-6)
            yield mlstm.forward(of, call, has_state=False, states=True, trains=True)
            yield mlstm.backward(of, call, has_state=False, states=False)
    of = device._replace(processors=10**9, hopper=False)
    call = call._replace(segments=True)
    yield mlstm.forward(of, call, has_state=True, states=True, trains=False)
    yield mlstm.single_step(call._replace(T=1))


def plans_of_slstm(device, D, dtype):
    """A training step from a fresh state, and one with everything that a call can have."""
    for everything, clip in ((False, 0.0), (True, 10.0)):
        call = slstm.Call(16, 64, 2, D, dtype, True, *[everything] * 4)
        yield slstm.forward(device, call, trains=True)
        yield slstm.backward(device, call, clip)


def plans_of_block(device, dtype):
    """Of the 7B model's block, for one step and for many."""
    for rows in (1, 64):
        shape = rows, 1, 4096
        yield block.rms_norm(device, shape, dtype, 1e-6)
        yield block.head_norm(device, shape, 8, dtype, "float32", True, 1e-6)
        yield block.gated_unit(device, (rows, 1, 21888), dtype, False)
        yield block.gate_pair(device, shape, 8, dtype, 15.0)
        if dtype != "float32":
            yield block.products(device, shape, (2048, 2048, 4096, 4096), dtype)
            yield block.added_product(device, shape, 10944, dtype)
    yield block.products(device, (1, 1, 4096), (2048, 2048, 4096, 4096), dtype, dtype, 1e-7)
    yield block.added_product(device, (1, 1, 4096), 10944, dtype, "float32", 1e-7)


def compile_all(arch, sizes, dtype):
    """A `Compiler` that has compiled the kernels of this call."""
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    of = Device(
        MEMORY[arch], 10**9, {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee"),
        device.triton_version(), hopper=arch == "90", cooperative=True,
        all_shared_memory=MEMORY[arch], clusters=0 if amd else 8 if arch == "90" else 1,
        pipelined=amd or int(arch) < 100,
    )  # fmt: skip
    compiler = Compiler(target, of.pipelined)
    plans = plans_of_mlstm if "/" in sizes else plans_of_slstm
    if sizes == "block":
        plans, sizes = plans_of_block, ()
    else:
        sizes = map(int, sizes.split("/"))
    for plan in plans(of, *sizes, dtype):
        for step in plan.steps:
            compiler.compile(step)
    return compiler


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        arch, *rest = asked.split(":")
        for name, used in compile_all(arch, *rest).seen.items():
            numbers = used.get("REG", "-"), used["SHARED"], MEMORY[arch], used.get("STACK", 0)
            print(asked, name, *numbers, flush=True)
