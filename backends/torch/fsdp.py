"""A model of blocks under FSDP2: weights in slices, put together for one block at a time.

FSDP2 works by hooks on modules' calls and swaps modules' parameters. Keras calls layers past those
hooks and reads variables of its own, so modules of ours stand between: one for every block, one for
the rest.
"""

import keras
import torch
from torch.distributed import fsdp


class _Weights(torch.nn.Module):
    """Parameters in place of variables; FSDP2 swaps them for slices, and back for a call."""

    def __init__(self, variables):
        super().__init__()
        self._variables = variables
        self.weights = torch.nn.ParameterDict({v.path: v.value for v in variables})

    def values(self):
        return [(v, self.weights[v.path]) for v in self._variables]


class _Block(_Weights):
    """Takes the place of a block's `_run`."""

    def __init__(self, block):
        super().__init__(block.weights)

    def forward(self, block, *arguments, states=True):
        with keras.StatelessScope(self.values()):
            y, state = block._run(*arguments)
        return y, [s.clone() for s in state]  # no views: FSDP2 warns of them


class Sharded(_Weights):
    """See `keras_xlstm.distribution.fully_shard`."""

    def __init__(self, model, options):
        theirs = {id(v) for block in model.blocks for v in block.weights}
        super().__init__([v for v in model.weights if id(v) not in theirs])
        self._model = [model]  # in a list: the Keras model's parameters are not this module's
        self._states = [v for v in model.variables if v.path not in {w.path for w in model.weights}]
        self.blocks = torch.nn.ModuleList(_Block(block) for block in model.blocks)
        for block in self.blocks:
            fsdp.fully_shard(block, **options)
        fsdp.fully_shard(self, **options)
        for v in model.weights:
            v.value.data = v.value.data.new_empty(0)

    def forward(self, inputs, training=True):
        (model,) = self._model
        states = [(v, v.value) for v in self._states]  # of random draws
        # Not the modules themselves, which Keras would track.
        with model._run_by([module.__call__ for module in self.blocks]):
            with keras.StatelessScope(self.values() + states) as scope:
                outputs = model(inputs, training=training)
        for v in self._states:
            v.assign(scope.get_current_value(v))
        return outputs

    @torch.no_grad()
    def gather(self):
        """Fills the Keras model's own weights from all slices; every process must call it."""
        for module in (self, *self.blocks):
            for variable, value in module.values():
                variable.value.data = value.full_tensor()


def sharded(model, options):
    """The module, if there are processes to share the weights among."""
    if not torch.distributed.is_initialized():
        raise ValueError(
            "fully_shard needs processes. Received: torch.distributed is not initialised. Call "
            "torch.distributed.init_process_group() under torchrun first."
        )
    return Sharded(model, options)
