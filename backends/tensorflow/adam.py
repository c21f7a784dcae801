"""Fewer operators in a training step."""

import keras
import tensorflow as tf


def fuse_optimizer(optimizer, captured):
    """Makes Keras's Adam and AdamW update a weight by one operator, where Keras takes about forty
    for each, and TensorFlow milliseconds to trace and compile some of them."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if type(optimizer) in (keras.optimizers.Adam, keras.optimizers.AdamW) and not optimizer.amsgrad:
        if not isinstance(optimizer._backend_update_step, _FusedAdam):
            optimizer._backend_update_step = _FusedAdam(optimizer)


class _FusedAdam:
    def __init__(self, optimizer):
        self.optimizer, self.otherwise = optimizer, optimizer._backend_update_step

    def __call__(self, gradients, variables, learning_rate):
        # Keras's own squares a repeated token's gradients apart; on JAX and torch it does not.
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        # The operator takes beta_2 in the weight's dtype, and in bfloat16 it is 1.
        exact = all(variable.dtype in ("float32", "float64") for variable in variables)
        if not exact or tf.distribute.has_strategy():  # a strategy has a copy for every replica
            return self.otherwise(gradients, variables, learning_rate)
        optimizer = self.optimizer
        step = keras.ops.cast(optimizer.iterations + 1, "float32")
        numbers = {
            "beta1_power": optimizer.beta_1**step, "beta2_power": optimizer.beta_2**step,
            "lr": learning_rate, "beta1": optimizer.beta_1, "beta2": optimizer.beta_2,
            "epsilon": optimizer.epsilon,
        }  # fmt: skip
        as_kind = {}  # once for all weights of a dtype
        for gradient, variable in zip(gradients, variables, strict=True):
            index, dtype = optimizer._get_variable_index(variable), variable.dtype
            if dtype not in as_kind:
                as_kind[dtype] = {k: keras.ops.cast(x, dtype) for k, x in numbers.items()}
            moments = optimizer._momentums[index], optimizer._velocities[index]
            value, m, v = (getattr(x, "value", x).handle for x in (variable, *moments))
            gradient = keras.ops.cast(gradient, dtype)
            tf.raw_ops.ResourceApplyAdam(var=value, m=m, v=v, grad=gradient, **as_kind[dtype])
        return None
