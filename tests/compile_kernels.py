"""Compiles the Triton kernels that a call launches, for a GPU that need not be there.

python tests/compile_kernels.py 90 K V dtype   (run by test_triton.py, one process per target)
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from keras_xlstm.backends.torch import mlstm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
}  # fmt: skip


def signature(kernel, args, kwargs):
    """As Triton's launcher would infer it: signature, constants, divisible arguments."""
    names = list(inspect.signature(kernel.fn).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    kinds, constants, divisible = {}, {}, {}
    for j, name in enumerate(names):
        value, parameter = given[name], kernel.params[j]
        if parameter.is_constexpr or value is None or value is True or value is False:
            kinds[name], constants[(j,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kinds[name], divisible[(j,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            kinds[name] = "fp32"
        elif value == 1:
            kinds[name], constants[(j,)] = "constexpr", 1
        else:
            kinds[name] = "i32"
            if value % 16 == 0:
                divisible[(j,)] = [["tt.divisibility", 16]]
    return kinds, constants, divisible


class Compiler:
    """Stands in for `launch`: compiles, and keeps what the kernel needs."""

    def __init__(self, target):
        self.target, self.seen = target, {}

    def __call__(self, kernel, programs, *args, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        kinds, constants, divisible = signature(kernel, args, kwargs)
        role = kwargs.get("ROLE", "reverse" if kwargs.get("REVERSE") else "")
        source = ASTSource(kernel, kinds, constants, divisible)
        compiled = triton.compile(source, target=self.target, options=options)
        used = resources(compiled) if self.target.backend == "cuda" else {}
        name = f"{kernel.fn.__name__} {role}".strip()
        self.seen[name] = {"SHARED": compiled.metadata.shared, **used}


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
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def compile_all(target, K, V, dtype, T=512, segments=False, shared_memory=232_448, processors=1):
    """{kernel: resources} of a training step."""
    mlstm.launch = compiler = Compiler(target)
    mlstm._shared_memory = lambda device: shared_memory
    mlstm._processors = lambda device: processors
    q, k = (torch.empty(2, T, 2, K, dtype=dtype, requires_grad=True) for _ in "qk")
    v = torch.empty(2, T, 2, V, dtype=dtype, requires_grad=True)
    i, f = (torch.empty(2, T, 2, requires_grad=True) for _ in "if")
    ids = torch.zeros(2, T, dtype=torch.int32) if segments else None
    h, _ = mlstm.mlstm(
        q, k, v, i, f, None, ids, input_gate="exp", eps=1e-6, chunk_size=None
    )
    torch.autograd.grad(h.float().sum(), (q, k, v, i, f))
    return compiler.seen


if __name__ == "__main__":
    arch, K, V, dtype = sys.argv[1:5]
    memory = {"80": 166_912, "86": 101_376, "89": 101_376, "90": 232_448}.get(arch, 232_448)
    seen = compile_all(
        GPUTarget("cuda", int(arch), 32), int(K), int(V), getattr(torch, dtype),
        shared_memory=memory,
    )  # fmt: skip
    for name, used in seen.items():
        print(f"sm_{arch} {K}/{V} {dtype} {name:20s}", used, "" if used["SHARED"] <= memory else "TOO MUCH SHARED")
