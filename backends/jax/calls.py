"""What a call of an op under JAX is, whichever kernels run."""

import jax.numpy as jnp
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.gradients import differentiable_with_inference
from keras_xlstm.backends.kernels.mlstm import tiles

_STATE = ("BHKV", "BHK", "BH")
_AXES = (*("BTHK",) * 2, "BTHV", *("BTH",) * 2, *_STATE, "BT")
# Of x, the recurrent kernel, the bias, h, c, n, m, the flags and the scale; of h and the states.
SLSTM_AXES = ("BTGHD", "HDGE", "GHD", *("BHD",) * 4, "BT", "BT", "BHD")
SLSTM_RESULTS = ("BTHD", *("BHD",) * 4)


def mlstm_call(
    forward, backward, step, q, k, v, i, f, state, segment_ids, input_gate, eps, chunk_size,
    states, **options,
):  # fmt: skip
    """As `reference.mlstm`, by `forward` and `backward` on each device, or, where `step` is not
    None, by that for a single step from a state that is not trained through. Without `states` the
    last state is None."""
    if state is not None:
        state = tuple(x.astype(jnp.float32) for x in state)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    tensors = (q, k, v, i, f, *(state or (None,) * 3), segment_ids)
    inference = step if q.shape[1] == 1 and state is not None else None
    sizes = q.shape[1], q.shape[-1], v.shape[-1], q.dtype.name
    options |= {
        "sigmoid": input_gate == "sigmoid", "eps": float(eps),
        "chunk": chunk_size or tiles.chunk_steps(*sizes),
    }  # fmt: skip

    def run(*tensors):
        return differentiable_with_inference(forward, backward, inference, tensors, **options)

    h, *state = device.over_devices(run, tensors, _AXES, ("BTHV", *_STATE))
    return h, tuple(state) if states else None


def slstm_call(
    forward, backward, inference, x, recurrent_kernel, bias, state, hold, reset, recurrent_scale,
    forget_gate, recurrent_gradient_clip, around=lambda run: run, **options,
):  # fmt: skip
    """As `reference.slstm`, by `forward` and `backward`, or `inference` where nothing is
    differentiated, on each device, which calls `around(run)` in place of `run`."""
    state = (None,) * 4 if state is None else tuple(a.astype(jnp.float32) for a in state)
    tensors = (x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale)
    options |= {"exp_forget": forget_gate == "exp", "clip": float(recurrent_gradient_clip or 0.0)}

    def run(*tensors):
        return differentiable_with_inference(forward, backward, inference, tensors, **options)

    h, *state = device.over_devices(around(run), tensors, SLSTM_AXES, SLSTM_RESULTS)
    return h, tuple(state)
