"""Whether PyTorch runs a function at the moment, or compiles, exports or transforms it."""

import warnings

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def exporting():
    # As a constant: PyTorch 2.11 takes torch.compile for an export where it traces this.
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def size(number):
    """A size as a number, where torch.jit.trace would have a tensor of it."""
    if not isinstance(number, torch.Tensor):
        return number
    with warnings.catch_warnings():  # what depends on it is in the file for this size alone
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(number)


def transforms():
    """Which of PyTorch's transforms ("Grad", "Vmap", "Jvp") are at work. They see through PyTorch's
    own operators; others may drop a tangent silently.

    Forward mode is one wherever a level of it is open: any argument may carry a tangent, the
    weights as well as the inputs.
    """
    if torch.compiler.is_compiling():
        return set()
    found = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
    return found | {"Jvp"} if forward_ad._current_level >= 0 else found
