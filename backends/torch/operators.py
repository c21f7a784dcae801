"""Functions as PyTorch operators, and launches of Triton kernels."""

import itertools
import math
import warnings

import torch
from keras_xlstm.backends.torch import driver
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)
_KNOWN_TYPES = {*PLAIN, type(None), bool, int, float}
_LIBRARY = torch.library.Library("keras_xlstm", "FRAGMENT")


def operator(name):
    """Decorates a function of tensors that returns new tensors: torch.compile takes it whole.

    As torch.library.custom_op, without its check at every call that no result aliases another:
    that took 0.3 ms to 0.7 ms a call for the mLSTM's dozen results, more than the kernels.
    """

    def decorate(function):
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        return _Operator(name, function)

    return decorate


def plain(*tensors):
    """Whether these are tensors with values, which nothing traces or transforms."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack()
        or any(type(t) not in PLAIN for t in tensors)
    )


class _Operator:
    """Called with plain tensors and outside a compiler, the function itself: the way through
    PyTorch's dispatcher and its Python autograd takes longer than a small sequence's kernels."""

    def __init__(self, name, function):
        self.name, self.function = f"keras_xlstm::{name}", function
        self.call = getattr(torch.ops.keras_xlstm, name).default
        self.differentiable = self.transformable = None

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or not _KNOWN_TYPES.issuperset(map(type, arguments)):
            return self.call(*arguments)  # some tensor stands for one while something is traced
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(*arguments)
        if torch._C._functorch.peek_interpreter_stack():
            return self.transformable.apply(*arguments)
        are_tensors = [type(a) in PLAIN for a in arguments]
        tensors = list(itertools.compress(arguments, are_tensors))
        if not any(t.requires_grad for t in tensors):
            return self.function(*arguments)
        return self.differentiable.apply(arguments, are_tensors, *tensors)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward, setup_context, hidden=0):
        """As PyTorch's, but for `backward`, which is given the context and all gradients. `hidden`:
        so many outputs, the last, are for `setup_context` alone, where the function is called
        itself; their gradients are left out."""
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )
        function = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, arguments, are_tensors, *tensors):
                # PyTorch does something for each input and output: only the tensors among them.
                output = tuple(function(*arguments))
                setup_context(ctx, arguments, output)
                ctx.are_tensors = are_tensors
                return output[: len(output) - hidden]

            @staticmethod
            def backward(ctx, *gradients):
                found = itertools.compress(backward(ctx, gradients), ctx.are_tensors)
                return None, None, *found

        def transformable(*inputs):
            return tuple(function(*inputs))

        # For torch.func, in which PyTorch looks at every argument of every call.
        members = {
            "forward": staticmethod(transformable),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(lambda ctx, *gradients: backward(ctx, gradients)),
        }  # fmt: skip
        self.transformable = type("Transformable", (torch.autograd.Function,), members)
        self.differentiable = Differentiable


def no_second_derivative(operator, name):
    """Without it a gradient of a gradient would be silently wrong."""

    def backward(ctx, gradients):
        raise RuntimeError(
            f"The {name} has first derivatives only, here as in its native form: its gradient is "
            "a kernel of its own. Received: a gradient of a gradient."
        )

    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


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
    own operators; others may drop a tangent without a word.

    Forward mode is one wherever a level of it is open: any argument may carry a tangent, the
    weights as well as the inputs.
    """
    if torch.compiler.is_compiling():
        return set()
    found = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
    return found | {"Jvp"} if forward_ad._current_level >= 0 else found


class Recording:
    """In place of a stream (repeated.py)."""

    def __init__(self):
        self.buffers, self.launches = [], []

    def add(self, launch, arguments):
        if not isinstance(launch, driver.Launch):
            raise NotRecorded
        self.launches.append((launch, arguments))


class NotRecorded(Exception):
    """A kernel is not compiled yet, or is not launched by the driver itself."""


