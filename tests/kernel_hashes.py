"""Prints a hash of every kernel's PTX (or GCN assembly) and of every call as JAX lowers it.

    python tests/kernel_hashes.py > before.txt          # no GPU needed; --quick: sm_90 and sm_80
    python tests/kernel_hashes.py --compare before.txt after.txt

A change of names, files or lines of Python must not change a hash: names, line information and
comments are taken out first. A line is: case, hash, number of thread blocks, kernel. `--compare`
leaves out the kernels' names, so that they may change.

The Triton kernels are compiled from plans (compile_kernels.py) and from what jaxlib would launch of
them (lower_for_hopper.py), in the order of the launches. Compiled code is not taken
from Triton's cache.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time

# GPU, sizes (keys/values of an mLSTM head, or units of an sLSTM head), dtype.
TORCH = [
    "90:128/256:bfloat16", "90:256/512:bfloat16", "90:64/128:bfloat16", "90:128/128:bfloat16",
    "90:64/128:float16", "90:64/128:float32", "90:64:float32", "90:100:bfloat16",
    "90:200:bfloat16", "90:32:bfloat16", "90:192:float16", "90:256:bfloat16", "90:768:bfloat16",
    "80:24/40:float32", "80:128/256:bfloat16", "80:64:float32", "80:100:float16",
    "80:300:float32", "80:64:bfloat16", "80:192:bfloat16",
    "100:128/256:bfloat16", "100:64:float32", "100:128:float32", "100:200:bfloat16",
    "100:64:float16", "100:288:bfloat16",
    "gfx942:64/128:bfloat16", "gfx942:64:bfloat16", "gfx942:192:bfloat16",
]  # fmt: skip
# Every kernel on sm_90, and those of other GPUs on sm_80.
QUICK_TORCH = [
    "90:128/256:bfloat16", "90:64/128:bfloat16", "90:64/128:float32", "90:64:float32",
    "90:200:bfloat16", "90:192:float16", "90:768:bfloat16", "80:24/40:float32", "80:64:bfloat16",
]  # fmt: skip
# Implementation, sizes as in lower_for_hopper.py, dtype.
JAX = [
    "triton:64/128/132:bfloat16", "triton:128/256/132:bfloat16", "triton:128/256/2:bfloat16",
    "triton:64/128/2:float32", "triton:64/12:bfloat16", "triton:192/4:bfloat16",
    "triton:768/1:bfloat16", "triton:64/4:float32", "triton:200/2:bfloat16",
    "pallas:128/256/4:bfloat16", "pallas:64/128/2:float32", "pallas:64/3:float32",
    "pallas:192/3:bfloat16", "native:64/128/2:float32", "native:64/3:float32",
    "block:mLSTMBlock:bfloat16", "block:sLSTMBlock:bfloat16", "block:xLSTMLargeBlock:bfloat16",
]  # fmt: skip
QUICK_JAX = [
    "triton:64/128/132:bfloat16", "triton:64/12:bfloat16", "pallas:128/256/4:bfloat16",
    "pallas:64/3:float32", "native:64/128/2:float32", "native:64/3:float32",
    "block:xLSTMLargeBlock:bfloat16",
]  # fmt: skip


def digest(*parts):
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def stripped(code, name):
    """PTX or GCN assembly of the kernel `name` without names, lines and comments."""
    code = re.sub(rf"(?:\b|(?<=\.L)){re.escape(name)}(?=\b|_param_)", "kernel", code)
    code = re.split(r"\.section\s+\.debug", code)[0]
    comment = ";" if ".amdgcn_target" in code else "//"
    lines = (line.split(comment)[0].rstrip() for line in code.splitlines())
    return "\n".join(x for x in lines if x and not re.match(r"\s*\.(loc|file|ident)\b", x))


def lowered_names_stripped(text):
    """StableHLO with functions named by their order."""
    names = {}
    return re.sub(r"@[\w.$-]+", lambda m: names.setdefault(m[0], f"@f{len(names)}"), text)


def torch_hashes(cases):
    import compile_kernels

    for case in cases:
        arch, *rest = case.split(":")
        for name, step, compiled in compile_kernels.compile_all(arch, *rest).launches:
            code = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
            metadata = compiled.metadata
            code = stripped(code, metadata.name)
            what = digest(code, metadata.num_warps, metadata.shared, step.cluster)
            print(case, what, step.grid, name, sep="\t", flush=True)


def jax_hashes(cases):
    import lower_for_hopper as lower
    from jax._src.pallas.triton import lowering

    modules = []
    original = lowering.lower_jaxpr_to_triton_module

    def recorded(*arguments, **options):
        result = original(*arguments, **options)
        modules.append(result.module.operation.get_asm(enable_debug_info=False))
        return result

    lowering.lower_jaxpr_to_triton_module = recorded
    lower.pretend_hopper()
    for case in cases:
        implementation, sizes, dtype = case.split(":")
        modules.clear()
        if implementation == "block":
            text = lower.lower_block(sizes, dtype)
        else:
            sizes = map(int, sizes.split("/"))
            text = lower.lower_op(*sizes, dtype=dtype, implementation=implementation)
        for kernel in lower.JAXLIB.kernels:
            what = digest(stripped(kernel.ptx, kernel.name), kernel.warps, kernel.parameters)
            print(case, what, kernel.programs, kernel.name, sep="\t", flush=True)
        for module in modules:
            what = digest(lowered_names_stripped(module))
            print(case, what, "-", "pallas", sep="\t", flush=True)
        # What custom calls hold is in the hashes above, here only that and where they are called.
        text = re.sub(r'\b(ir|opaque|name|backend_config) = "[^"]*"', r"\1", text)
        print(case, digest(lowered_names_stripped(text)), "-", "call", sep="\t", flush=True)


def compare(*paths):
    """The first three columns of both files must be equal; prints what is not."""
    before, after = (
        [line.split("\t") for line in open(path).read().splitlines()] for path in paths
    )
    different = 0
    for case in dict.fromkeys(line[0] for line in (*before, *after)):
        a, b = ([line for line in lines if line[0] == case] for lines in (before, after))
        if [line[:3] for line in a] != [line[:3] for line in b]:
            different += 1
            print(f"{case}: {len(a)} launches before, {len(b)} after")
            for x, y in zip(a, b, strict=False):
                if x[:3] != y[:3]:
                    print("  -", *x[1:], "\n  +", *y[1:])
    print(f"{different} cases differ")
    return bool(different)


def main(arguments):
    if arguments[:1] == ["--compare"]:
        return compare(*arguments[1:])
    if arguments[:1] in (["torch"], ["jax"]):
        {"torch": torch_hashes, "jax": jax_hashes}[arguments[0]](arguments[1:])
        return 0
    quick = "--quick" in arguments
    for backend, cases in (
        ("torch", QUICK_TORCH if quick else TORCH), ("jax", QUICK_JAX if quick else JAX),
    ):  # fmt: skip
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            env = {
                **os.environ, "KERAS_BACKEND": backend, "TRITON_CACHE_DIR": cache,
                "TRITON_DISABLE_LINE_INFO": "1",
            }  # fmt: skip
            done = subprocess.run([sys.executable, __file__, backend, *cases], env=env)
        if done.returncode:
            return done.returncode
        print(f"{backend}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
