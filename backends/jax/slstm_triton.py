"""The sLSTM on NVIDIA GPUs under JAX, by the Triton kernels that PyTorch has too.

They want the package triton, which JAX does not bring, and is imported on the first call. jaxlib
launches nothing cooperatively: that all programs which wait for each other are on the device is
only counted here, one a processor.
"""

import jax.numpy as jnp
from jax import lax
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import slstm_call
from keras_xlstm.backends.jax.pallas import slstm as pallas
from keras_xlstm.backends.kernels.slstm import plan

# What the launches for one part of the heads or steps leave for the next one's.
_IN_PLACE = (
    "h_p", "saved_p", "h1_p", "c1_p", "n1_p", "m1_p", "dx_p", "dh0_p", "dc0_p", "dn0_p",
)  # fmt: skip
_MOST = 64  # launches of one pass: each is compiled into the program


def unsupported(x=None):
    """Why the kernels cannot run on this array (None: here at all), or None."""
    if x is None:
        return device.missing_triton()
    if not isinstance(x.shape[0], int):
        return f"its batch needs a size; the shape is {x.shape}"
    reason = device.unsupported(x, device.missing_triton, device.triton_interpreted())
    reason = reason or plan.unsupported(
        x.shape[-1], x.dtype.itemsize, _device(x.dtype.name).shared_memory
    )
    if reason is not None:
        return reason
    run = _launches(x.shape, x.dtype)
    if device.triton_interpreted():
        if x.dtype.name != "float32" and not (x.dtype.name == "float16" and run.D % 32 == 0):
            return "Triton's interpreter computes float32 alone"
        return None
    if not run.whole and not run.waits:
        return (
            f"the {run.tiles} programs of a head of {run.D} units wait for each other, and only "
            f"{run.processors} run at once on this device"
        )
    return None


def not_preferred(x=None):
    """Why Pallas's kernels, or none, are better picked, or None."""
    if device.triton_interpreted():
        return "Triton's interpreter is for tests"
    if pallas.unsupported(x):
        return None
    if device.capability() // 10 != 9:
        return "only on Hopper was it seen to be faster than Pallas's kernels"
    run = _launches(x.shape, x.dtype)
    if not (run.clustered or run.whole) and run.groups > _MOST * run.together:
        return f"the heads and rows of {x.shape} would take more than {_MOST} launches"
    return "single steps are Pallas's" if x.shape[1] == 1 else None


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip,
):  # fmt: skip
    """As `reference.slstm`, for arrays of any dtype in `unsupported`; `state` may be None.

    The recurrent kernel meets h in x's dtype, with sums in float32.
    """
    hold, reset = (None if flag is None else flag.astype(jnp.int8) for flag in (hold, reset))
    bias, recurrent_scale = (
        None if x is None else x.astype(jnp.float32) for x in (bias, recurrent_scale)
    )
    return slstm_call(
        _forward, _backward, _inference, x, recurrent_kernel, bias, state, hold, reset,
        recurrent_scale, forget_gate, recurrent_gradient_clip,
    )  # fmt: skip


def _calls():
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch


def _launch(kernel, programs, *arguments, **constants):
    _calls().launch(kernel, programs, arguments, _IN_PLACE, **constants)


def _device(dtype):
    version = device.triton_version()
    precision = {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee")
    if device.triton_interpreted():
        return plan.Device(1 << 18, 1, precision, version, clusters=1, interpreted=True)
    clusters = 8 if device.capability() // 10 == 9 else 1
    return plan.Device(
        device.shared_memory(), device.processors(), precision, version, clusters=clusters
    )


def _launches(shape, dtype):
    B, T, _, H, D = shape
    return plan.Launches(_launch, _device(dtype.name), B, T, H, D, dtype.itemsize)


def _missing(buffer):
    """Fills what programs exchange with a NaN that they never write."""
    dtype = jnp.dtype(buffer.dtype)
    bits = jnp.full(buffer.shape, -1, f"int{8 * dtype.itemsize}")
    buffer.value = lax.bitcast_convert_type(bits, dtype)


def _memory(run):
    return _calls().Buffer((run.memory,), "int32") if run.memory else None


def _run(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, keep):
    B, T, _, H, D = x.shape
    run, Buffer = _launches(x.shape, x.dtype), _calls().Buffer
    h_all, last = Buffer((B, T, H, D), x.dtype), [Buffer((B, H, D)) for _ in range(4)]
    if run.exchanges:
        _missing(h_all)
    saved = plan.saved(x.shape, x.dtype.itemsize, run.device, exp_forget)
    saved = Buffer(saved) if keep else None
    given = x, R.astype(x.dtype), bias, hold, reset, scale
    first = None if h is None else h.astype(x.dtype)
    run.forward(given, first, (h, c, n, m), h_all, saved, last, exp_forget, _memory(run))
    return [buffer.value for buffer in (h_all, *last)], saved


def _inference(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip):
    return tuple(_run(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, False)[0])


def _forward(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip):
    outputs, saved = _run(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, True)
    h_all, _, c_last, n_last, _ = outputs
    return tuple(outputs), (
        R, bias, h, c, n, hold, reset, scale, h_all, c_last, n_last, saved.value,
    )  # fmt: skip


def _backward(residuals, gradients, exp_forget, clip):
    R, bias, h0, c0, n0, hold, reset, scale, h, c, n, saved = residuals
    dh, *after, _ = gradients
    B, T, H, D = h.shape
    run, Buffer = _launches((B, T, 4, H, D), h.dtype), _calls().Buffer
    dx, d_first = Buffer((B, T, 4, H, D), h.dtype), [Buffer(c.shape) for _ in range(3)]
    if run.exchanges:
        _missing(dx)
    given = dh, saved, R.astype(h.dtype), hold, reset, scale, c0, n0
    run.backward(given, after, c, n, dx, d_first, exp_forget, clip, _memory(run))
    dx, *d_first = (buffer.value for buffer in (dx, *d_first))
    first = None if h0 is None else h0.astype(h.dtype)
    dR = run.kernel_gradient(h, dx, first, reset, scale, Buffer).value
    dR = jnp.sum(dR, 0).astype(R.dtype)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dx.astype(jnp.float32), (0, 1)).astype(bias.dtype)
    if h0 is None:
        return dx, dR, dbias, *(None,) * 7
    # The state's true value is (c, n) exp(m).
    dm = c0 * d_first[1] + n0 * d_first[2]
    return dx, dR, dbias, *d_first, dm, None, None, None
