"""The mLSTM's launches on PyTorch tensors (see backends/kernels/mlstm/plan.py)."""

import functools

import torch
from keras_xlstm.backends.kernels.mlstm import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.device import name
from keras_xlstm.backends.torch.launch import Launch, Parts
from keras_xlstm.backends.torch.repeated import Repeated


class _Host:
    launch = Launch

    def __init__(self, q):
        self.device = plan.Device(
            device.shared_memory(q.device), device.processors(q.device),
            device.hopper(q.device), device.precision(q.dtype),
        )  # fmt: skip

    def parts(self, *parts):
        return Parts(
            *(
                (part[0], getattr(torch, part[1])) if isinstance(part[0], tuple) else part
                for part in parts
            )
        )

    def describe(self, *matrices):
        return _describe(*matrices)


def _call(given, q, v, segment_ids, sigmoid, chunk):
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in given)
    return plan.Call(
        *q.shape, v.shape[-1], name(q.dtype), segment_ids is not None, sigmoid, chunk, aligned
    )


def kept(q, v, chunk):
    return plan.kept(_Host(q), _call((), q, v, None, False, chunk))


def forward(given, sigmoid, chunk):
    q, _, v, _, _, C, _, _, segment_ids = given
    call = _call(given, q, v, segment_ids, sigmoid, chunk)
    return Repeated(plan.Forward(_Host(q), call, C is not None))


def backward(given, sigmoid, chunk):
    _, dC, _, q, _, v, _, _, segment_ids, _, _ = given
    call = _call(given, q, v, segment_ids, sigmoid, chunk)
    return Repeated(plan.Backward(_Host(q), call, dC is not None))


def _describe(*matrices):
    """A function of bfloat16 tensors (or their addresses, or None) that makes them descriptors;
    of each the shape as a matrix, and that of a tile. Memory is used again, and to make
    descriptors anew takes longer than a small kernel."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    known = []
    for whole, tile in matrices:
        layout = gl.NVMMASharedLayout.get_default_for(list(tile), gl.bfloat16)
        known.append((whole, (whole[1], 1), list(tile), layout))

    @functools.lru_cache(maxsize=1024)  # of all the blocks of a model
    def of(j, place):
        return TensorDescriptor(_Place(place), *known[j])

    def describe(tensors):
        places = (t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors)
        return [None if place is None else of(j, place) for j, place in enumerate(places)]

    return describe


class _Place:
    """The address of a bfloat16 tensor, as descriptors want it."""

    dtype = torch.bfloat16

    def __init__(self, place):
        self.place = place

    def data_ptr(self):
        return self.place
