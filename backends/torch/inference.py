"""What blocks compute around the memory (backends/inference.py), where gradients are off."""

import torch
from keras_xlstm.backends.inference import Inference
from keras_xlstm.backends.kernels.block import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch.launch import bound
from keras_xlstm.backends.torch.tracing import PLAIN


def _fits(*tensors):
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(type(x) not in PLAIN or not x.is_contiguous() for x in tensors):
        return False
    return device.unsupported(tensors[0]) is None


def _planned(where, name, dtype, call, aligned):
    return getattr(plan, name)(device.of(where, dtype), *call)


def _run(name, dtype, call, tensors):
    return bound(_planned, tensors[0].device, name, dtype, call)(*tensors)[0]


inference = Inference(_fits, _run, device.name, device.interpreted)
