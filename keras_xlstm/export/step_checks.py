"""What of a model can run one step at a time, and the errors for what cannot."""

import keras
import numpy as np
from keras import ops

from keras_xlstm.models.stack import StackModel


def symbolic(x):
    return isinstance(x, keras.KerasTensor)


def refuse(op):
    """An error for what reads the future, or keeps its state to itself."""
    reason, future = None, "which has not come yet"
    if isinstance(op, keras.layers.Bidirectional):
        reason = f"reads the sequence from its end too, {future}"
        remedy = "Use the layer without Bidirectional"
    elif getattr(op, "go_backwards", False):
        reason = f"reads the sequence from its end (go_backwards=True), {future}"
        remedy = "Train it with go_backwards=False"
    elif isinstance(op, StackModel) and op.direction != "forward":
        reason = f"reads the sequence from its end too (direction={op.direction!r}), {future}"
        remedy = 'Train it with direction="forward"'
    elif getattr(op, "stateful", False):
        reason = "keeps its states in variables (stateful=True), which an exported file cannot"
        remedy = "Build the model with stateful=False and load the same weights"
    if reason:
        raise ValueError(f"{op.name} cannot stream: it {reason}. {remedy}.")


def check_commutes(call, tensors, sequences, length):
    """Checks on random numbers that a call gives each step what it gives the whole sequence."""
    rng = np.random.default_rng(0)
    values, steps = {}, [{} for _ in range(length)]
    for x in tensors:
        long = id(x) in sequences
        shape = (2, length, *x.shape[2:]) if long else (2, *x.shape[1:])
        value = rng.normal(size=[4 if size is None else size for size in shape])
        value = (value > 0 if "float" not in x.dtype else value).astype(x.dtype)
        values[id(x)] = ops.convert_to_tensor(value)
        for t, step in enumerate(steps):
            step[id(x)] = ops.convert_to_tensor(value[:, t : t + 1] if long else value)

    def run(values):
        given = keras.tree.map_structure(
            lambda x: values.get(id(x), x), (call.args, call.kwargs)
        )  # fmt: skip
        outputs = keras.tree.flatten(call.op(*given[0], **given[1]))
        return [ops.convert_to_numpy(x) for x in outputs]

    def one_step(x):
        if not symbolic(x):
            return x
        shape = (x.shape[0], 1, *x.shape[2:]) if id(x) in sequences else x.shape
        return keras.KerasTensor(shape, dtype=x.dtype)

    reason = "its outputs at a step depend on other steps, or on the step's place"
    try:
        args, kwargs = keras.tree.map_structure(one_step, (call.args, call.kwargs))
        call.op.compute_output_spec(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(_cannot(call.op, f"it does not take one step alone ({error})")) from error
    whole, each = run(values), [run(step) for step in steps]
    for index, (out, want) in enumerate(zip(call.outputs, whole, strict=True)):
        got = [step[index] for step in each]
        if got[0].shape == want.shape:  # time is gone: what counts is the last step
            same = _close(got[-1], want)
        else:
            got = [g for g in got if g.ndim > 1 and g.shape[1] == 1]
            same = len(got) == length and np.concatenate(got, 1).shape == want.shape
            same = same and _close(np.concatenate(got, 1), want)
            sequences.add(id(out))
        if not same:
            raise ValueError(_cannot(call.op, reason))


def _close(got, want):
    return np.allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(want).max()))


def _cannot(op, reason):
    return (
        f"{op.name} ({type(op).__name__}) cannot stream: {reason}. A step model may hold xLSTM "
        "layers, blocks and stacks, keras.layers.RNN and its kind, and what acts on every step by "
        "itself (Dense, norms, Embedding, the last step x[:, -1]). Replace it, or apply it outside."
    )
