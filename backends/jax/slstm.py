"""The sLSTM on GPUs under JAX: when the Pallas kernels run, and all that is not a loop over time.

Pallas is imported on the first call.
"""

import dataclasses
import importlib

import jax.numpy as jnp
from keras_xlstm.backends.jax import differentiable, machine
from keras_xlstm.backends.mlstm_tiles import power
from keras_xlstm.backends.parts import carried, reported

_ROWS = 8  # of a program


def unsupported(x=None):
    """Why the kernels cannot run on this array (None: here at all), or None."""
    if x is None:
        return machine.missing()
    reason = machine.unsupported(x)
    if reason is None and not _fits(power(x.shape[-1]), x.dtype):
        most = next(D for D in (128, 64, 32, 16, 0) if _fits(D, x.dtype))
        reason = f"it takes up to {most} units a head in {x.dtype.name} here, not {x.shape[-1]}"
    return reason


def _fits(D, dtype):
    """Whether one program can hold the recurrent kernel of a head; float32's is there in parts."""
    needed = (4 * D * D * dtype.itemsize + 16 * D * _ROWS) * dtype.itemsize // 2
    return D <= (64 if dtype.name == "float32" else 128) and needed <= machine.shared_memory()


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip,
):  # fmt: skip
    """As `native.slstm`, for arrays of any dtype in `unsupported`; `state` may be None.

    The recurrent kernel meets h in x's dtype, with sums in float32.
    """
    state = (None,) * 4 if state is None else tuple(a.astype(jnp.float32) for a in state)
    tensors = (x, recurrent_kernel, bias, *state, hold, reset, recurrent_scale)
    options = {
        "exp_forget": forget_gate == "exp", "clip": recurrent_gradient_clip or 0.0,
        "interpret": machine.interpreted(),
    }  # fmt: skip

    def run(*tensors):
        return differentiable(_forward, _backward, tensors, _alone, **options)

    axes = ("BTGHD", "HDGE", "GHD", *("BHD",) * 4, "BT", "BT", "BHD")
    h, *state = machine.over_devices(run, tensors, axes, ("BTHD", *("BHD",) * 4))
    return h, tuple(state)


def _kernels():
    return importlib.import_module("keras_xlstm.backends.jax.slstm_kernels")


@dataclasses.dataclass
class _Sizes:
    """What the kernels of one call share: B and D padded to whole tiles."""

    given_B: int
    T: int
    H: int
    given_D: int
    dtype: str
    exp_forget: bool
    interpret: bool

    def __post_init__(self):
        # A batch without a size yet is only asked for shapes.
        self.BB = _ROWS if isinstance(self.given_B, int) else 1
        self.B = -(-self.given_B // self.BB) * self.BB
        self.D = power(self.given_D)
        self.precision = machine.precision(self.dtype)

    def padded(self, x, axes=(0, -1)):
        """Along the batch and along the units, where `axes` has them."""
        more = [(0, 0)] * x.ndim
        if 0 in axes:
            more[0] = (0, self.B - self.given_B)
        if -1 in axes:
            more[-1] = (0, self.D - self.given_D)
        return jnp.pad(x, more) if any(b for _, b in more) else x

    def given(self, x):
        return x[: self.given_B, ..., : self.given_D]

    def flags(self, x):
        return None if x is None else self.padded(x.astype(jnp.int32), (0,))

    def kernel(self, R):
        """(H, D, 4, D) to (H, 4 D, D): gate and out, in."""
        more = self.D - self.given_D
        R = jnp.pad(R.astype(self.dtype), ((0, 0), (0, more), (0, 0), (0, more)))
        return jnp.reshape(jnp.transpose(R, (0, 2, 3, 1)), (self.H, 4 * self.D, self.D))


def _run(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, interpret, keep):
    B, T, _, H, D = x.shape
    s = _Sizes(B, T, H, D, x.dtype.name, exp_forget, interpret)
    bias = None if bias is None else s.padded(bias.astype(jnp.float32), (-1,))
    first = {}
    if h is not None:
        values = h, c, n, carried(m, n != 0)
        first = {f"{k}0": s.padded(a) for k, a in zip("hcnm", values, strict=True)}
    flags = s.flags(hold), s.flags(reset)
    scale = None if scale is None else s.padded(scale.astype(jnp.float32))
    got = _kernels().forward(s, s.padded(x), s.kernel(R), bias, *flags, scale, first, keep)
    last = [s.given(got[name]) for name in ("h1", "c1", "n1", "m1")]
    return s, got, first, flags, scale, (s.given(got["h"]), *last[:3], reported(last[3]))


def _alone(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip, interpret):
    return _run(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, interpret, False)[-1]


def _forward(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip, interpret):
    _, got, first, flags, padded_scale, outputs = _run(
        x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, interpret, True
    )
    kept = {name: got[name] for name in ("h", "saved")}
    return outputs, (R, bias, first, flags, padded_scale, kept)


def _backward(residuals, gradients, exp_forget, clip, interpret):
    R, bias, first, flags, scale, kept = residuals
    dh, dh_last, dc_last, dn_last, _ = gradients
    B, T, H, D = dh.shape
    s = _Sizes(B, T, H, D, dh.dtype.name, exp_forget, interpret)
    last = dict(zip(("dh1", "dc1", "dn1"), map(s.padded, (dh_last, dc_last, dn_last)), strict=True))
    state = {name: first[name] for name in ("c0", "n0")} if first else {}
    turned = jnp.swapaxes(s.kernel(R), 1, 2)
    got = _kernels().backward(
        s, s.padded(dh), kept["saved"], turned, *flags, scale, state, last, clip, dh.dtype
    )
    h = kept["h"]
    before = first["h0"].astype(h.dtype) if first else jnp.zeros_like(h[:, 0])
    h_in = jnp.concatenate([before[:, None], h[:, :-1]], axis=1)
    if flags[1] is not None:
        h_in = jnp.where(flags[1][:, :, None, None] != 0, jnp.zeros((), h.dtype), h_in)
    if scale is not None:
        h_in = (h_in * scale[:, None]).astype(h.dtype)
    dR = jnp.einsum(
        "bthd,btghe->hdge", h_in, got["dx"], precision=s.precision,
        preferred_element_type=jnp.float32,
    )[:, :D, :, :D].astype(R.dtype)  # fmt: skip
    dx = s.given(got["dx"])
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dx.astype(jnp.float32), (0, 1)).astype(bias.dtype)
    if not first:
        return dx, dR, dbias, *(None,) * 7
    d_first = [s.given(got[name]) for name in ("dh0", "dc0", "dn0")]
    # The state's true value is (c, n) exp(m).
    c, n = s.given(first["c0"]), s.given(first["n0"])
    return dx, dR, dbias, *d_first, c * d_first[1] + n * d_first[2], None, None, None
