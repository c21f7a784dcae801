"""A training step as one CUDA graph, on a CUDA device: for `compile` of our models and for
`callbacks.CapturedTraining`.

A step of a model of many blocks is thousands of small kernels, which Python launches more slowly
than the device runs them. Recorded once, they are launched as one.
"""

import collections
import contextlib
import logging
import os
import shutil
import types

import keras
import numpy as np
import torch
from keras_xlstm.backends.torch.compile_blocks import or_plain
from keras_xlstm.backends.torch.cuda_graph import CapturedGraph, NumbersAsKernels, can_capture
from keras_xlstm.backends.torch.products import token_losses
from torch.overrides import TorchFunctionMode

_BEFORE = 2  # steps of some shapes that run as they are: kernels are compiled and tuned by them
_KEPT = 2  # recordings of one model: each holds the memory of a step
_log = logging.getLogger("keras_xlstm")


def default_compilation(model, given):
    """What `compile(jit_compile="auto")` does, of a model and the arguments `given` to `compile`:
    whether the step is captured, and whether blocks are compiled."""
    on_gpu = any(can_capture(variable._value) for variable in model.variables)
    if not on_gpu or model.run_eagerly or torch.distributed.is_initialized():
        return False, False
    for part in _parts(model, given):
        if not _is_known(part):
            _log.info(
                "Training runs one kernel at a time: a CUDA graph repeats what Python did once, "
                f"and {part!r} is code of your own. jit_compile=True makes one all the same."
            )
            return False, False
    compiles = _has_compiler()
    _log.info(
        "Training is recorded as a CUDA graph; blocks are %scompiled. jit_compile=False does "
        "neither.",
        "" if compiles else "not ",
    )
    return True, compiles


def _parts(model, given):
    """All that a training step calls."""
    names = "optimizer", "loss", "metrics", "weighted_metrics"
    return [*model._flatten_layers(), *keras.tree.flatten([given.get(name) for name in names])]


def _is_known(part):
    """Whether this is a name, or Keras's or ours and holds no function of a user's."""
    if part is None or isinstance(part, str):
        return True
    held = getattr(part, "__dict__", {}).values()  # of PyTorch's own functions there is none
    functions = [x for x in held if isinstance(x, types.FunctionType)]
    own = part if isinstance(part, types.FunctionType | type) else type(part)
    modules = {x.__module__.partition(".")[0] for x in (own, *functions)}
    return modules <= {"keras", "keras_xlstm"}


def _has_compiler():
    """Whether torch.compile finds what it needs."""
    names = os.environ.get("CXX"), "c++", "g++", "clang++"
    return any(name and shutil.which(name) for name in names)


