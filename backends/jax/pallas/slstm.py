"""The sLSTM on GPUs under JAX: when the Pallas kernels run, and all that is not a loop over time.

Pallas is imported on the first call.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from keras_xlstm.backends.jax import device
from keras_xlstm.backends.jax.calls import SLSTM_AXES, SLSTM_RESULTS, slstm_call
from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.log_space import carried, reported


def unsupported(x=None):
    """Why the kernels cannot run on this array (None: here at all), or None."""
    if x is None:
        return device.missing()
    reason = device.unsupported(x)
    D, dtype = x.shape[-1], x.dtype
    if reason is not None or _whole(D, dtype):
        return reason
    cut = _split(D, dtype)
    if not cut:
        most = next(most for most in (*range(1024, 0, -64), 32, 16) if _rows(most, dtype))
        return f"it takes up to {most} units a head in {dtype.name} here, not {D}"
    if cut["tiles"] > device.processors():
        return (
            f"the {cut['tiles']} programs of a head of {D} units wait for each other, and only "
            f"{device.processors()} run at once on this device"
        )
    return None


def not_preferred(x=None):
    return None  # where it can run it is the better choice


def _whole(D, dtype):
    """Whether one program can hold the recurrent kernel of a head; float32's is there in parts."""
    D = power(D)
    needed = (4 * D * D * dtype.itemsize + 16 * D * 8) * dtype.itemsize // 2
    return D <= (64 if dtype.name == "float32" else 128) and needed <= device.shared_memory()


