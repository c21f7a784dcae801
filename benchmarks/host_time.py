"""What PyTorch's host takes for a call of the Triton kernels, one by one: with launches that do
nothing, on CPU tensors, so without a GPU.

    python benchmarks/host_time.py [--record]

"new memory": every call has addresses that no call had before, which a CPU's allocator gives and
which are written again (backends/torch/launch.py); "the same memory": as where PyTorch's allocator
gives the same again, as a GPU's does. "autograd": a function of five inputs that does nothing.
Layers are built with `use_kernel=True`, and called outside any compiler. Medians of rounds, in
turn; allocations are a CPU's.
"""

import argparse
import ctypes
import os
import statistics
import time
import types

os.environ["KERAS_BACKEND"] = "torch"

import record
import torch
from keras_xlstm.backends.kernels.plan import Matrix, buffer_of
from keras_xlstm.backends.torch import device, driver, launch

import keras_xlstm


class Nothing:
    """In place of CUDA's driver."""

    cuLaunchKernelEx = ctypes.CDLL(None).getpid
    cuLaunchKernelEx.argtypes, cuLaunchKernelEx.restype = [ctypes.c_void_p] * 4, None

    @staticmethod
    def cuTensorMapEncodeTiled(*arguments):
        return 0


def compiled(step, stand_in=None, function=1):
    """A step's kernel, as what Triton compiles is launched."""
    parameters, tiles = [], []
    for name, value in step.arguments.items():
        if isinstance(value, Matrix):
            parameters.append((name, "152s"))
            tiles.append({"block_size": value.tile, "swizzle": 3})
        elif buffer_of(value):
            parameters.append((name, "Q"))
        elif value is not None:
            parameters.append((name, "f" if isinstance(value, float) else "i"))
    metadata = types.SimpleNamespace(num_warps=4, shared=0, tensordesc_meta=tiles)
    kernel = types.SimpleNamespace(function=function, metadata=metadata)
    return driver.Kernel(kernel, step.grid, step.cluster, parameters)


def without_a_gpu():
    """The kernels for an H200, which compile and launch nothing."""
    launch.compiled = compiled
    launch.current_stream = lambda index: 1
    driver._driver = lambda: Nothing
    device.missing = lambda device=None, index=None: None
    device.interpreted = lambda: False
    device.hopper = lambda device: True
    device.clusters = lambda device: 8
    device.processors = lambda device: 1
    device.shared_memory = device.all_shared_memory = lambda device: 232_448


def calls():
    """{name: (function, inputs)}"""
    ops, layers = keras_xlstm.ops, keras_xlstm.layers

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

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

    def with_state(*inputs):
        return ops.mlstm(*inputs, return_state=True, implementation="triton")[0]

    def slstm(*inputs):
        return ops.slstm(*inputs, implementation="triton")

    found = {
        "mlstm 64/128, T 2048": (
            lambda *inputs: ops.mlstm(*inputs, implementation="triton"), (q, k, v, *gates)
        ),
        "mlstm, with its state": (with_state, (q, k, v, *gates)),
        "slstm 64, T 16": (slstm, (x, R, bias)),
        "autograd": (Autograd.apply, (q, k, v, *gates)),
    }  # fmt: skip
    options = {"dtype": "bfloat16", "use_kernel": True}
    for name, layer, width in (
        ("mLSTM", layers.mLSTM(128, num_heads=1, key_dim=64, **options), 8),
        ("sLSTM", layers.sLSTM(64, num_heads=1, **options), 8),
        ("mLSTMBlock", layers.mLSTMBlock(num_heads=1, **options), 64),
        ("xLSTMLargeBlock", layers.xLSTMLargeBlock(num_heads=1, **options), 128),
    ):
        inputs = random(1, 16 if name == "sLSTM" else 128, width)
        layer(inputs)
        weights = [v.value for v in layer.trainable_variables]
        found[name] = (lambda x, *weights, layer=layer: layer(x), (inputs, *weights))
    return found


def passes():
    """{name: function}: forward alone, and both passes."""
    found = {}
    for name, (op, inputs) in calls().items():

        def forward(op=op, inputs=inputs):
            with torch.no_grad():
                return op(*inputs)

        gradient = torch.randn_like(forward())

        def both(op=op, inputs=inputs, gradient=gradient):
            torch.autograd.grad(op(*inputs), inputs, gradient)

        found |= {f"{name}: fw": forward, f"{name}: fw+bw": both}
    return found


def microseconds(function, count=100):
    for _ in range(10):
        function()
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count * 1e6


class NewMemory(dict):
    """No addresses are known, and there is no room for more."""

    def get(self, addresses):
        return None

    def __len__(self):
        return 10**9 * any(True for _ in self)


class SameMemory(dict):
    """All addresses are."""

    def get(self, addresses):
        return next(iter(self.values()), None)


def remember_by(kind):
    launch.BOUND.clear()
    original = launch.Bound.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self.memories = kind()

    return original, init


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.option(parser)
    parser.parse_args()
    torch.set_num_threads(1)
    without_a_gpu()
    functions = passes()
    ways = {"new memory": NewMemory, "the same memory": SameMemory}
    times = {(name, way): [] for name in functions for way in ways}
    for _ in range(15):
        for way, kind in ways.items():
            original, launch.Bound.__init__ = remember_by(kind)
            for name, function in functions.items():
                times[name, way].append(microseconds(function))
            launch.Bound.__init__ = original
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, us a call\n")
    print(f"| | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for name in functions:
        us = {way: statistics.median(times[name, way]) for way in ways}
        print(f"| {name} |" + "".join(f" {median:.0f} |" for median in us.values()))
        record.add(__file__, name, "host time of a call", "us", us)
