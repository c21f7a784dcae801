"""The mLSTM on NVIDIA GPUs under JAX, by the Triton kernels that PyTorch has too.

On Hopper they are faster than Pallas's, whose way through XLA's Triton has no TMA and no warps that
copy ahead of others (benchmarks/RESULTS.md). They want the package triton, which JAX does not
bring. Triton itself is imported on the first call.
"""

import jax.numpy as jnp
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import mlstm_call
from keras_xlstm.backends.jax.pallas import mlstm as pallas
from keras_xlstm.backends.kernels.mlstm import tiles
from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.log_space import carried, holds_something

# What kernels change that others wrote before, or that one of two launches has to write.
_IN_PLACE = {
    "chunks": ("parts_p",),
    "scan_chunk_states": ("s_p", "n_p", "s_last_p", "n_last_p", "inner_p"),
}


def unsupported(q=None, v=None, chunk_size=None):
    """Why the kernels cannot run on these arrays (None: here at all), or None."""
    if q is None:
        return device.missing_triton()
    if not isinstance(q.shape[0], int):
        return f"its batch needs a size; the shape is {q.shape}"
    return (
        device.unsupported(q, device.missing_triton, device.triton_interpreted())
        or tiles.unsupported(q.shape[-1], v.shape[-1], chunk_size)
        or _of_interpreter(q)
    )


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
        chunk_size, states, device=_device(q.dtype.name),
    )  # fmt: skip


def _launches():
    from keras_xlstm.backends.kernels.mlstm import plan

    return plan


def _calls():
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch


def _device(dtype):
    precision = {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee")
    if device.triton_interpreted():
        return 1 << 18, 1, False, precision
    hopper = device.capability() // 10 == 9
    return device.shared_memory(), device.processors(), hopper, precision


class _Launch:
    known = False  # XLA keeps what is compiled

    def __init__(self, kernel, programs, **constants):
        self.kernel, self.programs, self.constants = kernel, programs, constants

    def __call__(self, stream, *arguments):
        in_place = _IN_PLACE.get(self.kernel.fn.__name__, ())
        _calls().launch(self.kernel, self.programs, arguments, in_place, **self.constants)


class _Parts:
    def __init__(self, *parts):
        self.parts = [part if isinstance(part[0], tuple) else (part,) for part in parts]

    def new(self, like):
        return [_calls().Buffer(*part) for part in self.parts]

    def of(self, buffers, known):
        return buffers


class _Host:
    launch, parts = _Launch, _Parts

    def __init__(self, device):
        self.device = _launches().Device(*device)

    def describe(self, *matrices):
        def described(tensors):
            given = zip(tensors, matrices, strict=True)
            return [None if t is None else _calls().Matrix(t, *matrix) for t, matrix in given]

        return described


def _call(q, v, ids, sigmoid, chunk):
    return _launches().Call(
        *q.shape, v.shape[-1], q.dtype.name, ids is not None, sigmoid, chunk
    )  # fmt: skip


def _forward(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, device):
    B, _, H, K = q.shape
    if m is not None:
        m = carried(m, holds_something(C, n))
    states = (B, H, K, v.shape[-1]), (B, H, K), (B, H)
    Buffer = _calls().Buffer
    results = [Buffer(v.shape, v.dtype), *map(Buffer, states)]
    run = _launches().Forward(_Host(device), _call(q, v, ids, sigmoid, chunk), C is not None)
    kept = run(None, (q, k, v, i, f, C, n, m, ids), results, eps)
    results = tuple(buffer.value for buffer in results)
    kept = [buffer.value for buffer in kept]
    return results, (q, k, v, i, f, C, n, ids, results[0], kept)


def _backward(residuals, gradients, sigmoid, eps, chunk, device):
    q, k, v, i, f, C, n, ids, h, kept = residuals
    dh, dC, dn, _ = gradients
    Buffer = _calls().Buffer
    states = [Buffer(d.shape) for d in (dC, dn)]
    results = [*(Buffer(x.shape, x.dtype) for x in (q, k, v, i, f)), *states]
    run = _launches().Backward(_Host(device), _call(q, v, ids, sigmoid, chunk), True)
    run(None, (dh, dC, dn, q, k, v, i, f, ids, h, kept), results)
    *results, dC, dn = (buffer.value for buffer in results)
    if C is None:
        return *results, None, None, None, None
    # The state's true value is (C, n) exp(m).
    dm = jnp.sum(C * dC, (-2, -1)) + jnp.sum(n * dn, -1)
    return *results, dC, dn, dm, None


def _step(q, k, v, i, f, C, n, m, ids, sigmoid, eps, chunk, device):
    """A single step that is not trained through."""
    from keras_xlstm.backends.kernels.mlstm.step import step

    if ids is not None:  # one segment: that of the state
        C, n, m = (jnp.where(jnp.reshape(ids == 0, (-1,) + (1,) * (x.ndim - 1)), x, 0.0)
                   for x in (C, n, m))  # fmt: skip
    B, H, K, V = C.shape
    results = [_calls().Buffer(x.shape, x.dtype) for x in (v, C, n, m)]
    BV, warps = tiles.step(B * H, K, V)
    _calls().launch(
        step, B * H * -(-V // BV), (q, k, v, i, f, C, n, m, *results, K**-0.5, eps),
        K=K, V=V, P=power(K), BV=BV, SIGMOID=sigmoid, num_warps=warps,
    )  # fmt: skip
    return tuple(buffer.value for buffer in results)
