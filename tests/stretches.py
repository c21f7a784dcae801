"""Time shared out among devices, for tests: among JAX's, or threads in place of PyTorch's processes."""

import concurrent.futures
import contextvars
import threading

import keras
import numpy as np
from tools import BACKEND


class Threads:
    """In place of a process group: what all of the threads give is gathered within one graph."""

    def __init__(self, count):
        self.count, self.given = count, [None] * count
        self.barrier, self.own = threading.Barrier(count), threading.local()

    def size(self):
        return self.count

    def rank(self):
        return self.own.rank

    @staticmethod
    def apply(x, self):
        self.given[self.rank()] = x
        self.barrier.wait(60)
        found = keras.ops.stack(self.given)
        self.barrier.wait(60)
        return found


def shared_out(function, count, monkeypatch):
    """`function(*steps, **whole) -> (outputs, *others)`, with time shared out among `count` devices.

    `steps` and outputs are (B, T, ...) or None; others, and `whole`, are the same everywhere.
    """
    if BACKEND == "jax":
        return lambda *steps, **whole: _over_jax_devices(function, count, steps, whole)
    import torch
    from keras_xlstm.backends.torch import context

    threads = Threads(count)
    monkeypatch.setattr(context, "_Gather", Threads)

    def thread(rank, steps, whole):
        threads.own.rank, result = rank, None
        context._group.set(threads)
        try:
            result = function(*steps, **whole)
        finally:
            if result is None:  # the others wait for it
                threads.barrier.abort()
        return result

    def run(*steps, **whole):
        steps = [[None] * count if x is None else torch.chunk(x, count, dim=1) for x in steps]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            futures = [
                pool.submit(contextvars.copy_context().run, thread, rank, own, whole)
                for rank, own in enumerate(zip(*steps, strict=True))
            ]
        errors = filter(None, (future.exception() for future in futures))
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        results = [future.result() for future in futures]
        for others in zip(*(r[1:] for r in results), strict=True):
            for other in others:
                np.testing.assert_array_equal(other.detach(), others[0].detach())
        return torch.cat([r[0] for r in results], dim=1), *results[-1][1:]

    return run


def _over_jax_devices(function, count, steps, whole):
    with context_parallel(count).scope():
        return function(*steps, **whole)


def context_parallel(count):
    from keras_xlstm.distribution import ContextParallel

    names = keras.distribution.list_devices()[:count]
    mesh = keras.distribution.DeviceMesh((1, count), ("batch", "time"), names)
    return ContextParallel(mesh)
