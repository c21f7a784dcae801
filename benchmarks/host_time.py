"""What PyTorch's host takes for a call of the Triton kernels, one by one: with launches that do
nothing, on CPU tensors, so without a GPU.

    python benchmarks/host_time.py

"anew": all that the CUDA driver is given is worked out at every call; "repeated": a call like one
before has new addresses alone (backends/torch/repeated.py), as our kernels do it; "the same
memory": no new addresses either, as where PyTorch's allocator gives the same again, which a GPU's
does and a CPU's does not. "autograd": a function of five inputs that does nothing. Medians of
rounds, in turn; allocations are a CPU's.
"""

import ctypes
import os
import statistics
import time
import types

os.environ["KERAS_BACKEND"] = "torch"

import torch
from keras_xlstm.backends.torch import device, driver, launch, mlstm, repeated, slstm

from keras_xlstm.ops import mlstm as mlstm_op
from keras_xlstm.ops import slstm as slstm_op


class Nothing:
    """In place of CUDA's driver."""

    cuLaunchKernelEx = ctypes.CDLL(None).getpid
    cuLaunchKernelEx.argtypes, cuLaunchKernelEx.restype = [ctypes.c_void_p] * 4, None

    @staticmethod
    def cuTensorMapEncodeTiled(*arguments):
        return 0


def compiled(arguments, function=1):
    """A kernel that takes such arguments, as what Triton compiles is launched."""
    parameters, tiles = [], []
    for place, a in enumerate(arguments):
        if hasattr(a, "block_shape"):
            parameters.append((place, "152s"))
            tiles.append({"block_size": a.block_shape, "swizzle": 3})
        elif a is not None:
            kind = "Q" if isinstance(a, torch.Tensor) else "f" if isinstance(a, float) else "i"
            parameters.append((place, kind))
    metadata = types.SimpleNamespace(num_warps=4, shared=0, tensordesc_meta=tiles)
    kernel = types.SimpleNamespace(function=function, metadata=metadata)
    return driver.Launch(kernel, 7, parameters, 1)


def without_a_gpu():
    """The kernels for an H200, which compile and launch nothing."""

    def first(self, stream, arguments):
        self.known = compiled(arguments)
        self.known(stream, arguments)

    launch.Launch._first = first
    driver._driver = lambda: Nothing
    device.missing = lambda device=None, index=None: None
    device.interpreted = lambda: False
    device.hopper = lambda device: True
    device.clusters = lambda device: 8
    device.processors = lambda device: 1
    device.shared_memory = device.all_shared_memory = lambda device: 232_448
    for module in (mlstm, slstm):
        module.on_stream = lambda device, function, *arguments: function(1, *arguments)


def calls():
    """{name: function}"""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    q, k, v = random(1, 2048, 1, 64), random(1, 2048, 1, 64), random(1, 2048, 1, 128)
    gates = random(1, 2048, 1), random(1, 2048, 1)
    x, R, bias = random(1, 16, 4, 1, 64), random(1, 64, 4, 64), random(4, 1, 64)

    class Autograd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return inputs[2].detach()

        @staticmethod
        def backward(ctx, gradient):
            return ctx.saved_tensors

    found = {}
    for name, op, inputs, options in (
        ("mLSTM 64/128, T 2048", mlstm_op, (q, k, v, *gates), {"implementation": "triton"}),
        ("sLSTM 64, T 16", slstm_op, (x, R, bias), {"implementation": "triton"}),
        ("autograd", Autograd.apply, (q, k, v, *gates), {}),
    ):

        def forward(op=op, inputs=inputs, options=options):
            with torch.no_grad():
                return op(*inputs, **options)

        gradient = torch.randn_like(forward())

        def both(op=op, inputs=inputs, options=options, gradient=gradient):
            torch.autograd.grad(op(*inputs, **options), inputs, gradient)

        found |= {f"{name}: fw": forward, f"{name}: fw+bw": both}
    return found


def microseconds(function, count=300):
    for _ in range(20):
        function()
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count * 1e6


def not_recorded(self, *arguments):
    raise launch.NotRecorded


def written_once(self, addresses):
    if not self.written:
        return WRITE(self, addresses)
    return next(iter(self.written.values()))


RECORDED, WRITE = repeated.Repeated._recorded, repeated._Sequence._write
WAYS = {
    "anew": (not_recorded, WRITE), "repeated": (RECORDED, WRITE),
    "the same memory": (RECORDED, written_once),
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    without_a_gpu()
    functions = calls()
    times = {(name, way): [] for name in functions for way in WAYS}
    for _ in range(15):
        for way, ways in WAYS.items():
            repeated.Repeated._recorded, repeated._Sequence._write = ways
            launch._KNOWN.clear()
            for name, function in functions.items():
                times[name, way].append(microseconds(function))
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, us a call\n")
    print(f"| | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for name in functions:
        anew, *others = (statistics.median(times[name, way]) for way in WAYS)
        cells = "".join(f" {us:.0f} ({anew / us:.2f}x) |" for us in others)
        print(f"| {name} | {anew:.0f} |{cells}")