class CapturedTrainStep:
    """`self(step, data) -> logs`, with `step(data)` a whole training step of a model.

    The first two steps of a batch's shapes run kernel by kernel. The third is recorded. From then
    on the recording runs, as long as all variables keep their place in memory. A step that cannot
    be recorded runs kernel by kernel, and the log says why. Those are dropout with a seed, whose
    masks Keras draws from numbers that the host must know, and optimizers that decide on the host.
    (Without a seed PyTorch draws new masks in every replay.)
    """

    def __init__(self, model, compiles=False, required=True):
        self._model, self._refused = model, False
        self._compiles, self._required = compiles, required
        self._variables = self._feeding = None
        self._forget(None)

    @property
    def token_losses(self):
        return self.compiled(token_losses)

    def compiled(self, function):
        """`function` of tensors and numbers, compiled where its tensors hold something, if parts of
        the step are to be compiled."""
        if not self._compiles:
            return function
        fast = or_plain(torch.compile(function), function, self._required)

        def run(x, *arguments):
            return (function if x.device.type == "meta" else fast)(x, *arguments)

        return run

    def look_again(self):
        """Once there is a recording, which variables there are is not asked again until this: for a
        large model that takes several milliseconds, while the device waits."""
        self._variables = None

    @contextlib.contextmanager
    def feeding(self):
        """Inside, arrays become tensors on the device without waiting for it: Keras makes the next
        batch while a step runs, and would wait for its end."""
        if self._feeding is not None:
            yield
            return
        self._feeding = _Feeding()
        try:
            with self._feeding:
                yield
        finally:
            self._feeding = None

    @contextlib.contextmanager
    def not_feeding(self):
        """Ends `feeding` inside: torch.compile would compile again under another mode."""
        if self._feeding is None:
            yield
            return
        self._feeding.__exit__(None, None, None)
        try:
            yield
        finally:
            self._feeding.__enter__()

    def _forget(self, place):
        self._place, self._seen, self._graphs = place, collections.Counter(), {}

    def _refuse(self, reason):
        self._refused = True
        _log.info("Training runs one kernel at a time: no CUDA graph could be made. %s", reason)

    def __call__(self, step, data):
        if self._variables is None or not self._graphs:  # the first step makes some
            self._variables = [*self._model.variables, *self._model.optimizer.variables]
        weight = self._variables[0]._value
        if not can_capture(weight):
            return step(data)
        data = keras.tree.map_structure(lambda x: _sent(x, weight.device), data)
        graph = None if self._refused else self._graph_for(step, data)
        if graph is not None:
            return graph.replay(keras.tree.flatten(data))
        draws = self._draws()
        with NumbersAsKernels():
            logs = step(data)
        if self._draws() != draws and not self._refused:
            self._refuse("The model draws from a seed, as dropout with one does.")
        return logs

    def _draws(self):
        """What changes with every draw of a layer's."""
        seeds = (v for v in self._variables if v.path.endswith("seed_generator_state"))
        return [seed._value._version for seed in seeds]

    def _graph_for(self, step, data):
        """The one for this batch, made if need be; None where there is none yet, or cannot be."""
        place = self._where()
        if place != self._place:
            self._forget(place)
        key = tuple((tuple(x.shape), x.dtype) for x in keras.tree.flatten(data) if x is not None)
        if key in self._graphs:
            return self._graphs[key]
        self._seen[key] += 1
        if self._seen[key] <= _BEFORE or len(self._graphs) == _KEPT:
            return None
        optimizer = self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return self._refuse("The optimizer decides on the host whether its loss scale fits.")
        if optimizer.gradient_accumulation_steps:
            return self._refuse("The optimizer decides on the host whether a step is an update.")
        try:
            self._model.zero_grad()  # the last step's are not kept beside this one's
            self._graphs[key] = CapturedGraph(step, data)
        except RuntimeError as error:
            self._refuse(error)
        return self._graphs.get(key)

    def _where(self):
        """What a recording depends on besides shapes: numbers of the optimizer's are in it, too."""
        stream = torch.cuda.current_stream().cuda_stream
        places = [v._value.data_ptr() for v in self._variables]
        numbers = [x for x in vars(self._model.optimizer).items() if type(x[1]) in (int, float)]
        return stream, places, [v.trainable for v in self._variables], numbers


class _Feeding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.as_tensor and len(args) == 1 and isinstance(args[0], np.ndarray):
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type == "cuda":
                return _sent(torch.as_tensor(args[0], dtype=kwargs.get("dtype")), device)
        return func(*args, **kwargs)


def _sent(x, device):
    """x on its way to the device; the host goes on."""
    if x is None:
        return None
    x = torch.as_tensor(x)
    return x.pin_memory().to(device, non_blocking=True) if x.device.type == "cpu" else x


def fuse_optimizer(optimizer, captured):
    """Makes Keras's Adam and AdamW update every weight in one pass, where Keras takes eleven."""
    if not captured:
        return
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    kinds = [type(kind()) for kind in (keras.optimizers.Adam, keras.optimizers.AdamW)]
    if type(optimizer) in kinds and not optimizer.amsgrad:
        optimizer._parallel_update_step = _FusedAdam(optimizer)


class _FusedAdam:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __call__(self, gradients, variables, learning_rate):
        optimizer = self.optimizer
        step = keras.ops.cast(optimizer.iterations + 1, "float32")
        # Keras corrects the moments' bias in the rate, PyTorch's operator in both moments, which
        # gives epsilon another weight. After endless steps it has no bias to correct.
        corrected = torch.sqrt(1 - optimizer.beta_2**step) / (1 - optimizer.beta_1**step)
        rate = (learning_rate * corrected).float()
        endless = torch.full_like(step, 1e9)
        groups = {}
        for gradient, variable in zip(gradients, variables, strict=True):
            value, index = variable.value, optimizer._get_variable_index(variable)
            moments = optimizer._momentums[index].value, optimizer._velocities[index].value
            groups.setdefault((value.device, value.dtype), []).append((value, gradient, *moments))
        for group in groups.values():
            values, gradients, momentums, velocities = map(list, zip(*group, strict=True))
            torch._fused_adam_(
                values, gradients, momentums, velocities, [], [endless] * len(values), lr=rate,
                beta1=optimizer.beta_1, beta2=optimizer.beta_2, weight_decay=0.0,
                eps=optimizer.epsilon, amsgrad=False, maximize=False,
            )  # fmt: skip
