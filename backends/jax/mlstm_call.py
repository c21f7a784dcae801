"""What a call of the mLSTM under JAX is, whichever kernels run."""

import jax.numpy as jnp
from keras_xlstm.backends import mlstm_tiles as tiles
from keras_xlstm.backends.jax import differentiable, machine

_STATE = ("BHKV", "BHK", "BH")
_AXES = (*("BTHK",) * 2, "BTHV", *("BTH",) * 2, *_STATE, "BT")


def call(
    forward, backward, step, q, k, v, i, f, state, segment_ids, input_gate, eps, chunk_size,
    states, **options,
):  # fmt: skip
    """As `native.mlstm`, by `forward` and `backward` on each device, or, where `step` is not None,
    by that for a single step from a state that is not trained through. Without `states` the last
    state is None."""
    if state is not None:
        state = tuple(x.astype(jnp.float32) for x in state)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    tensors = (q, k, v, i, f, *(state or (None,) * 3), segment_ids)
    alone = step if q.shape[1] == 1 and state is not None else None
    sizes = q.shape[1], q.shape[-1], v.shape[-1], q.dtype.name
    options |= {
        "sigmoid": input_gate == "sigmoid", "eps": float(eps),
        "chunk": chunk_size or tiles.chunk_steps(*sizes),
    }  # fmt: skip

    def run(*tensors):
        return differentiable(forward, backward, tensors, alone, **options)

    h, *state = machine.over_devices(run, tensors, _AXES, ("BTHV", *_STATE))
    return h, tuple(state) if states else None
