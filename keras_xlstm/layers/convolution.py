"""The causal convolution of the paper's blocks."""

import keras
import numpy as np
from keras import ops

from keras_xlstm import backends
from keras_xlstm.masks import newest_of_all, real_first
from keras_xlstm.validation import check_flag, check_positive


@keras.saving.register_keras_serializable(package="keras_xlstm")
class CausalConv1D(keras.layers.Layer):
    """Depthwise convolution over the present step and those before it, with a carried state.

    Masked steps are left out, as if they were not there; taps do not cross into another segment.

    Args:
        kernel_size: taps; the last is the present step.
        use_bias: whether each channel has a bias.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: (batch, time, channels).
        state: the kernel_size - 1 inputs before the first one, (batch, kernel_size - 1, channels).
        mask: (batch, time) bool or None.
        segment_ids: (batch, time) integers that never fall, 0 the state's segment; or None.

    Returns:
        Outputs of the shape of the inputs, those of masked steps without meaning; the new state.

    Example:

    >>> x, state = np.ones((2, 5, 8)), np.zeros((2, 3, 8))
    >>> y, state = keras_xlstm.layers.CausalConv1D(4)(x, state)
    >>> y.shape
    (2, 5, 8)
    """

    def __init__(self, kernel_size=4, use_bias=True, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_positive("kernel_size", kernel_size)
        self.supports_masking = True  # as an argument
        self.kernel_size = kernel_size
        self.use_bias = check_flag("use_bias", use_bias)

    def build(self, inputs_shape, state_shape=None):
        # What the official code's PyTorch layer draws.
        limit = self.kernel_size**-0.5
        uniform = keras.initializers.RandomUniform(-limit, limit)
        channels = inputs_shape[-1]
        self.kernel = self.add_weight(
            name="kernel", shape=(self.kernel_size, channels), initializer=uniform, autocast=False
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(channels,), initializer=uniform, autocast=False
            )

    def call(self, inputs, state, mask=None, segment_ids=None):
        before, dtype = self.kernel_size - 1, state.dtype
        x, stretches = ops.cast(inputs, self.compute_dtype), backends.own_stretch()
        if mask is not None:
            # Zeros: a tap's gradient would be 0 * NaN where padding holds NaN.
            x = ops.where(mask[:, :, None], x, ops.zeros_like(x))
        if stretches is not None and before:
            if segment_ids is not None:
                segment_ids = backends.since_entering(stretches, segment_ids)
            state, leaving = newest_of_all(
                stretches, x, ops.cast(state, x.dtype), mask, segment_ids
            )
        ids = segment_ids
        if mask is not None:  # real steps first, in their order
            order, count = real_first(mask)
            x = backends.steps_of(x, order)
            ids = None if ids is None else backends.steps_of(ids, order)
        padded = backends.concatenate_steps([ops.cast(state, x.dtype), x])
        if ids is not None:
            first = ops.zeros_like(padded[:, :before, 0], ids.dtype)
            padded_ids = backends.concatenate_steps([first, ids])

        kernel = ops.cast(self.kernel, self.compute_dtype)
        outputs = 0 if self.bias is None else ops.cast(self.bias, self.compute_dtype)
        time = ops.shape(inputs)[1]
        for tap in range(self.kernel_size):
            taken = padded[:, tap : tap + time]
            if ids is not None:
                same = padded_ids[:, tap : tap + time] == ids
                taken = ops.where(same[:, :, None], taken, ops.zeros_like(taken))
            outputs = outputs + taken * kernel[tap]

        if mask is None:
            end = ops.shape(padded)[1] if not before else None
            new_state = padded[:, -before or end :]
        else:
            # NumPy's: where jax2onnx traces, JAX's has no number to start from.
            last = count[:, -1:] + ops.convert_to_tensor(np.arange(before, dtype="int32"))
            new_state = backends.steps_of(padded, last)
            back = ops.maximum(count - 1, 0)
            outputs = backends.steps_of(outputs, back)
        if ids is not None and before:
            new_ids = padded_ids[:, -before:]
            if mask is not None:
                new_ids = backends.steps_of(padded_ids, last)
            same = new_ids == segment_ids[:, -1:]
            new_state = ops.where(same[:, :, None], new_state, ops.zeros_like(new_state))
        new_state = leaving if stretches is not None and before else new_state
        return outputs, ops.cast(new_state, dtype)

    def compute_mask(self, *arguments, **options):
        return None

    def get_config(self):
        config = {"kernel_size": self.kernel_size, "use_bias": self.use_bias}
        return {**super().get_config(), **config}
