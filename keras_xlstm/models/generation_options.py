"""What `generate` and `stream` are asked for, checked."""

import dataclasses
import numbers
from collections.abc import Callable

import numpy as np

from keras_xlstm.models.text_state import RECENT


def _whole(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _real(x):
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _ids(x, vocabulary_size):
    """Whether this is a list of at least one token id."""
    return (
        isinstance(x, (list, tuple, np.ndarray))
        and getattr(x, "ndim", 1) == 1
        and len(x) > 0
        and all(_whole(token) and 0 <= token < vocabulary_size for token in x)
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of these names. Raises a ValueError where one is not what it must be."""

    vocabulary_size: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | np.random.Generator | None
    num_samples: int
    stop_token: int | list | None
    stop_sequences: list | None
    logits_processor: Callable | None
    return_log_probs: bool
    return_state: bool
    jit_compile: bool | str

    def __post_init__(self):
        for name, (fits, expected) in self._expected().items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")

    def _expected(self):
        """{name: (whether a value fits, what is expected)}."""
        size = self.vocabulary_size
        flag = (lambda x: isinstance(x, bool), "True or False")

        def sequences(x):
            return isinstance(x, (list, tuple)) and all(
                _ids(ids, size) and len(ids) <= RECENT for ids in x
            )

        def optional(fits, expected):
            return lambda x: x is None or fits(x), f"{expected}, or None"

        return {
            "max_new_tokens": (lambda x: _whole(x) and x >= 0, "an integer >= 0"),
            "temperature": (
                lambda x: _real(x) and 0 <= x < float("inf"), "a number >= 0, 0 for greedy",
            ),
            "top_k": optional(
                lambda x: _whole(x) and 1 <= x <= size,
                f"an integer from 1 to the vocabulary's {size}",
            ),
            "top_p": optional(lambda x: _real(x) and 0 < x <= 1, "a number above 0, at most 1"),
            "min_p": optional(lambda x: _real(x) and 0 < x <= 1, "a number above 0, at most 1"),
            "repetition_penalty": optional(
                lambda x: _real(x) and 0 < x < float("inf"),
                "a number above 0, above 1 against repetition",
            ),
            "seed": optional(
                lambda x: (_whole(x) and x >= 0) or isinstance(x, np.random.Generator),
                "an integer >= 0, a numpy.random.Generator",
            ),
            "num_samples": (lambda x: _whole(x) and x >= 1, "an integer >= 1"),
            "stop_token": optional(
                lambda x: _ids(x if isinstance(x, (list, tuple, np.ndarray)) else [x], size),
                f"a token id from 0 to {size - 1}, a list of such",
            ),
            "stop_sequences": optional(
                lambda x: sequences(x) and len(x) > 0,
                f"a list of lists of token ids from 0 to {size - 1}, each of 1 to {RECENT} ids, "
                "such as [[7, 8]]",
            ),
            "logits_processor": optional(callable, "a function of (step, logits)"),
            "return_log_probs": flag,
            "return_state": flag,
            "jit_compile": (
                lambda x: isinstance(x, bool) or (isinstance(x, str) and x == "auto"),
                '"auto", True or False',
            ),
        }  # fmt: skip

    @property
    def stops(self):
        """The sequences that end a text, as arrays."""
        single = [] if self.stop_token is None else np.ravel(self.stop_token)
        return [np.array(ids) for ids in ([[t] for t in single] + list(self.stop_sequences or []))]