class Launch:
    """A kernel with its programs and constants, called with a stream and its other arguments.

    The first call finds the compiled kernel, for which Triton looks at every argument: for some
    thirty that takes longer than a small kernel runs. Further calls must be alike in dtypes and in
    alignment to 16 bytes, and may give addresses in place of tensors. Triton's whole numbers are
    not specialised (see the kernels).
    """

    def __init__(self, kernel, programs, cluster=1, **constants):
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.cluster = cluster  # programs that hear each other
        self.known = None

    def __call__(self, stream, *arguments):
        if isinstance(stream, Recording):
            stream.add(self.known, arguments)
        elif self.known:
            self.known(stream, arguments)
        else:
            self._first(stream, arguments)

    def _first(self, stream, arguments):
        if self.cluster > 1:  # of which Triton's launcher knows nothing
            compiled = self.kernel.warmup(*arguments, grid=(1,), **self.constants)
            compiled[1, 1, 1]  # loads it
            self.known = driver.launcher(compiled, self.programs, self.cluster)
            if self.known is None:
                raise RuntimeError(
                    "This version of Triton compiles what is not known how to launch in clusters. "
                    'Use implementation="native", and please report it.'
                )
            self.known(stream, arguments)
            return
        compiled = self.kernel[self.programs,](*arguments, **self.constants)
        if hasattr(compiled, "result"):  # it may be compiled in the background
            compiled = compiled.result()
        if compiled is not None:  # it is not interpreted
            self.known = driver.launcher(compiled, self.programs) or self._by_triton(
                compiled[self.programs, 1, 1], len(arguments)
            )

    def _by_triton(self, run, count):
        values = [self.constants[p.name] for p in self.kernel.params[count:]]
        return lambda stream, arguments: run(*arguments, *values, stream=stream)


class Parts:
    """Tensors side by side in one allocation: each shape, or a pair of shape and dtype."""

    def __init__(self, *parts):
        self.parts, self.offsets, self.size = [], [], 0
        for part in parts:
            shape, dtype = part if isinstance(part[0], tuple) else (part, torch.float32)
            self.parts.append((shape, dtype, math.prod(shape) * dtype.itemsize))
            self.offsets.append(self.size)
            self.size += -(-self.parts[-1][-1] // 128) * 128  # aligned, as allocations are

    def new(self, like):
        return like.new_empty(self.size, dtype=torch.uint8)

    def of(self, buffer, known):
        """The tensors; their addresses, where kernels are `known`."""
        if known:
            start = buffer.data_ptr()
            return [start + offset for offset in self.offsets]
        return [
            buffer[offset : offset + size].view(dtype).view(shape)
            for offset, (shape, dtype, size) in zip(self.offsets, self.parts, strict=True)
        ]


_KNOWN = {}


def known(kind, tensors, *options):
    """`kind(tensors, *options)`, once for all tensors alike."""
    alike = [None if t is None else (t.shape, t.dtype, t.data_ptr() % 16) for t in tensors]
    key = kind, options, tensors[0].device, *alike
    return _once(key, kind, tensors, *options)


def launch(kernel, programs, *arguments, **constants):
    """kernel[(programs,)](*arguments, **constants), on the device of the first argument."""
    key = kernel.fn, programs, *constants.items(), *map(_alike, arguments)
    found = _once(key, Launch, kernel, programs, **constants)
    on_stream(arguments[0].device, found, *arguments)


def _once(key, kind, *arguments, **options):
    found = _KNOWN.get(key)
    if found is None:
        if len(_KNOWN) >= 1000:  # as many lengths as there are may come
            _KNOWN.clear()
        found = _KNOWN[key] = kind(*arguments, **options)
    return found


def _alike(argument):
    """What kernels are compiled for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.device, argument.data_ptr() % 16
    return None if argument is None else type(argument)


def on_stream(device, function, *arguments):
    """`function(stream, *arguments)` on that device and its current stream; None on a CPU."""
    if device.type != "cuda":
        return function(None, *arguments)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return on_stream(device, function, *arguments)
    return function(_stream(device.index), *arguments)


# PyTorch's own compiler calls it; the public way makes an object first.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
