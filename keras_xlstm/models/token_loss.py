"""The loss of a language model in few passes over its logits, or without all of them at once."""

import contextvars
import inspect

import keras
from keras import ops

from keras_xlstm import backends

# In how many parts the running training step computes logits; 0: the model's call returns them.
_PARTS = contextvars.ContextVar("keras_xlstm_logit_parts", default=0)
_BATCH = 8  # where it is not known


def _without_padding(sample_weight, mask, loss):
    """The weights of tokens by which Keras leaves masked ones out of a loss."""
    weight = ops.cast(mask, loss.dtype)
    if loss.reduction != "sum":  # the mean is over the real ones
        count = ops.cast(ops.prod(ops.shape(weight)), loss.dtype)
        weight = weight * (count / (ops.sum(weight) + keras.config.epsilon()))
    return weight if sample_weight is None else weight * ops.cast(sample_weight, loss.dtype)


class _Given(keras.losses.Loss):
    """The mean, or whatever the reduction is, of losses that were computed elsewhere."""

    def call(self, y_true, y_pred):
        return y_pred


class TokenLoss:
    """What a `StackModel` with logits does about `SparseCategoricalCrossentropy(from_logits=True)`.

    In a training step of many logits, without metrics, the model's call ends before the head, and
    `compute_loss` computes head and loss some tokens at a time: `backends/head_loss.py`.
    """

    _token_losses = _ignored = None
    _plain_loss = False  # whether the loss is nothing but the tokens' cross-entropies
    _has_metrics = False
    _by_tokens = staticmethod(backends.head_loss.cross_entropy)

    def compile(self, *args, **kwargs):
        """`keras.Model.compile`."""
        super().compile(*args, **kwargs)
        given = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs).arguments
        config = self.loss.get_config() if isinstance(self.loss, keras.losses.Loss) else {}
        self._ignored = config.get("ignore_class")
        self._plain_loss = (
            given.get("loss_weights") is None
            and config.get("from_logits", False)
            and self._ignored is None
            and not config.get("label_smoothing")  # from Keras 3.16 on
        )
        metrics = [given.get(name) for name in ("metrics", "weighted_metrics")]
        self._has_metrics = any(x is not None for x in keras.tree.flatten(metrics))
        fast, self._by_tokens = backends.token_losses, backends.head_loss.cross_entropy
        if self._captured_step is not None:
            fast = self._captured_step.token_losses
            self._by_tokens = self._captured_step.compiled(backends.head_loss.cross_entropy)
        self._token_losses = fast if self._plain_loss else None

    def train_step(self, *arguments):
        """`keras.Model.train_step`."""
        token = _PARTS.set(self._parts(*keras.utils.unpack_x_y_sample_weight(arguments[-1])))
        try:
            return super().train_step(*arguments)
        finally:
            _PARTS.reset(token)

    def call(self, inputs, training=None, mask=None):
        if not _PARTS.get():
            return super().call(inputs, training=training, mask=mask)
        return self._before_head(inputs, training, mask)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """`keras.Model.compute_loss`."""
        backend = keras.backend.backend()
        mask = x.get("padding_mask") if isinstance(x, dict) else None
        mask = mask if self.settings["output_mask"] else None
        alike = self._tokens_count_alike(y, sample_weight, mask) and len(y_pred.shape) == 3
        if alike and mask is not None and (backend != "tensorflow" or _PARTS.get()):
            sample_weight = _without_padding(sample_weight, mask, self.loss)
        if _PARTS.get():
            return self._loss_of_features(y_pred, y, sample_weight)
        if alike and backend != "tensorflow":
            if backend == "torch":
                # As one row of tokens: over (batch, vocabulary, time) PyTorch's cross-entropy reads
                # across the vocabulary at strides, and was a third of the time of a training step.
                y, y_pred = ops.reshape(y, (-1,)), ops.reshape(y_pred, (-1, y_pred.shape[-1]))
                sample_weight = None if sample_weight is None else ops.reshape(sample_weight, (-1,))
            # Not while Keras works out shapes, which makes its own loss ready.
            ready = self._compile_loss.built if backend == "jax" else y_pred.device.type != "meta"
            if self._token_losses is not None and ready:
                return self._given_loss(y, y_pred, sample_weight)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _tokens_count_alike(self, y, sample_weight, mask):
        """Whether the loss is a mean over tokens that may stand in any order."""
        return (
            type(self.loss) is keras.losses.SparseCategoricalCrossentropy
            and self.loss.reduction in ("sum", "sum_over_batch_size", "mean")
            and (mask is None or self._ignored is None)  # Keras joins the two masks
            and len(y.shape) == 2
            and (sample_weight is None or tuple(sample_weight.shape) == tuple(y.shape))
        )

    def _given_loss(self, y, y_pred, sample_weight):
        """The loss by Keras, from the tokens' own, which are computed in fewer passes."""
        given = _Given(reduction=self.loss.reduction, dtype=self.loss.dtype)
        losses = self._token_losses(y_pred, y, self.loss.dtype)
        return given(losses, losses, sample_weight) + self._of_layers()

    def _of_layers(self):
        return sum(ops.sum(loss) for loss in self.losses)

    # ------------------------------------------------------------------ without all logits

    def _parts(self, x, y, sample_weight):
        """In how many parts a step computes logits; 0 where the loss or a metric wants them all."""
        head = self._head_layer()
        fits = (
            self._plain_loss
            and not self._has_metrics
            and self._is_unchanged()
            and getattr(head, "quantization_mode", None) is None
            and backends.whole_batch()
            and hasattr(y, "shape")
            and self._tokens_count_alike(y, sample_weight, None)
            and y.shape[1] is not None
        )
        if not fits:
            return 0
        count = backends.head_loss.parts(y.shape[0] or _BATCH, y.shape[1], self._outer_dim)
        return count if count > 1 else 0

    def _is_unchanged(self):
        """Whether no subclass looks at the logits."""
        names = {"call": TokenLoss, "compute_loss": TokenLoss, "compute_metrics": keras.Model}
        return all(getattr(type(self), name) is getattr(of, name) for name, of in names.items())

    def _head_layer(self):
        return self.get_layer("embedding" if self.settings["tie_embeddings"] else "head")

    def _before_head(self, inputs, training, mask):
        """What the head is given."""
        if "_features_model" not in self.__dict__:  # not by an attribute, which Keras would save
            x = self.outputs[0]
            for _ in range(1 if self.settings["logit_soft_cap"] is None else 2):
                operation, index, _ = x._keras_history
                (x,) = operation._inbound_nodes[index].input_tensors
            self.__dict__["_features_model"] = keras.Model(self.inputs, x)
        inputs = self._named(inputs)
        mask = None if mask is None else self._named(mask)[self._main]
        with self._side(inputs):
            return self._features_model(inputs[self._main], training=training, mask=mask)

    def _loss_of_features(self, features, y, sample_weight):
        head, dtype = self._head_layer(), self.loss.dtype
        turned = self.settings["tie_embeddings"]
        weights = ops.ones(ops.shape(y), dtype) if sample_weight is None else sample_weight
        total = backends.head_loss.loss_sum(
            ops.cast(features, head.compute_dtype), head.embeddings if turned else head.kernel,
            y, weights, self.settings["logit_soft_cap"], turned, _PARTS.get(), self._by_tokens,
            dtype,
        )  # fmt: skip
        if self.loss.reduction != "sum":
            total = total / ops.cast(ops.prod(ops.shape(y)), dtype)
        return total + self._of_layers()
