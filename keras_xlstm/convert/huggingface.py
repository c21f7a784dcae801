"""config.json of a Hugging Face checkpoint."""

from keras_xlstm.convert.safetensors import parsed

_SIZE, _SWITCH = ("a whole number", (int,)), ("a bool", (bool,))
_NUMBER = ("a number of no less than 0", (int, float))
_CONFIG_TYPES = {
    **dict.fromkeys(("hidden_size", "num_blocks", "vocab_size", "num_heads"), _SIZE),
    **dict.fromkeys(("norm_eps", "eps", "gate_soft_cap", "output_logit_soft_cap"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "use_bias"), _SWITCH),
}


def read_config(folder):
    """config.json, with what it leaves out as Hugging Face's xLSTMConfig has it."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            "`folder` must hold config.json and safetensors files. Received: "
            f"{str(folder)!r}, without config.json. Download a model from a hub to a folder first."
        )
    try:
        config = parsed((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"config.json in {folder} must be a JSON object. Received: {error}."
        ) from error
    if config.get("model_type") != "xlstm":
        raise ValueError(
            'config.json must have model_type "xlstm". Received: '
            f"model_type={config.get('model_type')!r}. Other models have no counterpart here."
        )
    config = {name: value for name, value in config.items() if value is not None}
    size = config.get("embedding_dim", 4096)
    blocks = config.get("num_hidden_layers", 32)
    config = {
        "hidden_size": size, "num_blocks": blocks, "vocab_size": 50304, "num_heads": 8,
        "tie_word_embeddings": False, "norm_eps": 1e-6, "eps": 1e-6, "use_bias": False,
        "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0, **config,
    }  # fmt: skip
    for name, (kind, fits) in _CONFIG_TYPES.items():
        if type(config[name]) not in fits or not 0 <= config[name] < 2**53:
            raise ValueError(
                f"config.json must have {kind} for {name}. Received: {name}={config[name]!r}."
            )
    for name, value in {"eps": 1e-6, "use_bias": False}.items():
        if config[name] != value:
            raise ValueError(
                f"config.json must have {name}={value}. Received: {name}={config[name]}. "
                "This package has no counterpart of other values."
            )
    return config
