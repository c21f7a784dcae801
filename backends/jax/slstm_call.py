"""What a call of the sLSTM under JAX is, whichever kernels run."""

import jax.numpy as jnp
from keras_xlstm.backends.jax import differentiable, machine

# Of x, the recurrent kernel, the bias, h, c, n, m, the flags and the scale; of h and the states.
AXES = ("BTGHD", "HDGE", "GHD", *("BHD",) * 4, "BT", "BT", "BHD")
RESULTS = ("BTHD", *("BHD",) * 4)


def call(
    forward, backward, alone, x, recurrent_kernel, bias, state, hold, reset, recurrent_scale,
    forget_gate, recurrent_gradient_clip, around=lambda run: run, **options,
):  # fmt: skip
    """As `native.slstm`, by `forward` and `backward`, or `alone` where nothing is differentiated,
    on each device, which calls `around(run)` in place of `run`."""
    state = (None,) * 4 if state is None else tuple(a.astype(jnp.float32) for a in state)
    tensors = (x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale)
    options |= {"exp_forget": forget_gate == "exp", "clip": float(recurrent_gradient_clip or 0.0)}

    def run(*tensors):
        return differentiable(forward, backward, tensors, alone, **options)

    h, *state = machine.over_devices(around(run), tensors, AXES, RESULTS)
    return h, tuple(state)
