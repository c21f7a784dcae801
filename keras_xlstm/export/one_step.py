"""A model for whole sequences made into one for a single step: state in, state out."""

import collections

import keras

from keras_xlstm.export.step_checks import check_commutes, refuse, symbolic
from keras_xlstm.layers.block import Block
from keras_xlstm.layers.recurrent import Recurrent
from keras_xlstm.models.forecaster import xLSTMForecaster
from keras_xlstm.models.language_model import xLSTMLanguageModel
from keras_xlstm.models.stack import StackModel

_LSTM_STATES = {keras.layers.LSTM: "hc", keras.layers.GRU: "h", keras.layers.SimpleRNN: "h"}
Call = collections.namedtuple("Call", "op args kwargs outputs")


def timed(tensor):
    """Whether an input is a sequence, (batch, time, ...), and not one vector for all steps."""
    return len(tensor.shape) > 2 or (len(tensor.shape) == 2 and tensor.shape[1] is None)


class Stepped:
    """One step of a model, as `model`: lists [inputs (B, 1, ...), *states] to [outputs, *states].

    `states` are the names and shapes of the states; `timed` says which inputs and outputs have
    the time axis.
    """

    def __init__(self, model):
        self.states, self.new = [], []
        self._whole = model
        inputs, calls, outputs = _recorded(model)
        self._length = next((x.shape[1] for x in inputs if timed(x) and x.shape[1]), 5)
        self._timed = {id(x) for x in inputs if timed(x)}
        if not self._timed:
            raise ValueError(
                f"{model.name} has no input with a time axis to stream. Received: inputs of shapes "
                f"{[tuple(x.shape) for x in inputs]}. A sequence is (batch, time, features), or "
                "(batch, time) with keras.Input((None,))."
            )
        self.inputs = [
            keras.Input((1, *x.shape[2:]) if timed(x) else x.shape[1:], dtype=x.dtype)
            for x in inputs
        ]
        values = dict(zip(map(id, inputs), self.inputs, strict=True))
        self._state_inputs = []
        for call in calls:
            stepped = self._step(call, lambda x: values.get(id(x), x))
            for old, new in zip(call.outputs, keras.tree.flatten(stepped), strict=True):
                values[id(old)] = new
        self.timed = [[id(x) in self._timed for x in group] for group in (inputs, outputs)]
        if not self.states:
            raise ValueError(
                f"{model.name} has no layer that carries a state over the time of its input: "
                "there is nothing to stream. Export it with parts=('sequence',)."
            )
        outputs = [values[id(x)] for x in outputs]
        self.model = keras.Model([*self.inputs, *self._state_inputs], [*outputs, *self.new])

    # ------------------------------------------------------------------ one call of the graph

    def _step(self, call, mapped):
        args, kwargs = (keras.tree.map_structure(mapped, part) for part in (call.args, call.kwargs))
        tensors = [x for x in keras.tree.flatten((call.args, call.kwargs)) if symbolic(x)]
        if not any(id(x) in self._timed for x in tensors):
            return call.op(*args, **kwargs)
        refuse(call.op)
        if _carries(call.op):
            return self._carry(call, args, kwargs)
        check_commutes(call, tensors, self._timed, self._length)
        return call.op(*args, **kwargs)

    def _carry(self, call, args, kwargs):
        layer = call.op
        given = kwargs.get("initial_state", args[1] if len(args) > 1 else None)
        if given is not None:
            raise ValueError(
                f"{layer.name} starts from a state that the model computes, and in a step model "
                "states come from the caller. Make its layers a model of their own, and give the "
                "step model that state at the first step."
            )
        x, names, shapes, run, returned = _one_step(layer, args[0] if args else kwargs)
        taken = {name for name, _ in self.states}
        prefix = layer.name
        while not taken.isdisjoint(f"{prefix}_{name}" for name in names):  # called once more
            prefix += "_again"
        if layer is not self._whole:
            names = [f"{prefix}_{name}" for name in names]
        states = [keras.Input(s, name=n) for n, s in zip(names, shapes, strict=True)]
        first, *new = _Carried(layer, run, name=f"{prefix}_step")(x, states)
        self.states += zip(names, shapes, strict=True)
        self._state_inputs += states
        self.new += new
        self._timed |= {
            id(out)
            for out, still in zip(call.outputs, returned, strict=False)
            if still
        }  # fmt: skip
        return [first, *new][: len(call.outputs)]


