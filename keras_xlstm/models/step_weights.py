"""A model's weights as generation reads them."""

import functools

import keras
from keras import ops

from keras_xlstm import backends

_HALVES = ("bfloat16", "float16")


class StepWeights:
    """Under a mixed policy layers cast their float32 weights at every call, which for one token is
    most of what is read. Here copies in the compute dtype are kept and read.

    `variables` are all of the model's; `values`, in the same order, what stands in their place.
    """

    def __init__(self, model):
        self.variables = list(model.variables)
        self._dtypes, self._copies = {}, {}
        for layer in model._flatten_layers():
            if layer.compute_dtype in _HALVES and backends.version is not None:
                own = (*layer._trainable_variables, *layer._non_trainable_variables)
                self._dtypes |= {id(v): layer.compute_dtype for v in own if _is_cast(v)}

    def refresh(self):
        """Copies what has changed."""
        for variable in self.variables:
            dtype, value = self._dtypes.get(id(variable)), variable._value
            if dtype is None:
                continue
            of, version, _ = self._copies.get(id(variable), (None, None, None))
            if of is not value or version != backends.version(value):
                copy = ops.cast(ops.stop_gradient(value), dtype)
                self._copies[id(variable)] = value, backends.version(value), copy

    @property
    def values(self):
        return [self._copies.get(id(v), (v._value,))[-1] for v in self.variables]

    def scoped(self, function):
        """`function`, inside which layers read the copies."""

        @functools.wraps(function)
        def run(*arguments):
            if not self._copies:
                return function(*arguments)
            with self.scope(self.values):
                return function(*arguments)

        return run

    def scope(self, values):
        """Inside, layers read `values`."""
        scope = keras.StatelessScope()
        for pair in zip(self.variables, values, strict=True):
            scope.add_update(pair)
        return scope


def _is_cast(variable):
    return variable._autocast and keras.backend.standardize_dtype(variable.dtype) == "float32"
