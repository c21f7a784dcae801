"""The published models' settings, as arguments of `xLSTMLanguageModel`.

    model = keras_xlstm.models.xLSTMLanguageModel(**keras_xlstm.models.configs.xlstm_125m("7:1"))

Sizes: tables 4 and 7 of [xLSTM](https://arxiv.org/abs/2405.04517) and table 1 of
[xLSTM 7B](https://arxiv.org/abs/2503.13427); vocabulary of GPT-2, padded to 50304.
"""

__all__ = ["xlstm_1_3b", "xlstm_7b", "xlstm_125m", "xlstm_350m", "xlstm_760m"]

_VOCABULARY = 50304
# Where the paper's [7:1] models, 7 mLSTM blocks for every sLSTM block, have the sLSTM blocks: those
# of 48 blocks, and that of 24.
_SLSTM_OF_48, _SLSTM_OF_24 = (3, 5, 7, 40, 42, 44), (3, 20)


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
    return {
        "vocabulary_size": _VOCABULARY,
        "units": 4096,
        "num_blocks": 32,
        "num_heads": 8,
        "architecture": "large",
        "logit_soft_cap": 30.0,
    }
