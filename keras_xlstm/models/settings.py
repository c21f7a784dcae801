"""The arguments that models of blocks share: checks, and their descriptions."""

import keras

from keras_xlstm.validation import check_flag, check_positive, check_rate


def slstm_positions(num_blocks, pattern, slstm_at):
    """Which of the blocks are sLSTM, as sorted indices."""
    check_positive("num_blocks", num_blocks)
    if pattern is not None and slstm_at is not None:
        raise ValueError(
            "`pattern` and `slstm_at` both say which blocks are sLSTM. Received: "
            f"pattern={pattern!r}, slstm_at={slstm_at!r}. Give one of them."
        )
    if pattern is not None:
        counts = pattern.split(":") if isinstance(pattern, str) else []
        if len(counts) != 2 or not all(c.isdecimal() for c in counts) or pattern == "0:0":
            raise ValueError(
                '`pattern` must be "a:b", a mLSTM blocks for every b sLSTM blocks, as "7:1". '
                f"Received: pattern={pattern!r}."
            )
        a, b = map(int, counts)
        return [index for index in range(num_blocks) if index % (a + b) >= a]
    if slstm_at is None:
        return []
    if isinstance(slstm_at, str) or not hasattr(slstm_at, "__iter__"):
        raise ValueError(
            f"`slstm_at` must be a list of block indices, or None. Received: slstm_at={slstm_at!r}."
        )
    positions = list(slstm_at)
    for index in positions:
        if isinstance(index, bool) or index not in range(num_blocks):
            raise ValueError(
                f"`slstm_at` must hold block indices from 0 to {num_blocks - 1}. "
                f"Received: slstm_at={positions}."
            )
    return sorted({int(index) for index in positions})


def settings_of(
    units, num_blocks, num_heads, architecture, pattern, slstm_at, mlstm_options, slstm_options,
    dropout, final_norm, seed, remat, use_kernel, dtype, output_mask,
):  # fmt: skip
    """The arguments of a stack, checked, with the positions of its sLSTM blocks worked out."""
    check_positive("units", units)
    check_positive("num_heads", num_heads)
    if architecture not in ("paper", "large"):
        raise ValueError(
            '`architecture` must be "paper" (mLSTMBlock and sLSTMBlock) or "large" '
            f"(xLSTMLargeBlock). Received: architecture={architecture!r}."
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(
            f"`seed` must be an integer, or None for any. Received: seed={seed!r}. Every block "
            "takes its own from it, so a SeedGenerator cannot be given."
        )
    for name, options in (("mlstm_options", mlstm_options), ("slstm_options", slstm_options)):
        if "go_backwards" in (options or {}):
            raise ValueError(
                f"`{name}` cannot hold go_backwards, which would leave the steps in the opposite "
                f"order. Received: {name}={options!r}. Give xLSTMStack "
                '`direction="alternate"` or `"both"`; a language model reads forwards alone.'
            )
    at = slstm_positions(num_blocks, pattern, slstm_at)
    if architecture == "large" and at:
        raise ValueError(
            'architecture="large" has mLSTM blocks alone. Received: sLSTM blocks at '
            f"{at}. Leave out `pattern` and `slstm_at`."
        )
    return {
        "units": units,
        "num_blocks": num_blocks,
        "num_heads": num_heads,
        "architecture": architecture,
        "slstm_at": at,
        "mlstm_options": dict(mlstm_options or {}),
        "slstm_options": dict(slstm_options or {}),
        "dropout": check_rate("dropout", dropout),
        "final_norm": check_flag("final_norm", final_norm),
        "seed": seed,
        "remat": check_flag("remat", remat),
        "use_kernel": use_kernel,
        "output_mask": check_flag("output_mask", output_mask),
        "dtype": keras.dtype_policies.get(dtype or keras.config.dtype_policy()),
    }


def check_direction(direction, num_blocks):
    """Which way the blocks of a stack read."""
    if direction not in ("forward", "alternate", "both"):
        raise ValueError(
            '`direction` must be "forward", "alternate" (every second block reads from the end) or '
            f'"both" (two blocks at each place). Received: direction={direction!r}.'
        )
    if direction == "alternate" and num_blocks == 1:
        raise ValueError(
            'direction="alternate" needs a second block, which reads from the end. Received: '
            'num_blocks=1. Give more blocks, or direction="both".'
        )
    return direction


ARGUMENTS = """num_blocks: residual blocks.
        num_heads: heads of every block.
        architecture: `"paper"`: `mLSTMBlock` and `sLSTMBlock`; `"large"`: `xLSTMLargeBlock`.
        pattern: `"a:b"`, a mLSTM blocks for every b sLSTM blocks, in turn; or
        slstm_at: the indices of the sLSTM blocks. Neither: mLSTM alone.
        mlstm_options: further arguments of every mLSTM block, as `{"conv_kernel_size": 0}`.
        slstm_options: further arguments of every sLSTM block.
        dropout: fraction of every block's contribution to drop.
        final_norm: normalise what leaves the last block.
        seed: of the dropouts.
        remat: in training, compute each block again in the backward pass and store its input alone.
        use_kernel: as in `mLSTM`.
        dtype: policy of all layers; None takes Keras's own.
        name: of the model.
        output_mask: whether the output carries the padding mask on, as Keras's layers do: losses,
            metrics and pooling behind the model leave padded steps out. False: they count."""
