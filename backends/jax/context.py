"""Time shared out along an axis of keras.distribution's mesh (context parallelism)."""

import keras
from jax import lax, shard_map
from jax.sharding import PartitionSpec
from keras_xlstm.backends.common import Stretches


def shares_time():
    # keras_xlstm.distribution.ContextParallel, which is far above this file, has one.
    return hasattr(keras.distribution.distribution(), "time_dim_name")


def over_stretches(function, *tensors):
    """`function(stretches, *tensors)` on every device for its stretch of time and its part of the
    batch: q, k, v, i, f, a state or None, segment ids or None. None where time is not shared
    out, or has no number yet."""
    B, T = tensors[0].shape[:2]
    if not shares_time() or not isinstance(T, int):
        return None
    distribution = keras.distribution.distribution()
    mesh, time = distribution.device_mesh.backend_mesh, distribution.time_dim_name
    count, batch = mesh.shape[time], distribution.batch_dim_name
    if T > 1 and T % count:
        raise ValueError(
            f"ContextParallel shares time out among the {count} devices along {time!r} of its "
            f"mesh, a stretch of equal length for each. Received: {T} steps. Pad the sequences to "
            f"a multiple of {count}, and mask the padding."
        )
    batch = batch if isinstance(B, int) and B % mesh.shape[batch] == 0 else None
    time = time if T > 1 else None  # else each device has the step

    def on_device(*tensors):
        stretches = None
        if time is not None:
            stretches = Stretches(count, lax.axis_index(time), lambda x: lax.all_gather(x, time))
        return function(stretches, *tensors)

    steps, whole = PartitionSpec(batch, time), PartitionSpec(batch)
    run = shard_map(
        on_device, mesh=mesh, in_specs=(*[steps] * 5, whole, steps), out_specs=(steps, whole),
        check_vma=False,  # it cannot see that all devices along an axis have the same state
    )  # fmt: skip
    return run(*tensors)
