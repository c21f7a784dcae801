"""Continuing prompts: one parallel pass over them, then one compiled step per token."""

import numbers

import numpy as np
from keras import ops

from keras_xlstm import backends
from keras_xlstm.layers.block import run_plain
from keras_xlstm.models import sampling


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
    ):
        """Continues prompts, all at once.

        The prompts, of any lengths, are read in one parallel pass; then every token is one
        compiled step whose time and memory do not depend on how much came before.

        Args:
            prompts: a list of lists of token ids, of any lengths, or an array (batch, time).
            max_new_tokens: how many tokens to add to each.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: draw from the k most likely tokens alone; None draws from all.
            top_p: draw from the most likely tokens that together reach this probability alone;
                None draws from all.
            seed: integer: the same draws on every backend; None draws anew at every call.
            stop_token: a prompt that gets this token is done, and ends with it.
            jit_compile: how the step is compiled. `"auto"`: JAX, XLA; TensorFlow, a graph; PyTorch,
                as `model.compile` was told, and on a CUDA device a CUDA graph is recorded at the
                third token. True: XLA on TensorFlow too; on PyTorch torch.compile makes one block
                of each kind for all of them, which needs a C++ compiler and up to a minute for each
                kind and batch size. False: not compiled (TensorFlow: a graph).

        Returns:
            A list of integer arrays: each prompt followed by its continuation.

        Raises:
            ValueError: for empty prompts, token ids out of range, and options out of range.

        Example:

        >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
        >>> [len(text) for text in model.generate([[1, 2, 3], [4]], 5, temperature=0)]
        [8, 6]
        """
        prompts = self._prompts(prompts)
        steps = self._steps(
            prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile
        )
        if stop_token is not None:
            steps = sampling.until(steps, stop_token)
        new = np.concatenate([np.zeros((len(prompts), 0), "int32"), *sampling.fetched(steps)], 1)
        if stop_token is not None:
            ends = [
                row.index(stop_token) + 1 if stop_token in row else len(row) for row in new.tolist()
            ]
            new = [row[:end] for row, end in zip(new, ends, strict=True)]
        return [np.concatenate([p, n]) for p, n in zip(prompts, new, strict=True)]

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
    ):
        """Like `generate`, but yields every step's new tokens as soon as they are there.

        Args:
            prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile: as in
                `generate`.

        Yields:
            One integer array (batch,) per token; a prompt that is done repeats `stop_token`.

        Example:

        >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
        >>> for tokens in model.stream([[1, 2, 3]], max_new_tokens=2):
        ...     print(tokens.shape)
        (1,)
        (1,)
        """
        prompts = self._prompts(prompts)
        steps = self._steps(
            prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile
        )
        return sampling.until(steps, stop_token)

    # ------------------------------------------------------------------ checks

    def _prompts(self, prompts):
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
            if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    "Every prompt must be a list of at least one integer token id. "
                    f"Received: prompt {index} of shape {array.shape} and dtype {array.dtype}. "
                    "Give a prompt without text the token that starts a document."
                )
            if array.min() < 0 or array.max() >= vocabulary_size:
                wrong = array[(array < 0) | (array >= vocabulary_size)][0]
                raise ValueError(
                    f"Token ids must be from 0 to {vocabulary_size - 1}, the model's vocabulary. "
                    f"Received: {wrong} in prompt {index}."
                )
            arrays.append(array.astype("int32"))
        return arrays

    def _check_options(
        self, max_new_tokens, temperature, top_k, top_p, seed, stop_token, jit_compile
    ):
        vocabulary_size = self.settings["vocabulary_size"]

        def whole(x):
            return isinstance(x, numbers.Integral) and not isinstance(x, bool)

        def real(x):
            return isinstance(x, numbers.Real) and not isinstance(x, bool)

        for name, value, fits, expected in (
            ("max_new_tokens", max_new_tokens, lambda x: whole(x) and x >= 0, "an integer >= 0"),
            (
                "temperature", temperature,
                lambda x: real(x) and 0 <= x < float("inf"), "a number >= 0, 0 for greedy",
            ),
            (
                "top_k", top_k, lambda x: x is None or (whole(x) and 1 <= x <= vocabulary_size),
                f"an integer from 1 to the vocabulary's {vocabulary_size}, or None",
            ),
            (
                "top_p", top_p, lambda x: x is None or (real(x) and 0 < x <= 1),
                "a number above 0, at most 1, or None",
            ),
            (
                "seed", seed, lambda x: x is None or (whole(x) and x >= 0),
                "an integer >= 0, or None",
            ),
            (
                "stop_token", stop_token,
                lambda x: x is None or (whole(x) and 0 <= x < vocabulary_size),
                f"a token id from 0 to {vocabulary_size - 1}, or None",
            ),
            (
                "jit_compile", jit_compile, lambda x: x == "auto" or isinstance(x, bool),
                '"auto", True or False',
            ),
        ):  # fmt: skip
            if not fits(value):
                raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")

    # ------------------------------------------------------------------ steps

    def _steps(self, prompts, count, temperature, top_k, top_p, seed, stop_token, jit_compile):
        """Checks at once; then an iterator over the new tokens (batch,), as tensors."""
        self._check_options(count, temperature, top_k, top_p, seed, stop_token, jit_compile)
        prefill, step = self._compiled(temperature == 0, top_k, top_p is not None, jit_compile)
        # A tensor each: a Python number would be compiled in.
        options = [np.float32(temperature or 1), np.float32(top_p or 1)]
        options = [ops.convert_to_tensor(x) for x in options]
        rng = np.random.default_rng(seed)

        def draw():
            return ops.convert_to_tensor(rng.random((len(prompts), 1), "float32"))

        def run():
            lengths = np.array([len(p) for p in prompts])
            tokens = np.zeros((len(prompts), sampling.bucket(lengths.max())), "int32")
            mask = np.arange(tokens.shape[1]) < lengths[:, None]
            tokens[mask] = np.concatenate(prompts)
            state = self.get_initial_state(len(prompts))
            arrays = (tokens, mask, (lengths - 1).astype("int32"))
            arrays = [ops.convert_to_tensor(a) for a in arrays]
            tokens, state = prefill(state, *arrays, draw(), *options)
            yield tokens
            for _ in range(count - 1):
                tokens, state = step(state, tokens, draw(), *options)
                yield tokens

        return run() if count else iter(())

    def _compiled(self, greedy, top_k, nucleus, jit_compile):
        """The two functions for these options, kept until the model's variables are others."""
        variables = list(self.variables)
        compiles = backends.captured_train_step is not None and jit_compile is not False
        if jit_compile == "auto":
            compiles = compiles and self.blocks[0].runner is not run_plain
        key = (greedy, top_k, nucleus, jit_compile, compiles, backends.prefer("auto"))
        ids = [id(variable) for variable in variables]
        of, kept = self.__dict__.get("_generation", (None, {}))
        if of != ids:  # what quantize replaced is not held in memory
            kept = {}
            self.__dict__["_generation"] = ids, kept
        if key not in kept:
            runners = backends.block_runners(self.blocks) if compiles else None

            def choose(features, draw, temperature, top_p):
                logits = ops.cast(self.logits(features), "float32")
                p = top_p if nucleus else None
                return sampling.choose(logits, None if greedy else draw, temperature, top_k, p)

            def prefill(state, tokens, mask, last, *drawing):
                features, state = self._features(tokens, state, mask)
                features = ops.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
                return choose(features, *drawing), state

            def step(state, tokens, *drawing):
                features, state = self._features(tokens[:, None], state, None, runners)
                return choose(features[:, 0], *drawing), state

            kept[key] = [
                backends.compiled(prefill, variables, jit_compile),
                backends.compiled(step, variables, jit_compile, repeated=True),
            ]
        return kept[key]

    def _features(self, tokens, state, mask, runners=None):
        """`run`, by `runners`, or without what `model.compile` compiled: to compile a block for
        every length of a prompt would take minutes."""
        if runners is not None:
            return self._run_blocks(self.get_layer("embedding")(tokens), state, runners=runners)
        with self._run_by():
            return self.run(tokens, state, mask)
