"""New tokens, step by step: one parallel pass over what is unread, then a step per token."""

import itertools
from collections import namedtuple

import keras
import numpy as np
from keras import ops

from keras_xlstm import backends
from keras_xlstm.models import sampling
from keras_xlstm.models.text_state import Words, packed, unpacked

# What functions are compiled for. `names`: of the tensors that are given beside tokens.
Plan = namedtuple("Plan", "names top_k log_probs")
AT_ONCE = 256  # steps that are made before the first of them is fetched


class Continuation:
    """An iterator over the new tokens of all rows, as NumPy arrays (batch,).

    With `return_log_probs` each item is a pair, of the tokens and their log probabilities (batch,).
    `state` is that of the text up to the last item, `counts` how many new tokens each row has.
    """

    def __init__(self, model, prompts, state, options, at_once=1):
        self._options, samples = options, options.num_samples
        if state is None:
            self._unread, self._blocks = prompts, []  # a fresh state
            words = Words.none(len(prompts), options.vocabulary_size)
        else:  # which has not read its last token: so there is one to go on from
            self._blocks, words = unpacked(state, model, prompts)
            last = words.recent[:, -1:]
            self._unread = [np.append(x, p) for x, p in zip(last, prompts, strict=True)]
        self._words = words.after(prompts).repeated(samples)
        self._carried, self._stops = None, options.stops
        self._done = np.zeros(len(prompts) * samples, bool)
        self.counts = np.zeros(len(self._done), int)
        self._holds = options.return_state and bool(self._stops)
        self._rng = np.random.default_rng(options.seed)
        names, self._fixed = self._planned()
        plan = Plan(names, options.top_k if options.temperature else None, options.return_log_probs)
        self._run = model._compiled(plan, options.jit_compile)
        # Where Python decides what the next step does, no step may be ahead of it.
        waits = bool(self._stops) or options.logits_processor is not None
        self._items = self._settled(1 if waits else at_once)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._items)

    @property
    def state(self):
        """What `state=` of `generate` and `stream` goes on from."""
        if not self._options.return_state:
            raise ValueError(
                "A text's state is kept where it is asked for. Received: return_state=False. "
                "Use stream(..., return_state=True)."
            )
        carried = self._carried
        if carried is None:  # no step was made
            blocks = keras.tree.map_structure(ops.copy, self._blocks)
            _, carried = self._read([text[:-1] for text in self._unread], blocks)
        return packed(backends.state_copy(carried)[0], self._words)

    # ------------------------------------------------------------------ what steps are given

    def _planned(self):
        """Names of all tensors that a step is given, and those that stay."""
        o, fixed = self._options, {}
        if o.temperature:
            fixed = {"temperature": o.temperature, "top_p": o.top_p, "min_p": o.min_p}
        fixed["penalty"] = o.repetition_penalty
        fixed = {name: x for name, x in fixed.items() if x is not None}
        names = ["draw"] * (o.temperature > 0) + ["alive"] * self._holds
        # Tensors: Python numbers would be compiled in.
        tensors = [ops.convert_to_tensor(np.float32(x)) for x in fixed.values()]
        return (*names, *fixed), tensors

    def _given(self):
        given = []
        if self._options.temperature:
            given.append(self._rng.random((len(self._done), 1), "float32"))
        if self._holds:
            given.append(~self._done)
        return [*map(ops.convert_to_tensor, given), *self._fixed]

    # ------------------------------------------------------------------ on the device

    def _read(self, texts, blocks):
        """Logits after texts, which are read in one pass, and the state: both for each sample."""
        lengths = np.array([len(text) for text in texts])
        tokens = np.zeros((len(texts), sampling.bucket(lengths.max())), "int32")
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = np.concatenate(texts)
        last = np.maximum(lengths - 1, 0).astype("int32")
        arrays = [tokens, last] if mask.all() else [tokens, last, mask]
        arrays = map(ops.convert_to_tensor, arrays)
        logits, blocks = self._run.read(blocks, *arrays)
        if (count := self._options.num_samples) > 1:
            logits = ops.repeat(logits, count, axis=0)
            blocks = keras.tree.map_structure(lambda x: ops.repeat(x, count, axis=0), blocks)
        penalizes = self._options.repetition_penalty is not None
        return logits, [blocks, *[ops.convert_to_tensor(self._words.seen)] * penalizes]

    def _outputs(self):
        """Of every step the tokens, and their log probabilities if asked for, as tensors."""
        processor, output = self._options.logits_processor, None
        for step in range(self._options.max_new_tokens):
            given = self._given()
            if step and processor is None:
                output, self._carried = self._run.step(self._carried, output[0], *given)
            else:
                if step:
                    logits, self._carried = self._run.advance(self._carried, output[0], *given)
                else:
                    logits = self._first_logits()
                if processor is not None:
                    logits = logits[0], _processed(processor, step, logits[1])
                output, _ = self._run.pick([], *logits, *given)
            yield output

    def _first_logits(self):
        """After what is unread: the model's own, and those with the penalty."""
        own, self._carried = self._read(self._unread, self._blocks)
        self._blocks = None  # used up
        if (penalty := self._options.repetition_penalty) is None:
            return own, own
        return own, sampling.penalized(own, self._carried[1], np.float32(penalty))

    # ------------------------------------------------------------------ on the host

    def _settled(self, at_once):
        """The items. A row that is done repeats its last token, with a log probability of 0."""
        outputs, keeps = self._outputs(), self._stops or self._options.return_state
        # Fetched some at a time: no step waits for the one before to arrive here, and a long text
        # does not fill the device with arrays of a few bytes.
        while some := list(itertools.islice(outputs, at_once)):
            for output in some:
                tokens, *log_probs = (np.array(ops.convert_to_numpy(x)) for x in output)
                done = self._done
                self.counts += ~done
                if keeps:
                    tokens[done] = self._words.recent[done, -1]
                    for x in log_probs:
                        x[done] = 0
                    self._words.add(tokens, ~done)
                    self._done = done | self._words.ended(self._stops)
                yield (tokens, *log_probs) if log_probs else tokens
                if self._done.all():
                    return


def _processed(processor, step, logits):
    """What a user's function makes of logits, checked."""
    # A copy: functions of PyTorch's users write into what they are given.
    new = processor(step, ops.copy(logits))
    shape, dtype = getattr(new, "shape", None), getattr(new, "dtype", None)
    if shape is None or tuple(shape) != tuple(logits.shape):
        raise ValueError(
            "`logits_processor` must return logits of the shape that it was given, "
            f"{tuple(logits.shape)}. Received: "
            f"{type(new).__name__ if shape is None else f'shape {tuple(shape)}'}."
        )
    if "float" not in keras.backend.standardize_dtype(dtype):
        raise ValueError(
            "`logits_processor` must return logits, floating-point numbers, not a mask or ids. "
            f"Received: dtype {keras.backend.standardize_dtype(dtype)}."
        )
    new = ops.cast(ops.convert_to_tensor(new), logits.dtype)
    possible = ops.all(new < np.inf, axis=-1) & ops.any(new > -np.inf, axis=-1)
    possible = ops.convert_to_numpy(possible)
    if not possible.all():
        raise ValueError(
            "`logits_processor` must leave each row a token that may come: finite logits, or -inf "
            "for what may not, and neither NaN nor inf. Received: none, or NaN or inf, in row "
            f"{int(np.argmin(possible))} at step {step}."
        )
    return new
