"""What generation repeats, as CUDA graphs: the step, and the reading of short prompts."""

import collections
import logging
import threading
import weakref

import keras
import torch
from keras_xlstm.backends.torch.cuda_graph import (
    CapturedGraph,
    NumbersAsKernels,
    can_capture,
    overwrites,
)

_SHORT = 4096  # tokens up to which Python takes longer to launch kernels than they run
_log = logging.getLogger("keras_xlstm")


class CapturedDecodeStep:
    """`function(state, *tensors) -> (tokens, state)`, without gradients.

    On a CUDA device the first call with some shapes runs as it is, the second is recorded, and from
    then on the recording runs. A state given once is used up. Where a step cannot be recorded it
    runs as it is, after a line in the log; if `required`, that is an error.
    """

    kept = 4  # recordings: each has its own state and scratch memory

    def __init__(self, function, weights, required):
        self._function, self._weights, self._required = function, weights, required
        self._steps = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, state, *tensors):
        if not can_capture(tensors[0]):
            return self._function(state, *tensors)
        with self._lock:
            step = self._step_for(state, tensors)
            if step is None:
                with NumbersAsKernels():
                    return self._function(state, *tensors)
            return step.replay(state, tensors)

    def _step_for(self, state, tensors):
        """The one for this state, made if need be; None where there is none yet, or cannot be."""
        if isinstance(state, _Held):
            return state.step
        key = self._key(state, tensors)
        if key not in self._steps:
            self._steps[key] = None  # the kernels are compiled and tuned by a run
            while len(self._steps) > self.kept:
                self._steps.popitem(last=False)
            return None
        if self._steps[key] is None:
            self._steps[key] = self._captured(state, tensors)
        return self._steps[key] or None

    def _key(self, state, tensors):
        """What a recording depends on: shapes, the stream, and where the weights lie."""
        given = [*keras.tree.flatten(state), *tensors]
        places = [value.data_ptr() for value in self._weights.values]
        kinds = [(tuple(x.shape), x.dtype, x.device) for x in given]
        return torch.cuda.current_stream().cuda_stream, *places, *kinds

    def _captured(self, state, tensors):
        try:
            return self._recorded(state, tensors)
        except RuntimeError as error:
            if self._required:
                raise RuntimeError(
                    "This step cannot be recorded as a CUDA graph, which jit_compile=True asks "
                    f'for. Received: {error}. Use jit_compile="auto" or False.'
                ) from error
            _log.info("Steps run one kernel at a time: no CUDA graph could be made. %s", error)
            return False

    def _recorded(self, state, tensors):
        return _CapturedStep(self._function, state, tensors, self._lock)


class CapturedRead(CapturedDecodeStep):
    """`function(state, tokens, *tensors)` of whole prompts, if they are short. A state may be given
    again."""

    kept = 16

    def __init__(self, function, weights, required):
        super().__init__(function, weights, required)
        self._pools = {}  # of each stream, where one recording runs after another

    def __call__(self, state, tokens, *tensors):
        if tokens.numel() > _SHORT:
            return self._function(state, tokens, *tensors)
        return super().__call__(state, tokens, *tensors)

    def _recorded(self, state, tensors):
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        pool = self._pools[stream]
        return _CapturedRead(CapturedGraph(self._function, state, *tensors, pool=pool))


class _CapturedRead:
    def __init__(self, graph):
        self._graph = graph

    def replay(self, state, tensors):
        return self._graph.replay([*keras.tree.flatten(state), *tensors])


class _CapturedStep:
    """A graph of the step, in which new state goes where the old was."""

    def __init__(self, function, state, tensors, lock):
        def advance(state, *tensors):
            token = overwrites.set(True)
            try:
                output, new = function(state, *tensors)
            finally:
                overwrites.reset(token)
            buffers = keras.tree.flatten(state)
            ours = {x.untyped_storage().data_ptr() for x in buffers}
            # A new state may be a part of an old one, which must be read before it is overwritten.
            pairs = zip(buffers, keras.tree.flatten(new), strict=True)
            pairs = [(buffer, value) for buffer, value in pairs if value is not buffer]
            pairs = [
                (buffer, x.clone() if x.untyped_storage().data_ptr() in ours else x)
                for buffer, x in pairs
            ]
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
            return output

        self._graph = CapturedGraph(advance, state, *tensors)
        self._state = self._graph.buffers[: len(keras.tree.flatten(state))]
        self._structure, self._lock = keras.tree.map_structure(lambda x: ..., state), lock
        self._holder = lambda: None

    @torch.no_grad()
    def replay(self, state, tensors):
        holder, given = self._holder(), [None] * len(self._state)
        if holder is None or holder is not state:
            if holder is not None:  # another text, which may go on later
                holder.tensors = [x.clone() for x in self._state]
            given = state.tensors if isinstance(state, _Held) else keras.tree.flatten(state)
            if not isinstance(state, _Held):
                state = _Held(self)
            state.tensors = None
            self._holder = weakref.ref(state)
        return self._graph.replay([*given, *tensors]), state

    @torch.no_grad()
    def copied(self, state):
        with self._lock:
            tensors = self._state if state.tensors is None else state.tensors
            return keras.tree.pack_sequence_as(self._structure, [x.clone() for x in tensors])


class _Held:
    """The state that lies in a recording's buffers, or in `tensors` while another one does."""

    def __init__(self, step):
        self.step, self.tensors = step, None


def state_copy(state):
    """A state of `CapturedDecodeStep` as tensors; those of one that was not recorded are no step's
    to change."""
    return state.step.copied(state) if isinstance(state, _Held) else state
