"""torch.compile for models of many equal blocks: one is compiled, the others run it with their own
weights.

Compiling Keras's whole training step traces every layer of every block: minutes for a model of 24
blocks. This takes as long as one block does.
"""

import logging
import types

import keras
import torch
from keras_xlstm.backends.torch.tracing import exporting

_log = logging.getLogger("keras_xlstm")


def block_runners(blocks, required=True):
    kinds = {type(block): block for block in blocks}
    return {kind: _runner(block, required) for kind, block in kinds.items()}


def or_plain(compiled, plain, required):
    """`compiled`; unless `required`, once PyTorch cannot compile it, `plain` from then on."""
    if required:
        return compiled
    failed = []

    def run(*arguments):
        if not failed:
            try:
                return compiled(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed.append(True)  # its frames hold gradient nodes, which end a recording
                _log.warning("Not compiled: torch.compile failed. %s", str(error))
        return plain(*arguments)

    return run


def _runner(template, required):
    """`template._run` compiled, as a function of a block like it and the same arguments."""

    def compute(weights, *arguments):
        with keras.StatelessScope(list(zip(template.variables, weights, strict=True))):
            return template._run(*arguments)

    # Code of its own for every kind of block: PyTorch counts how often it compiles one again.
    code = compute.__code__.replace(co_name=f"compute_{type(template).__name__}")
    cells = compute.__closure__
    compiled = torch.compile(types.FunctionType(code, globals(), code.co_name, None, cells))
    tried = or_plain(compiled, compute, required)

    def run(block, *arguments, states=True):
        if arguments[0].device.type == "meta" or exporting():  # Keras works out shapes
            return block._run(*arguments)
        # Not .value, which would cast them for the block's policy one by one.
        return tried([variable._value for variable in block.variables], *arguments)

    return run
