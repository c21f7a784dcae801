"""Memory mixing of the sLSTM: what h gives the gates of all heads, and the way back."""

from keras import ops
from keras_xlstm.backends.framework import framework


class Mixing:
    """What h of all heads, (..., U) with U = H * D, gives the gates, (..., 4 U) in the order gate,
    head, unit; and back.

    Heads of few units are multiplied as one kernel (U, 4 U) with zeros between heads: the products
    are small, and one of them is faster than one a head.
    """

    def __init__(self, recurrent_kernel):
        self.shape = H, D, _, _ = tuple(map(framework.size, recurrent_kernel.shape))
        self.joined = H == 1 or (H * D <= framework.joined_heads and framework.alone_on_device())
        self.R = recurrent_kernel
        if self.joined:
            self.R = ops.reshape(self._apart(recurrent_kernel), (H * D, 4 * H * D))
            self.R_transposed = ops.transpose(self.R)

    def _apart(self, R):
        """(H, D, 4, D) to (H, D, 4, H, D), zeros between heads."""
        H = self.shape[0]
        if H == 1:
            return R[:, :, :, None]
        return R[:, :, :, None] * ops.eye(H, dtype=R.dtype)[:, None, None, :, None]

    def gates(self, h):
        H, D, _, _ = self.shape
        if self.joined:
            return h @ self.R
        h = ops.reshape(h, (-1, H, D))
        return ops.reshape(ops.einsum("bhd,hdge->bghe", h, self.R), (-1, 4 * H * D))

    def back(self, dg):
        """The gradient of h."""
        H, D, _, _ = self.shape
        if self.joined:
            return dg @ self.R_transposed
        dg = ops.reshape(dg, (-1, 4, H, D))
        return ops.reshape(ops.einsum("bghe,hdge->bhd", dg, self.R), (-1, H * D))

    def kernel_gradient(self, h, dg):
        """A step's, or all steps', to be summed up and handed to `as_kernel`."""
        H, D, _, _ = self.shape
        if self.joined:
            return framework.turned(h) @ dg
        h, dg = ops.reshape(h, (-1, H, D)), ops.reshape(dg, (-1, 4, H, D))
        return ops.einsum("bhd,bghe->hdge", h, dg)

    def as_kernel(self, dR):
        H, D, _, _ = self.shape
        if not self.joined:
            return dR
        dR = ops.reshape(dR, (H, D, 4, H, D))
        if H > 1:
            dR = dR * ops.eye(H, dtype=dR.dtype)[:, None, None, :, None]
        return ops.sum(dR, axis=3)