class _Carried(keras.layers.Layer):
    """A layer that exists, called with states and returning them; its weights stay its own."""

    def __init__(self, layer, run, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.layer = layer
        self._run = run

    def call(self, x, states):
        outputs, states = self._run(x, list(states))
        return [outputs, *states]

    def compute_output_spec(self, x, states):
        # A fresh tensor: Keras calls what a number was multiplied with sparse, which nothing takes.
        return self.call(keras.KerasTensor(x.shape, dtype=x.dtype), states)


# ---------------------------------------------------------------------------------- the graph


def _recorded(model):
    """Inputs, calls in order and outputs of a model, as symbolic tensors."""
    calls = []

    def record(op, *args, **kwargs):
        outputs = op(*args, **kwargs)
        calls.append(Call(op, args, kwargs, keras.tree.flatten(outputs)))
        return outputs

    if isinstance(model, StackModel):
        [main] = model.inputs
        x = keras.Input(main.shape[1:], dtype=main.dtype)
        return [x], calls, [record(model, x)]
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"A step model is made of a built keras.Model. Received: {model!r}. "
            "Call the model once, or give it a keras.Input."
        )
    if isinstance(model, keras.Sequential):
        first = x = keras.Input(batch_shape=model.inputs[0].shape, dtype=model.inputs[0].dtype)
        for layer in model.layers:
            x = record(layer, x)
        return [first], calls, keras.tree.flatten(x)
    if isinstance(model, xLSTMForecaster):
        raise ValueError(
            f"{model.name} cannot stream: a forecast is of a whole window, normalised by its own "
            "mean. Export it with parts=('sequence',), and hand its file each new window."
        )
    if not hasattr(model, "operations"):
        raise ValueError(
            f"{model.name} is a subclass of keras.Model with a `call` of its own, which cannot be "
            "taken apart. Build it from the same layers with the functional API or as a "
            "keras.Sequential, or write the step with `return_state=True` and `initial_state`."
        )
    clone = keras.models.clone_model(model, clone_function=lambda op: op, call_function=record)
    return clone.inputs, calls, keras.tree.flatten(clone.outputs)


# ---------------------------------------------------------------------------------- what carries


def _carries(op):
    if isinstance(op, (Recurrent, Block, StackModel)):
        return True
    if isinstance(op, keras.layers.RNN):
        return all(isinstance(size, int) for size in keras.tree.flatten(op.cell.state_size))
    return isinstance(op, keras.Model) and any(map(_carries, op._flatten_layers(False)))


def _one_step(layer, inputs):
    """The input, names and shapes of the states, `run(x, states) -> (outputs, states)`, and which
    of the outputs have a time axis."""
    if isinstance(layer, StackModel):
        if isinstance(inputs, dict):
            for name in layer._optional:
                if inputs.get(name) is not None:
                    raise ValueError(
                        f"{layer.name} takes {name!r} in this model, which a stream of single "
                        "steps does not have. Build the model without it."
                    )
            inputs = inputs[layer._main]
        return inputs, *_blocks(layer), [True]
    if isinstance(layer, keras.layers.RNN):
        return inputs, *_cell(layer), [layer.return_sequences]
    if isinstance(layer, keras.Model):
        inner = Stepped(layer)
        if len(inner.inputs) > 1:
            raise ValueError(
                f"{layer.name} inside the model has {len(inner.inputs)} inputs; a model inside a "
                "model streams with one. Build it from its layers in the outer model."
            )
        names, shapes = zip(*inner.states, strict=True)
        count = len(inner.timed[1])
        if count > 1:
            raise ValueError(
                f"{layer.name} inside the model has {count} outputs; a model inside a model "
                "streams with one. Build it from its layers in the outer model."
            )

        def run(x, states):
            outputs, *states = inner.model([x, *states])
            return outputs, states

        return inputs, names, shapes, run, inner.timed[1]

    def run(x, states):
        outputs, *states = layer(x, initial_state=states, return_state=True)
        return outputs, states

    shapes = [tuple(s.shape[1:]) for s in layer.get_initial_state(1)]
    return inputs, layer.state_names, shapes, run, [getattr(layer, "return_sequences", True)]


def _blocks(model):
    names = [f"{block.name}_{name}" for block in model.blocks for name in block.state_names]
    like = model.get_initial_state(1)
    shapes = [tuple(s.shape[1:]) for s in keras.tree.flatten(like)]

    def run(x, states):
        outputs, states = model.run(x, keras.tree.pack_sequence_as(like, states))
        if isinstance(model, xLSTMLanguageModel):
            outputs = model.logits(outputs)
        return outputs, keras.tree.flatten(states)

    return names, shapes, run


def _cell(layer):
    """keras.layers.RNN and those built on it: their cell is one step."""
    like = layer.cell.get_initial_state(batch_size=1)
    shapes = [tuple(s.shape[1:]) for s in keras.tree.flatten(like)]
    names = _LSTM_STATES.get(type(layer)) or [f"state_{i}" for i in range(len(shapes))]

    def run(x, states):
        outputs, states = layer.cell(x[:, 0], keras.tree.pack_sequence_as(like, states))
        if layer.return_sequences:
            outputs = outputs[:, None]
        return outputs, keras.tree.flatten(states)

    return names, shapes, run
