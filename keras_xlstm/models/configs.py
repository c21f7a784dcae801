"""The published models' settings, as arguments of `xLSTMLanguageModel`.

    model = keras_xlstm.models.xLSTMLanguageModel(**keras_xlstm.models.configs.xlstm_125m("7:1"))

Sizes: tables 4 and 7 of [xLSTM](https://arxiv.org/abs/2405.04517), table 1 of
[xLSTM 7B](https://arxiv.org/abs/2503.13427), and the run data of
[xLSTM Scaling Laws](https://arxiv.org/abs/2510.02228) that its authors published
(https://github.com/NX-AI/xlstm_scaling_laws). A vocabulary of 50304.
"""

__all__ = [
    "scaling_law",
    "scaling_law_sizes",
    "xlstm_1_3b",
    "xlstm_7b",
    "xlstm_125m",
    "xlstm_350m",
    "xlstm_760m",
]

_VOCABULARY = 50304
# Where the paper's [7:1] models, 7 mLSTM blocks for every sLSTM block, have the sLSTM blocks: those
# of 48 blocks, and that of 24.
_SLSTM_OF_48, _SLSTM_OF_24 = (3, 5, 7, 40, 42, 44), (3, 20)
# Of the scaling laws' models, {(units, heads): {blocks: millions of parameters}}.
_SCALING_LAW = {
    (512, 4): {10: 83.68, 12: 90.11, 14: 96.55, 16: 102.98},
    (640, 5): {10: 114.03, 12: 123.96, 14: 133.89, 16: 143.82},
    (768, 6): {12: 164.11, 15: 185.82, 18: 207.53},
    (896, 7): {12: 207.31, 15: 236.60, 18: 265.89, 21: 295.18, 24: 324.48, 27: 353.77},
    (1024, 4): {18: 330.90, 21: 368.88, 24: 406.86, 27: 444.84, 30: 482.82},
    (1152, 9): {24: 504.00, 27: 552.51, 30: 601.02},
    (1280, 5): {24: 604.97, 27: 664.49, 30: 724.02},
    (1408, 11): {24: 715.62, 27: 787.36, 30: 859.10},
    (1536, 6): {24: 841.64, 27: 927.53, 30: 1013.42},
    (1792, 7): {24: 1108.62, 27: 1224.66, 30: 1340.70},
    (2048, 8): {24: 1421.23, 27: 1573.13, 30: 1725.03, 33: 1876.93, 36: 2028.83},
    (2304, 9): {24: 1772.41, 27: 1964.98, 30: 2157.56, 33: 2350.13},
    (2560, 10): {29: 2544.67, 32: 2781.27, 35: 3017.87, 38: 3254.46},
    (4096, 8): {32: 6865.42},
}


def _paper(units, num_blocks, slstm_at, pattern):
    if pattern not in ("1:0", "7:1"):
        raise ValueError(
            'The paper has these sizes as "1:0" (mLSTM alone) and "7:1". '
            f"Received: pattern={pattern!r}. Other patterns are an argument of xLSTMLanguageModel."
        )
    return {
        "vocabulary_size": _VOCABULARY,
        "units": units,
        "num_blocks": num_blocks,
        "num_heads": 4,
        "slstm_at": list(slstm_at) if pattern == "7:1" else [],
    }


def xlstm_125m(pattern="7:1"):
    """163.7M parameters as "7:1", 163.8M as "1:0"."""
    return _paper(768, 24, _SLSTM_OF_24, pattern)


def xlstm_350m(pattern="7:1"):
    """408.4M parameters as "7:1", 409.3M as "1:0"."""
    return _paper(1024, 48, _SLSTM_OF_48, pattern)


def xlstm_760m(pattern="7:1"):
    """839.7M parameters as "7:1", 840.4M as "1:0"."""
    return _paper(1536, 48, _SLSTM_OF_48, pattern)


def xlstm_1_3b(pattern="7:1"):
    """1420.1M parameters as "7:1", 1422.6M as "1:0"."""
    return _paper(2048, 48, _SLSTM_OF_48, pattern)


def xlstm_7b():
    """6,865,424,896 parameters, of xLSTMLargeBlock."""
    return _large(4096, 8, 32)


def _large(units, num_heads, num_blocks):
    return {
        "vocabulary_size": _VOCABULARY,
        "units": units,
        "num_blocks": num_blocks,
        "num_heads": num_heads,
        "architecture": "large",
        "logit_soft_cap": 30.0,
    }


def scaling_law_sizes():
    """The names that `scaling_law` takes, from "83.68M" to "6865.42M": parameters, as the names of
    the authors' checkpoints have them ("mlstm_v1--tokenparam--ctx-8192--params-164.11M--...")."""
    return list(_scaling_law())


def scaling_law(name):
    """A model of xLSTMLargeBlock of the scaling laws, by its parameters.

    Args:
        name: one of `scaling_law_sizes()`, as "406.86M".

    Raises:
        ValueError: for another name.

    Example:

    >>> keras_xlstm.models.configs.scaling_law("406.86M")["num_blocks"]
    24
    """
    if name not in _scaling_law():
        raise ValueError(
            f"`name` must be a size of the scaling laws: {', '.join(_scaling_law())}. "
            f"Received: name={name!r}. Other sizes are arguments of xLSTMLanguageModel."
        )
    return _large(*_scaling_law()[name])


def _scaling_law():
    """{name: (units, heads, blocks)}, small models first."""
    found = {
        size: (*width, blocks)
        for width, sizes in _SCALING_LAW.items()
        for blocks, size in sizes.items()
    }
    return {f"{size:.2f}M": found[size] for size in sorted(found)}
