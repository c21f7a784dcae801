"""xLSTMLanguageModel: token ids to logits, and generation."""

import functools
import inspect

import keras
import numpy as np

from keras_xlstm import backends, initializers
from keras_xlstm.layers.base import plain
from keras_xlstm.layers.projections import unfused_dense
from keras_xlstm.layers.soft_cap import SoftCap, soft_cap
from keras_xlstm.models.generation import Generates
from keras_xlstm.models.graph import stacked
from keras_xlstm.models.settings import ARGUMENTS, settings_of
from keras_xlstm.models.stack import StackModel
from keras_xlstm.models.token_loss import TokenLoss
from keras_xlstm.validation import check_cap, check_flag, check_positive, check_rate


def _checked(method):
    """A method of `keras.Model` that checks token ids, and labels where it takes some, first."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        self._check_ids(given.get("x"))
        self._check_labels(given.get("y"))
        if isinstance(validation := given.get("validation_data"), (tuple, list)):
            self._check_ids(validation[0])
            self._check_labels(validation[1])
        return method(self, *args, **kwargs)

    return checked


@keras.saving.register_keras_serializable(package="keras_xlstm")
class xLSTMLanguageModel(Generates, TokenLoss, StackModel):
    """A language model of xLSTM blocks: embedding, `xLSTMStack`'s blocks and norm, head.

    A functional model: [xLSTM: Extended Long Short-Term Memory](https://arxiv.org/abs/2405.04517),
    [xLSTM 7B](https://arxiv.org/abs/2503.13427). `keras_xlstm.models.configs` has the published
    sizes. `generate` and `stream` continue prompts with constant memory per token.

    Args:
        vocabulary_size: token ids are from 0 to vocabulary_size - 1.
        units: width of the model.
        {arguments}
        embedding_dropout: fraction of the embedded features to drop.
        tie_embeddings: read the logits off the embedding's own matrix; otherwise a Dense does.
        logit_soft_cap: bounds the logits x to cap * tanh(x / cap); None does not. 7B: 30.

    Inputs: token ids (batch, time), integers, or a dict of arrays (batch, time): `"token_ids"`;
    if wanted `"padding_mask"`, True for real tokens; if wanted `"segment_ids"`, integers that
    change where a packed document begins.

    Output: logits (batch, time, vocabulary_size) in the compute dtype.

    Raises:
        ValueError: where an argument cannot be honoured.

    Example:

    >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=2, pattern="1:1")
    >>> model(np.array([[72, 101, 108]])).shape
    (1, 3, 256)
    >>> [continued] = model.generate([[72, 101, 108]], max_new_tokens=5)
    >>> len(continued)
    8
    """

    _main = "token_ids"

    def __init__(
        self,
        vocabulary_size,
        units,
        num_blocks,
        num_heads=4,
        architecture="paper",
        pattern=None,
        slstm_at=None,
        mlstm_options=None,
        slstm_options=None,
        dropout=0.0,
        final_norm=True,
        seed=None,
        remat=False,
        use_kernel="auto",
        dtype=None,
        name=None,
        embedding_dropout=0.0,
        tie_embeddings=False,
        logit_soft_cap=None,
        output_mask=True,
    ):
        check_positive("vocabulary_size", vocabulary_size)
        settings = settings_of(
            units, num_blocks, num_heads, architecture, pattern, slstm_at, mlstm_options,
            slstm_options, dropout, final_norm, seed, remat, use_kernel, dtype, output_mask,
        )  # fmt: skip
        settings = {
            "vocabulary_size": vocabulary_size,
            **settings,
            "embedding_dropout": check_rate("embedding_dropout", embedding_dropout),
            "tie_embeddings": check_flag("tie_embeddings", tie_embeddings),
            "logit_soft_cap": check_cap("logit_soft_cap", logit_soft_cap),
        }
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        with plain():
            embedding = self._embedding(settings)
            x = embedding(token_ids)
            if embedding_dropout:
                x = keras.layers.Dropout(embedding_dropout, seed=seed, name="embedding_dropout")(x)
        x = stacked(settings, x)
        with plain():
            x = self._head(settings, embedding, x)
        super().__init__(inputs=token_ids, outputs=x, name=name)
        self.settings = settings
        self._outer_dim = vocabulary_size

    @staticmethod
    def _embedding(settings):
        embed = keras.layers.Embedding
        if settings["tie_embeddings"]:
            embed = keras.layers.ReversibleEmbedding
        embedding = embed(
            settings["vocabulary_size"],
            settings["units"],
            embeddings_initializer=initializers.SmallInit(settings["units"]),
            dtype=settings["dtype"],
            name="embedding",
        )
        embedding.supports_masking = True  # it acts on every step by itself, in both directions
        return embedding

    @staticmethod
    def _head(settings, embedding, x):
        """Symbolic logits of features."""
        if settings["tie_embeddings"]:
            x = embedding(x, reverse=True)
        else:
            x = keras.layers.Dense(
                settings["vocabulary_size"],
                use_bias=False,
                kernel_initializer=initializers.SmallInit(settings["units"]),
                dtype=settings["dtype"],
                name="head",
            )(x)
        if settings["logit_soft_cap"] is not None:
            x = SoftCap(settings["logit_soft_cap"], dtype=settings["dtype"], name="soft_cap")(x)
        return x

    # ------------------------------------------------------------------ checks

    def _check_ids(self, inputs):
        """Of NumPy arrays: what is on a device would have to be fetched for it."""
        ids = inputs.get("token_ids") if isinstance(inputs, dict) else inputs
        if not isinstance(ids, np.ndarray) or not ids.size:
            return
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"Token ids must be integers. Received: dtype {ids.dtype}. Use ids.astype('int32')."
            )
        lowest, highest = ids.min(), ids.max()
        if lowest < 0 or highest >= self.settings["vocabulary_size"]:
            raise ValueError(
                f"Token ids must be from 0 to {self.settings['vocabulary_size'] - 1}, the model's "
                f"vocabulary. Received: ids from {lowest} to {highest}."
            )

    def _check_labels(self, y):
        """Of labels that the loss looks up among the vocabulary's: one beyond it would count as a
        loss of 0 on JAX, and as anything elsewhere."""
        losses = (keras.losses.SparseCategoricalCrossentropy, "sparse_categorical_crossentropy")
        loss = getattr(self, "loss", None)
        if not (isinstance(loss, losses[0]) or loss == losses[1]):
            return
        y = backends.host_values(y) if hasattr(y, "dtype") else None
        if y is None or not y.size or y.dtype.kind not in "iuf":
            return
        y = y if self._ignored is None else y[y != self._ignored]
        if y.size and (y.min() < 0 or y.max() >= self.settings["vocabulary_size"]):
            raise ValueError(
                f"Labels must be token ids from 0 to {self.settings['vocabulary_size'] - 1}, the "
                f"model's vocabulary. Received: labels from {y.min()} to {y.max()}. For labels "
                "that are to be left out, such as -100, compile with keras.losses."
                "SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)."
            )

    def __call__(self, inputs, *args, **kwargs):
        self._check_ids(inputs)
        return super().__call__(inputs, *args, **kwargs)

    fit, train_on_batch = _checked(StackModel.fit), _checked(keras.Model.train_on_batch)
    evaluate, test_on_batch = _checked(keras.Model.evaluate), _checked(keras.Model.test_on_batch)
    predict, predict_on_batch = (
        _checked(keras.Model.predict), _checked(keras.Model.predict_on_batch)
    )  # fmt: skip

    # ------------------------------------------------------------------ in parts

    def run(self, token_ids, state, padding_mask=None, segment_ids=None):
        """Features of all tokens from a state, and the new state: `(features, state)`.

        Args:
            token_ids: (batch, time).
            state: as `get_initial_state(batch)` or an earlier call gives it; None starts empty.
            padding_mask, segment_ids: as in the inputs, or None.

        Returns:
            Features (batch, time, units), for `logits`, and the state.
        """
        self._check_ids(token_ids)
        x = self.get_layer("embedding")(token_ids)
        return self._run_blocks(x, state, padding_mask, segment_ids)

    def logits(self, features):
        """Features (..., units) to logits (..., vocabulary_size)."""
        if self.settings["tie_embeddings"]:
            logits = self.get_layer("embedding")(features, reverse=True)
        elif (head := self.get_layer("head")).quantization_mode:
            (logits,) = unfused_dense(features, head)
        else:
            logits = head(features)
        return soft_cap(logits, self.settings["logit_soft_cap"])


xLSTMLanguageModel.__doc__ = xLSTMLanguageModel.__doc__.replace("{arguments}", ARGUMENTS)
