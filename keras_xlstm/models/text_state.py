"""The state of a text: all that the tokens after it depend on, of a size that never grows."""

import keras
import numpy as np
from keras import ops

RECENT = 64  # tokens that a stop sequence may have


class Words:
    """What later tokens depend on beside the blocks' states, for every row, as NumPy arrays.

    `recent` (B, RECENT): the last tokens, -1 where the text is shorter. `seen` (B, V): whether the
    text has the token, or None where nobody asks.
    """

    def __init__(self, recent, seen):
        self.recent, self.seen = recent, seen

    @classmethod
    def none(cls, rows, vocabulary_size):
        return cls(np.full((rows, RECENT), -1, "int32"), np.zeros((rows, vocabulary_size), bool))

    def repeated(self, count):
        return Words(np.repeat(self.recent, count, 0), np.repeat(self.seen, count, 0))

    def after(self, texts):
        """With a text more in every row."""
        recent = [np.append(r, t)[-RECENT:] for r, t in zip(self.recent, texts, strict=True)]
        seen = self.seen.copy()
        for row, text in zip(seen, texts, strict=True):
            row[text] = True
        return Words(np.stack(recent), seen)

    def add(self, tokens, rows):
        """A token more in some `rows`, in place."""
        self.recent[rows, :-1] = self.recent[rows, 1:]
        self.recent[rows, -1] = tokens[rows]
        if self.seen is not None:
            self.seen[rows, tokens[rows]] = True

    def ended(self, sequences):
        """Whether the text ends with one of these (B,)."""
        ends = np.zeros(len(self.recent), bool)
        for ids in sequences:
            ends |= (self.recent[:, -len(ids) :] == ids).all(1)
        return ends


def packed(blocks, words):
    """The state as users have it."""
    host = {"recent": words.recent, "seen": words.seen}
    return {"blocks": blocks, **{k: ops.convert_to_tensor(x) for k, x in host.items()}}


def unpacked(state, model, prompts):
    """Blocks' states, copied, and words of a user's state, for as many rows as prompts."""
    names, vocabulary_size = ("blocks", "recent", "seen"), model.settings["vocabulary_size"]
    if not isinstance(state, dict) or {*state} != {*names}:
        raise ValueError(
            "`state` must be what generate(..., return_state=True) returned last, a dict of "
            f"{', '.join(map(repr, names))}. Received: "
            f"{sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__}."
        )
    fresh = model.get_initial_state(1)
    want = [((1, RECENT), "int32"), ((1, vocabulary_size), "bool")]
    want += [(x.shape, x.dtype) for x in keras.tree.flatten(fresh)]
    given = [state["recent"], state["seen"], *keras.tree.flatten(state["blocks"])]
    want, got = [_kinds(x) for x in want], [_kinds((x.shape, x.dtype)) for x in given]
    if got != want:
        differ = [pair for pair in zip(got, want, strict=False) if pair[0] != pair[1]]
        detail = "{} where {} is expected (a row's shape, the dtype)".format(
            *(differ[0] if differ else (f"{len(got)} tensors", len(want)))
        )
        raise ValueError(
            "`state` must be of a model with the same settings: it does not fit this one. "
            f"Received: {detail}."
        )
    rows = {x.shape[0] for x in given}
    if len(rows) > 1 or not rows <= {1, len(prompts)}:
        raise ValueError(
            "`state` must have one row for all prompts, or a row for each. Received: "
            f"{' and '.join(map(str, sorted(rows)))} rows, for {len(prompts)} prompts. Rows are "
            "taken by keras.tree.map_structure(lambda x: x[rows], state)."
        )
    words = Words(*(np.array(ops.convert_to_numpy(x)) for x in given[:2]))
    if words.recent.min() < -1 or words.recent[:, -1].min() < 0:
        raise ValueError(
            'state["recent"] must end with a token id in every row. '
            f"Received: {words.recent[:, -3:].tolist()}, of each row the last three."
        )
    # Copies: compiled steps use up what they are given.
    blocks = [ops.copy(ops.convert_to_tensor(x)) for x in given[2:]]
    if rows != {len(prompts)}:
        words = words.repeated(len(prompts))
        blocks = [ops.repeat(x, len(prompts), axis=0) for x in blocks]
    return keras.tree.pack_sequence_as(fresh, blocks), words


def _kinds(tensor):
    shape, dtype = tensor
    return tuple(shape[1:]), keras.backend.standardize_dtype(dtype)