def _split(D, dtype, BB=8):
    """How several programs share a head, a program in products of KR units; or None: it does not
    fit, or native is faster (float32 backwards)."""
    D = -(-D // 64) * 64
    BU = D if device.interpreted() else 16  # the interpreter's programs cannot wait
    # The recurrent kernel, and the gate gradients of all units.
    needed = 4 * D * (16 + BB) * dtype.itemsize
    if D > 1024 or dtype.itemsize > 2 or needed > device.shared_memory():
        return None
    return {"D": D, "BU": BU, "KR": min(D & -D, 256), "tiles": D // BU}


def slstm(
    x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
    recurrent_gradient_clip,
):  # fmt: skip
    """As `reference.slstm`, for arrays of any dtype in `unsupported`; `state` may be None.

    The recurrent kernel meets h in x's dtype, with sums in float32.
    """
    return slstm_call(
        _forward, _backward, _inference, x, recurrent_kernel, bias, state, hold, reset,
        recurrent_scale, forget_gate, recurrent_gradient_clip,
        around=lambda run: lambda *tensors: _in_rounds(run, tensors),
        interpret=device.interpreted(),
    )  # fmt: skip


def _in_rounds(run, tensors):
    """run(*tensors), for as many heads and rows at a time as the device runs at once: programs
    that wait for each other. One round after another, forward and backward."""
    x = tensors[0]
    B, _, _, H, D = x.shape
    if _whole(D, x.dtype) or not isinstance(B, int):
        return run(*tensors)
    together = max(1, device.processors() // _split(D, x.dtype)["tiles"])
    heads = max(n for n in range(1, H + 1) if H % n == 0 and n <= together)
    rows = together // heads * _rows(D, x.dtype)[-1]
    if heads < H:
        run = functools.partial(_mapped, run, "H", H // heads)
    if B <= rows:
        return run(*tensors)
    rounds = -(-B // rows)
    more = rounds * -(-B // rounds) - B
    tensors = [
        t if t is None or axes[0] != "B" else jnp.pad(t, [(0, more)] + [(0, 0)] * (t.ndim - 1))
        for t, axes in zip(tensors, SLSTM_AXES, strict=True)
    ]
    return [y[:B] for y in _mapped(run, "B", rounds, *tensors)]


def _rows(D, dtype):
    """How many rows a program may have."""
    return (8,) if _whole(D, dtype) else [BB for BB in (8, 16, 32) if _split(D, dtype, BB)]


def _mapped(run, letter, count, *tensors):
    """run, for `count` parts of the tensors along the axis of that letter."""
    parts = []
    for t, axes in zip(tensors, SLSTM_AXES, strict=True):
        axis = axes.find(letter)
        if t is not None and axis >= 0:
            t = jnp.reshape(t, (*t.shape[:axis], count, -1, *t.shape[axis + 1 :]))
            parts.append(jnp.moveaxis(t, axis, 0))
        else:
            parts.append(None)

    def part(parts):
        given = [t if cut is None else cut for t, cut in zip(tensors, parts, strict=True)]
        return run(*given)

    def joined(y, axis):
        y = jnp.moveaxis(y, 0, axis)
        return jnp.reshape(y, (*y.shape[:axis], -1, *y.shape[axis + 2 :]))

    results = lax.map(part, parts)
    return [joined(y, axes.index(letter)) for y, axes in zip(results, SLSTM_RESULTS, strict=True)]


def _kernels():
    from keras_xlstm.backends.jax.pallas import slstm_recurrence

    return slstm_recurrence


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
        D, dtype = self.given_D, jnp.dtype(self.dtype)
        self.split = not _whole(D, dtype)
        cut = {"D": power(D), "BU": power(D), "KR": power(D), "tiles": 1}
        cut = _split(D, dtype) if self.split else cut
        self.D, self.BU, self.KR, self.tiles = cut.values()
        # Few rows are less work at each step, as long as all programs are on the device. (A batch
        # without a size yet is only asked for shapes.)
        for BB in _rows(D, dtype) if isinstance(self.given_B, int) else (1,):
            self.BB, self.B = BB, -(-self.given_B // BB) * BB
            if self.B // BB * self.H * self.tiles <= device.processors():
                break
        self.warps = 4 if self.split and D <= 256 else 8
        # Backwards: columns of the recurrent kernel, and those of one product.
        self.turned, self.back = (self.D, self.KR) if self.split else (4 * self.D, 2 * self.D)
        self.precision = device.precision(self.dtype)

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
        """(H, D, 4, D) to (H, programs, 4 BU, D): gate and out, in."""
        R = jnp.transpose(self._whole_kernel(R), (0, 3, 2, 1))
        return self._tiles(jnp.swapaxes(R, 1, 2))

    def turned_kernel(self, R):
        """To (H, programs, 4 BU, D): gate and in, out; or (H, 1, D, 4 D): in, gate and out."""
        R = self._whole_kernel(R)
        if not self.split:
            return jnp.reshape(R, (self.H, 1, self.D, 4 * self.D))
        return self._tiles(jnp.swapaxes(R, 1, 2))

    def _whole_kernel(self, R):
        more = self.D - self.given_D
        return jnp.pad(R.astype(self.dtype), ((0, 0), (0, more), (0, 0), (0, more)))

    def _tiles(self, R):
        """(H, 4, D, D), of which each program has BU rows of each gate."""
        R = jnp.reshape(R, (self.H, 4, self.tiles, self.BU, self.D))
        return jnp.reshape(jnp.swapaxes(R, 1, 2), (self.H, self.tiles, 4 * self.BU, self.D))

    def missing(self, *shape):
        """What programs wait for."""
        bits = jnp.full(shape, _kernels().MISSING, f"int{8 * jnp.dtype(self.dtype).itemsize}")
        return lax.bitcast_convert_type(bits, jnp.dtype(self.dtype))

    def before(self, first):
        """h before the first step, (B, 1, H, D)."""
        h = first["h0"] if first else jnp.zeros((self.B, self.H, self.D))
        return h.astype(self.dtype)[:, None]


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
    h = None
    if s.split:
        h = jnp.concatenate([s.before(first), s.missing(s.B, T, H, s.D)], axis=1)
    got = _kernels().forward(s, s.padded(x), s.kernel(R), bias, *flags, scale, first, keep, h)
    h = got["h"][:, 1:] if s.split else got["h"]
    last = [s.given(got[name]) for name in ("h1", "c1", "n1", "m1")]
    return s, got, first, flags, scale, (s.given(h), *last[:3], reported(last[3]))


def _inference(x, R, bias, h, c, n, m, hold, reset, scale, exp_forget, clip, interpret):
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
    dx = None
    if s.split:
        nothing = jnp.zeros((s.B, 1, 4, H, s.D), dh.dtype)
        dx = jnp.concatenate([s.missing(s.B, T, 4, H, s.D), nothing], axis=1)
    got = _kernels().backward(
        s, s.padded(dh), kept["saved"], s.turned_kernel(R), *flags, scale, state, last, clip,
        dh.dtype, dx,
    )  # fmt: skip
    dx = got["dx"][:, :T]
    h_in = kept["h"][:, :T]
    if not s.split:
        h_in = jnp.concatenate([s.before(first), h_in[:, :-1]], axis=1)
    if flags[1] is not None:
        h_in = jnp.where(flags[1][:, :, None, None] != 0, jnp.zeros((), h_in.dtype), h_in)
    if scale is not None:
        h_in = (h_in * scale[:, None]).astype(dh.dtype)
    dR = jnp.einsum(
        "bthd,btghe->hdge", h_in, dx, precision=s.precision,
        preferred_element_type=jnp.float32,
    )[:, :D, :, :D].astype(R.dtype)  # fmt: skip
    dx = s.given(dx)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dx.astype(jnp.float32), (0, 1)).astype(bias.dtype)
    if not first:
        return dx, dR, dbias, *(None,) * 7
    d_first = [s.given(got[name]) for name in ("dh0", "dc0", "dn0")]
    # The state's true value is (c, n) exp(m).
    c, n = s.given(first["c0"]), s.given(first["n0"])
    return dx, dR, dbias, *d_first, c * d_first[1] + n * d_first[2], None, None, None
