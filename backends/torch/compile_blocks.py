"""torch.compile for models of many equal blocks: one is compiled, the others run it with their own
weights.

Compiling Keras's whole training step traces every layer of every block: minutes for a model of 24
blocks. This takes as long as one block does.
"""

import types

import keras
import torch
from keras_xlstm.backends.torch.tracing import exporting


def block_runners(blocks):
    return {kind: _runner(block) for kind, block in {type(b): b for b in blocks}.items()}


def _runner(template):
    """`template._run` compiled, as a function of a block like it and the same arguments."""

    def compute(weights, *arguments):
        with keras.StatelessScope(list(zip(template.variables, weights, strict=True))):
            return template._run(*arguments)

    # Code of its own for every kind of block: PyTorch counts how often it compiles one again.
    code = compute.__code__.replace(co_name=f"compute_{type(template).__name__}")
    cells = compute.__closure__
    compiled = torch.compile(types.FunctionType(code, globals(), code.co_name, None, cells))

    def run(block, *arguments, states=True):
        if arguments[0].device.type == "meta" or exporting():  # Keras works out shapes
            return block._run(*arguments)
        # Not .value, which would cast them for the block's policy one by one.
        return compiled([variable._value for variable in block.variables], *arguments)

    return run
