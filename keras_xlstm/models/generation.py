"""Continuing prompts: `generate` and `stream`."""

import itertools
from collections import namedtuple

import numpy as np
from keras import ops

from keras_xlstm import backends
from keras_xlstm.models import sampling
from keras_xlstm.models.continuation import AT_ONCE, Continuation
from keras_xlstm.models.generation_options import Options
from keras_xlstm.models.step_weights import StepWeights

# `read` and `advance` give logits, `pick` a token of them, and `step` is both of these at once.
Compiled = namedtuple("Compiled", "read advance pick step")


class Generates:
    """`generate` and `stream` for a model with `run`, `logits` and `get_initial_state`."""

    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=None,
        stop_token=None,
        jit_compile="auto",
        min_p=None,
        repetition_penalty=None,
        stop_sequences=None,
        num_samples=1,
        logits_processor=None,
        return_log_probs=False,
        state=None,
        return_state=False,
    ):
        """Continues prompts, all at once.

        The prompts, of any lengths, are read in one parallel pass; then every token is one
        compiled step whose time and memory do not depend on how much came before.

        What is drawn from: the model's logits, by `repetition_penalty`, `logits_processor`,
        `temperature`, `top_k`, `top_p` and `min_p`, in this order. Each sees what those before it
        left.

        Args:
            prompts: a list of lists of token ids, of any lengths, or an array (batch, time). With
                a `state`, what comes next, which may be empty.
            max_new_tokens: how many tokens to add to each.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: draw from the k most likely tokens alone; None draws from all.
            top_p: draw from the most likely tokens that together reach this probability alone;
                None draws from all.
            seed: integer: the same draws on every backend, from the first new token on; None draws
                new numbers at every call. A `numpy.random.Generator` draws on from call to call.
            stop_token: an id, or a list of ids. A text ends with the first of these tokens.
            jit_compile: how the step is compiled. `"auto"`: JAX, XLA; TensorFlow, a graph; PyTorch,
                on a CUDA device a CUDA graph, recorded at the third token, and compiled blocks if
                `model.compile` was given `jit_compile=True`. True: XLA on TensorFlow; on PyTorch
                torch.compile makes one block of each kind for all of them, which needs a C++
                compiler and up to a minute for each kind and batch size. False: not compiled
                (TensorFlow: a graph).
            min_p: draw from tokens at least this times as likely as the likeliest alone
                ([Nguyen et al.](https://arxiv.org/abs/2407.01082)); None draws from all.
            repetition_penalty: above 1, makes all tokens of the prompt, the state's text and the
                continuation less likely: it divides their logits above 0 and multiplies those below
                ([CTRL](https://arxiv.org/abs/1909.05858), section 4.1). None does not.
            stop_sequences: lists of at most 64 token ids. A text that ends with one is done. It may
                begin in the prompt, or in the state's text; its last token is a new one.
            num_samples: how many continuations of each prompt, which is read once.
            logits_processor: a function of the step, 0 for the first new token, and the logits
                (batch * num_samples, vocabulary_size), float32, a tensor of the backend. It returns
                such logits, as a tensor or a NumPy array: -inf for tokens that may not come. It
                runs as plain Python between two compiled parts of the step, never traced, so it may
                keep things; a step then takes longer, as none can begin before it.
            return_log_probs: return the logarithm of each new token's probability, too. It is the
                model's own, before penalty, processor, temperature and filters.
            state: what an earlier call with `return_state=True` returned last, of one row for all
                prompts or of a row for each. It stays as it is, and can be gone on from again.
            return_state: return the state after the last token, too.

        Returns:
            A list of int32 arrays: each prompt followed by its continuation. `num_samples`
            continuations of one prompt follow one another. If asked for, a tuple of this list, a
            list of float32 arrays, log probabilities of the new tokens, and the state.

            The state is a dict of tensors with a row for each text, of a size that does not depend
            on its length: `"blocks"`, as `run` takes it, after all tokens but the last; `"recent"`
            (batch, 64), int32, the last tokens, -1 for none; `"seen"` (batch, vocabulary_size),
            bool, which tokens the text has. A text that was done is at its own end. Seeds, draws
            and options are not in it.

        Raises:
            ValueError: for empty prompts without a state, token ids out of range, options out of
                range, the state of another model, and what `logits_processor` must not return.

        Example:

        >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
        >>> [len(text) for text in model.generate([[1, 2, 3], [4]], 5, temperature=0)]
        [8, 6]
        >>> _, state = model.generate([[1, 2, 3]], 0, return_state=True)
        >>> [len(text) for text in model.generate([[4], [5, 6], []], 5, state=state)]
        [6, 7, 5]
        """
        continuation, prompts = self._continuation(
            prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile,
            min_p, repetition_penalty, stop_sequences, num_samples, logits_processor,
            return_log_probs, state, return_state, at_once=AT_ONCE,
        )  # fmt: skip
        counts, parts = continuation.counts, []
        while some := list(itertools.islice(continuation, AT_ONCE)):
            columns = zip(*some, strict=True) if return_log_probs else [some]
            parts.append([np.stack(column, axis=1) for column in columns])
        dtypes = ("int32", "float32") if return_log_probs else ("int32",)
        parts = [[np.zeros((len(counts), 0), dtype) for dtype in dtypes], *parts]
        columns = [np.concatenate(column, axis=1) for column in zip(*parts, strict=True)]
        new, *rest = ([x[:n] for x, n in zip(rows, counts, strict=True)] for rows in columns)
        prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        texts = [np.concatenate([p, n]) for p, n in zip(prompts, new, strict=True)]
        if return_state:
            rest.append(continuation.state)
        return (texts, *rest) if rest else texts

    def stream(
        self,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=None,
        stop_token=None,
        jit_compile="auto",
        min_p=None,
        repetition_penalty=None,
        stop_sequences=None,
        num_samples=1,
        logits_processor=None,
        return_log_probs=False,
        state=None,
        return_state=False,
    ):
        """Like `generate`, but yields every step's new tokens at once.

        All arguments are those of `generate`, except one.

        Args:
            return_state: keep the state. The iterator that this returns has it as `state`, after
                every token: after a `break`, too.

        Yields:
            One int32 array (batch * num_samples,) per token, or, with `return_log_probs`, a pair of
            it and a float32 array of the same shape. A text that is done repeats its last token,
            with a log probability of 0; the iterator ends when all are.

        Example:

        >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
        >>> for tokens in model.stream([[1, 2, 3]], max_new_tokens=2):
        ...     print(tokens.shape)
        (1,)
        (1,)
        """
        return self._continuation(
            prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile,
            min_p, repetition_penalty, stop_sequences, num_samples, logits_processor,
            return_log_probs, state, return_state,
        )[0]  # fmt: skip

    # ------------------------------------------------------------------ checks

    def _continuation(
        self, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile,
        min_p, repetition_penalty, stop_sequences, num_samples, logits_processor,
        return_log_probs, state, return_state, at_once=1,
    ):  # fmt: skip
        """Checked, and with the prompts as arrays."""
        prompts = self._prompts(prompts, allow_empty=state is not None)
        options = Options(
            self.settings["vocabulary_size"], max_new_tokens, temperature, top_k, top_p, min_p,
            repetition_penalty, seed, num_samples, stop_token, stop_sequences, logits_processor,
            return_log_probs, return_state, jit_compile,
        )  # fmt: skip
        return Continuation(self, prompts, state, options, at_once), prompts

    def _prompts(self, prompts, allow_empty):
        """Integer arrays, one per prompt, checked."""
        if backends.shares_time():
            raise ValueError(
                "Tokens are generated one after another: time cannot be shared out among devices. "
                "Received: generate or stream under ContextParallel or context_parallel. Call it "
                "outside; on JAX, after keras.distribution.set_distribution(None)."
            )
        vocabulary_size = self.settings["vocabulary_size"]
        if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not len(prompts):
            raise ValueError(
                "`prompts` must be a list of at least one list of token ids. "
                f"Received: {type(prompts).__name__} {str(prompts)[:40]!r}. Tokenize text first."
            )
        arrays = []
        for index, prompt in enumerate(prompts):
            array = np.asarray(prompt)
            if allow_empty and array.shape == (0,):
                arrays.append(array.astype("int32"))
                continue
            if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    "Every prompt must be a list of at least one integer token id. "
                    f"Received: prompt {index} of shape {array.shape} and dtype {array.dtype}. "
                    "Give a prompt without text the token that starts a document; with a `state` "
                    "prompts may be empty."
                )
            if array.min() < 0 or array.max() >= vocabulary_size:
                wrong = array[(array < 0) | (array >= vocabulary_size)][0]
                raise ValueError(
                    f"Token ids must be from 0 to {vocabulary_size - 1}, the model's vocabulary. "
                    f"Received: {wrong} in prompt {index}."
                )
            arrays.append(array.astype("int32"))
        return arrays

    # ------------------------------------------------------------------ steps

    def _compiled(self, plan, jit_compile):
        """The functions of a plan, kept until the model's variables are others."""
        asked = self._compiles_steps if jit_compile == "auto" else jit_compile
        compiles = asked and backends.captured_train_step is not None
        key = (plan, jit_compile, compiles, backends.prefer("auto"))
        ids = [id(variable) for variable in self.variables]
        of, weights, kept = self.__dict__.get("_generation", (None, None, {}))
        if of != ids:  # what quantize replaced is not held in memory
            weights, kept = StepWeights(self), {}
            self.__dict__["_generation"] = ids, weights, kept
        weights.refresh()
        if key not in kept:
            runners = backends.block_runners(self.blocks) if compiles else None
            kept[key] = self._functions(plan, weights, jit_compile, runners)
        return kept[key]

    def _functions(self, plan, weights, jit_compile, runners):
        """Compiled. A step's state is that of the blocks and, if tokens are penalised for it, which
        ones each row has had."""

        def logits_of(features):
            return ops.cast(self.logits(features), "float32")

        def read(blocks, tokens, last, mask=None):
            # No state is a fresh one.
            features, blocks = self._features(tokens, blocks or None, mask)
            features = ops.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
            return logits_of(features), blocks

        def advance(state, tokens, *given):
            """The model's own logits, and those with the penalty."""
            given, (before, *seen) = dict(zip(plan.names, given, strict=True)), state
            alive = given.get("alive")  # other rows keep their state
            mask = None if alive is None else alive[:, None]
            features, blocks = self._features(tokens[:, None], before, mask, runners)
            own = weighed = logits_of(features[:, 0])
            if seen:
                seen = [sampling.mark(seen[0], tokens)]
                weighed = sampling.penalized(own, seen[0], given["penalty"])
            return (own, weighed), [blocks, *seen]

        def pick(nothing, own, weighed, *given):
            given = dict(zip(plan.names, given, strict=True))
            given = {name: given.get(name) for name in ("draw", "temperature", "top_p", "min_p")}
            tokens = sampling.choose(weighed, top_k=plan.top_k, **given)
            log_probs = [sampling.log_probs(own, tokens)] if plan.log_probs else []
            return [tokens, *log_probs], nothing

        def step(state, tokens, *given):
            logits, state = advance(state, tokens, *given)
            return pick([], *logits, *given)[0], state

        return Compiled(
            backends.compiled(read, weights, jit_compile, kind="read"),
            backends.compiled(advance, weights, jit_compile, kind="step"),
            backends.compiled(pick, None, jit_compile),
            backends.compiled(step, weights, jit_compile, kind="step"),
        )

    def _features(self, tokens, state, mask, runners=None):
        """`run`, by `runners`, or without what `model.compile` compiled: to compile a block for
        every length of a prompt would take minutes."""
        if runners is not None:
            x = self.get_layer("embedding")(tokens)
            return self._run_blocks(x, state, mask, runners=runners)
        with self._run_by():
            return self.run(tokens, state, mask)
