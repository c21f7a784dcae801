"""NaN, inf and extreme numbers of padding stay where they stand, in layers and models (of the ops,
contract/base.py has them)."""

import keras
import numpy as np
import pytest
from blocks import B, D, T, built
from cases import make_mask
from contract.base import poison
from keras import ops
from tools import array, assert_close, some, tensor, vjp

from keras_xlstm import layers, models


def stack(architecture):
    model = models.xLSTMStack(D, num_blocks=2, num_heads=2, architecture=architecture)
    return model, lambda x, mask: model({"sequences": x, "padding_mask": mask})


def stack_run(architecture):
    model, _ = stack(architecture)
    return model, lambda x, mask: model.run(x, model.get_initial_state(B), padding_mask=mask)[0]


def stack_in_a_model():
    model, _ = stack("paper")
    sequences, mask = keras.Input((T, D)), keras.Input((T,), dtype="bool")
    # Keras's own way: a mask that comes with the tensor.
    masked = keras.layers.Lambda(lambda x: x[0], mask=lambda x, mask: x[1])([sequences, mask])
    outer = keras.Model([sequences, mask], model(masked))
    return outer, lambda x, mask: outer([x, mask])


def alone(make, **options):
    layer = make(**options)
    return layer, lambda x, mask: layer(x, mask=mask)


def convolution():
    layer = layers.CausalConv1D(4)
    layer.build((B, T, D))
    return layer, lambda x, mask: layer(x, np.zeros((B, 3, D), "float32"), mask=mask)[0]


def block(case):
    layer = built(case, np.random.default_rng(1))
    return layer, lambda x, mask: layer(x, mask=mask)


WHOLES = {
    "mlstm": lambda: alone(layers.mLSTM, units=8, return_sequences=True, go_backwards=True),
    "slstm": lambda: alone(layers.sLSTM, units=8, return_sequences=True),
    "convolution": convolution,
    "mlstm_block": lambda: block("mlstm"),
    "slstm_block": lambda: block("slstm"),
    "large_block": lambda: block("large"),
    "stack": lambda: stack("paper"),
    "large_stack": lambda: stack("large"),
    "run": lambda: stack_run("paper"),
    "stack_in_a_model": stack_in_a_model,
}


# A stack is its blocks, and a mask that it hands on.
EVERY_RUN = [(whole,) for whole in WHOLES if whole not in ("convolution", "stack", "run")]


@pytest.mark.parametrize("whole", some(EVERY_RUN, [(whole,) for whole in WHOLES]))
def test_padding_of_layers(whole, rng):
    """Outputs at real steps and the gradients of inputs and of every weight."""
    layer, call = WHOLES[whole]()
    mask = make_mask("holes", B, T, rng)
    mask[1] = False
    x = rng.normal(size=(B, T, D)).astype("float32")
    call(x, mask)
    variables = layer.trainable_variables

    def real(x, *weights):
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            y = call(x, tensor(mask, "bool"))
        return (ops.where(mask[:, ::-1, None] if whole == "mlstm" else mask[..., None], y, 0.0),)

    weights = [ops.convert_to_tensor(v.value) for v in variables]
    cotangent = [tensor(rng.normal(size=call(x, mask).shape))]

    def found():
        (y,), gradients = vjp(real, [tensor(x), *weights], cotangent, xla=False)
        return [array(a) for a in (y, *gradients)]

    clean = found()
    poison(x, ~mask, rng)
    for a, b in zip(found(), clean, strict=True):
        assert_close(a, b, 1e-5)
