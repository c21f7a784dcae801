"""Which weights the published models decay."""

import keras


def exclude_from_weight_decay(optimizer, model):
    """Tells an optimizer to decay what the published models decayed: kernels alone.

    Biases, norms, skips, recurrent kernels, LoRA updates and embeddings keep their size.

    Args:
        optimizer: a Keras optimizer with `weight_decay`, not yet built.
        model: any model, built.

    Returns:
        The optimizer.

    Raises:
        ValueError: if the optimizer is built already, or decays nothing.

    Example:

    >>> model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=1)
    >>> optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.1)
    >>> optimizer = keras_xlstm.models.exclude_from_weight_decay(optimizer, model)
    >>> model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    """
    inner = optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
    if not inner.weight_decay:
        raise ValueError(
            f"`optimizer` decays nothing. Received: weight_decay={inner.weight_decay}. "
            "Give it weight_decay, or leave this call out."
        )
    if inner.built:
        raise ValueError(
            "`optimizer` must not be built when weights are excluded from its decay. Received: a "
            "built one. Call this before compile or fit."
        )
    if not model.built:
        raise ValueError("`model` must be built: call it once, or give it a keras.Input.")
    inner.exclude_from_weight_decay(var_list=[v for v in model.variables if v.name != "kernel"])
    return optimizer
