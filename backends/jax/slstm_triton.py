"""The sLSTM on NVIDIA GPUs under JAX, by the Triton kernels that PyTorch has too.

They want the package triton, which JAX does not bring, and is imported on the first call. jaxlib
launches nothing cooperatively: that all programs which wait for each other are on the device is
only counted here, one a processor.
"""

import jax.numpy as jnp
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import slstm_call
from keras_xlstm.backends.jax.pallas import slstm as pallas
from keras_xlstm.backends.kernels.slstm import plan

_MOST = 64  # launches of one pass: each is compiled into the program


def unsupported(x=None):
    """Why the kernels cannot run on this array (None: here at all), or None."""
    if x is None:
        return device.missing_triton()
    if not isinstance(x.shape[0], int):
        return f"its batch needs a size; the shape is {x.shape}"
    reason = device.unsupported(x, device.missing_triton, device.triton_interpreted())
    reason = reason or plan.unsupported(
        x.shape[-1], x.dtype.itemsize, device.of(x.dtype.name).shared_memory
    )
    if reason is not None:
        return reason
    cut = cut_of(x.shape, x.dtype)
    if device.triton_interpreted():
        if x.dtype.name != "float32" and not (x.dtype.name == "float16" and cut.D % 32 == 0):
            return "Triton's interpreter computes float32 alone"
        return None
    if not cut.whole and not cut.waits:
        return (
            f"the {cut.tiles} programs of a head of {cut.D} units wait for each other, and only "
            f"{cut.processors} run at once on this device"
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
    cut = cut_of(x.shape, x.dtype)
    if not (cut.clustered or cut.whole) and cut.groups > _MOST * cut.together:
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


def cut_of(shape, dtype):
    B, T, _, H, D = shape
    return plan.Cut(device.of(dtype.name), B, T, H, D, dtype.itemsize)


def _run(plan, *arrays):
    from keras_xlstm.backends.jax import triton_launch

    return triton_launch.run(plan, [x for x in arrays if x is not None])


def _call(shape, dtype, *given, exp_forget):
    B, T, H, D = shape
    return plan.Call(B, T, H, D, dtype.name, *[x is not None for x in given], exp_forget)


def _pass(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, trains):
    B, T, _, H, D = x.shape
    call = _call((B, T, H, D), x.dtype, bias, h, hold, reset, scale, exp_forget=exp_forget)
    steps = plan.forward(device.of(x.dtype.name), call, trains)
    first = None if h is None else h.astype(x.dtype)
    return _run(steps, x, R.astype(x.dtype), bias, hold, reset, scale, first, h, c, n, m)


def _inference(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip):
    return tuple(_pass(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, False)[0])


def _forward(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip):
    outputs, (saved,) = _pass(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, True)
    h_all, _, c_last, n_last, _ = outputs
    return tuple(outputs), (
        R, bias, h, c, n, hold, reset, scale, h_all, c_last, n_last, saved,
    )  # fmt: skip


def _backward(residuals, gradients, exp_forget, clip):
    R, bias, h0, c0, n0, hold, reset, scale, h, c, n, saved = residuals
    dh, *after, _ = gradients
    call = _call(h.shape, h.dtype, bias, h0, hold, reset, scale, exp_forget=exp_forget)
    steps = plan.backward(device.of(h.dtype.name), call, clip)
    first = None if h0 is None else h0.astype(h.dtype)
    (dx, *d_first, dR), _ = _run(
        steps, dh, *after, R.astype(h.dtype), hold, reset, scale, first, c0, n0, h, c, n, saved
    )
    dR = jnp.sum(dR, 0).astype(R.dtype)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dx.astype(jnp.float32), (0, 1)).astype(bias.dtype)
    if h0 is None:
        return dx, dR, dbias, *(None,) * 7
    # The state's true value is (c, n) exp(m).
    dm = c0 * d_first[1] + n0 * d_first[2]
    return dx, dR, dbias, *d_first, dm, None, None, None
