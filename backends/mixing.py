"""Block-diagonal products and the way back: the sLSTM's memory mixing, projections in blocks."""

from keras import ops
from keras_xlstm.backends.framework import framework


class Mixing:
    """What h of all heads, (..., U) with U = H * D, gives G gates, (..., G U) in the order gate,
    head, unit; and back. The kernel is (H, D, G, D).

    Heads of few units are multiplied as one kernel (U, G U) with zeros between heads: the products
    are small, and one of them is faster than one a head.
    """

    def __init__(self, recurrent_kernel, joined_heads=None):
        """`joined_heads`: up to how many units heads are multiplied as one kernel."""
        self.shape = H, D, G, _ = tuple(map(framework.size, recurrent_kernel.shape))
        if joined_heads is None:
            joined_heads = framework.joined_heads
        self.joined = H == 1 or (H * D <= joined_heads and framework.alone_on_device())
        self.R = recurrent_kernel
        if self.joined:
            self.R = ops.reshape(self._apart(recurrent_kernel), (H * D, G * H * D))
            self.R_transposed = ops.transpose(self.R)

    def _apart(self, R):
        """(H, D, G, D) to (H, D, G, H, D), zeros between heads."""
        H = self.shape[0]
        if H == 1:
            return R[:, :, :, None]
        return R[:, :, :, None] * ops.eye(H, dtype=R.dtype)[:, None, None, :, None]

    def gates(self, h):
        H, D, G, _ = self.shape
        if self.joined:
            return h @ self.R
        h = ops.reshape(h, (-1, H, D))
        return ops.reshape(ops.einsum("bhd,hdge->bghe", h, self.R), (-1, G * H * D))

    def back(self, dg):
        """The gradient of h."""
        H, D, G, _ = self.shape
        if self.joined:
            return dg @ self.R_transposed
        dg = ops.reshape(dg, (-1, G, H, D))
        return ops.reshape(ops.einsum("bghe,hdge->bhd", dg, self.R), (-1, H * D))

    def kernel_gradient(self, h, dg):
        """A step's, or all steps', to be summed up and handed to `as_kernel`."""
        H, D, G, _ = self.shape
        if self.joined:
            return framework.turned(h) @ dg
        h, dg = ops.reshape(h, (-1, H, D)), ops.reshape(dg, (-1, G, H, D))
        return ops.einsum("bhd,bghe->hdge", h, dg)

    def as_kernel(self, dR):
        H, D, G, _ = self.shape
        if not self.joined:
            return dR
        dR = ops.reshape(dR, (H, D, G, H, D))
        if H > 1:
            dR = dR * ops.eye(H, dtype=dR.dtype)[:, None, None, :, None]
        return ops.sum(dR, axis=3)


def block_diagonal(x, kernel):
    """x (B, T, U) times kernel (blocks, size, size), each of the blocks by itself; as one product
    with zeros between blocks. None where one product a block is faster."""
    if framework.size(x.shape[-1]) > framework.joined_blocks() or not framework.alone_on_device():
        return None
    return framework.differentiable(_one_product, _one_product_backward, (x, kernel))[0]


def _one_product(x, kernel, **_):
    y = Mixing(kernel[:, :, None], framework.size(x.shape[-1])).gates(x)
    return (y,), (x, kernel)


def _one_product_backward(residuals, gradients):
    (x, kernel), (dy,) = residuals, gradients
    U = framework.size(x.shape[-1])
    mixing = Mixing(kernel[:, :, None], U)
    dkernel = mixing.kernel_gradient(ops.reshape(x, (-1, U)), ops.reshape(dy, (-1, U)))
    return mixing.back(dy), mixing.as_kernel(dkernel)[:, :, 0]
