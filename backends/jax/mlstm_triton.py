"""The mLSTM on NVIDIA GPUs under JAX, by the Triton kernels that PyTorch has too.

On Hopper they are faster than Pallas's, whose way through XLA's Triton has no TMA and no warps that
copy ahead of others (benchmarks/RESULTS.md). They want the package triton, which JAX does not
bring. Triton itself is imported on the first call.
"""

import jax.numpy as jnp
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import mlstm_call
from keras_xlstm.backends.jax.pallas import mlstm as pallas
from keras_xlstm.backends.kernels.mlstm import plan, tiles
from keras_xlstm.backends.log_space import carried, holds_something


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these arrays (None: here at all), or None."""
    if q is None:
        return device.missing_triton()
    if not isinstance(q.shape[0], int):
        return f"its batch needs a size; the shape is {q.shape}"
    return (
        device.unsupported(q, device.missing_triton, device.triton_interpreted())
        or tiles.unsupported(
            q.shape[-1], v.shape[-1], chunk_size, q.dtype.name,
            device.of(q.dtype.name).shared_memory,
        )
        or _of_interpreter(q)
    )  # fmt: skip


def _of_interpreter(q):
    if device.triton_interpreted() and q.dtype.name != "float32":
        return "Triton's interpreter computes float32 alone"
    return None


def not_preferred(q=None, v=None, chunk_size=None):
    """Why Pallas's kernels, or none, are better picked, or None."""
    if device.triton_interpreted():
        return "Triton's interpreter is for tests"
    if pallas.unsupported(q, v, chunk_size):
        return None
    if device.capability() // 10 != 9:
        return "only on Hopper was it seen to be faster than Pallas's kernels"
    return "single steps are Pallas's" if q.shape[1] == 1 else None


def mlstm(q, k, v, i, f, state, segment_ids, *, input_gate, eps, chunk_size, states=True):
    """As `reference.mlstm`, for arrays of any dtype in `unsupported`; `state` may be None.
    Without `states` the last state is None."""
    return mlstm_call(
        _forward, _backward, _step, q, k, v, i, f, state, segment_ids, input_gate, eps,
        chunk_size, states, device=device.of(q.dtype.name),
    )  # fmt: skip


def _run(plan, *arrays):
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch.run(plan, [x for x in arrays if x is not None])


def _call(q, v, i, f, ids, sigmoid, chunk, eps=0.0):
    gates = i.dtype.name, f.dtype.name
    return plan.Call(
        *q.shape, v.shape[-1], q.dtype.name, gates, ids is not None, sigmoid, chunk, eps
    )


def _forward(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, device):
    if m is not None:
        m = carried(m, holds_something(C, n))
    call = _call(q, v, i, f, ids, sigmoid, chunk, eps)
    steps = plan.forward(device, call, C is not None, states=True, trains=True)
    results, saved = _run(steps, q, k, v, i, f, C, n, m, ids)
    return tuple(results), (q, k, v, i, f, C, n, ids, results[0], saved)


def _backward(residuals, gradients, sigmoid, eps, chunk, device):
    q, k, v, i, f, C, n, ids, h, saved = residuals
    dh, dC, dn, _ = gradients
    call = _call(q, v, i, f, ids, sigmoid, chunk)
    steps = plan.backward(device, call, has_state=True, states=True)
    (*results, dC, dn), _ = _run(steps, dh, dC, dn, q, k, v, i, f, ids, h, *saved)
    if C is None:
        return *results, None, None, None, None
    # The state's true value is (C, n) exp(m).
    dm = jnp.sum(C * dC, (-2, -1)) + jnp.sum(n * dn, -1)
    return *results, dC, dn, dm, None


def _step(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, device):
    """A single step that is not trained through."""
    if ids is not None:  # one segment: that of the state
        C, n, m = (jnp.where(jnp.reshape(ids == 0, (-1,) + (1,) * (x.ndim - 1)), x, 0.0)
                   for x in (C, n, m))  # fmt: skip
    steps = plan.single_step(_call(q, v, i, f, None, sigmoid, chunk, eps))
    return tuple(_run(steps, q, k, v, i, f, C, n, m)[0])
