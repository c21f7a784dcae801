"""Which implementation runs an op: what there is, what is asked for, what fits."""

import contextlib
import contextvars
import logging
import os
from collections.abc import Iterator

import keras
from keras_xlstm.backends.framework import framework as active
from keras_xlstm.backends.framework import load

# Which backends each kernel language belongs to; where several fit, the first is picked.
_KERNELS = {"triton": ("torch", "jax"), "pallas": ("jax",), "xla": ("tensorflow",)}
_OPS = ("mlstm", "slstm")
_VARIABLE = "KERAS_XLSTM_IMPLEMENTATION"
_scope = contextvars.ContextVar("keras_xlstm_implementation", default=None)
_log = logging.getLogger("keras_xlstm")
_said = set()
# What the active framework has of its own: {implementation: {op: module}}.
loaded = {
    name: {op: load(module) for op, module in modules.items()}
    for name, modules in active.implementations.items()
}
_preferred = [name for name in _KERNELS if name in loaded]


def _unsupported(op, implementation, **call):
    """Why `implementation` cannot run `op` on the tensors of `call` (at all, without), or None."""
    if implementation == "native":
        return None
    if implementation not in loaded:
        homes = _KERNELS[implementation]
        home = f"{' and '.join(homes)} backend{'s' * (len(homes) > 1)}"
        return f"it belongs to the {home} and Keras runs on {keras.backend.backend()}"
    return loaded[implementation][op].unsupported(**call)


def _pick(op, forced, **call):
    """The first of the active framework's own that fits; otherwise None, and why each does not.

    `forced`: where none is the better choice, one that can run at all.
    """
    reason = able = None
    for name in _preferred:
        unsupported = _unsupported(op, name, **call)
        able = able or (None if unsupported else name)
        reason = unsupported or loaded[name][op].not_preferred(**call)
        if reason is None:
            return name, None
    # Of what a user would have to install for a little more speed only `available` tells.
    return able if forced else None, reason


def available() -> dict[str, dict[str, bool | str]]:
    """What can run here: `{op: {implementation: True, or the reason why not}}`.

    Example:
        >>> keras_xlstm.backends.available()["mlstm"]["native"]
        True
    """
    return {
        op: {name: _unsupported(op, name) or True for name in ("native", *_KERNELS)} for op in _OPS
    }


def _known(implementation, where):
    if implementation not in (None, "native", *_KERNELS):
        raise ValueError(
            f"Unknown implementation. Received: {where}={implementation!r}. Expected None or one "
            f"of 'native', 'triton', 'pallas', 'xla'. None picks what fits."
        )
    return implementation


@contextlib.contextmanager
def use(implementation: str | None) -> Iterator[None]:
    """Runs every op and layer that is traced inside with one implementation.

    Args:
        implementation: "native", "triton", "pallas" or "xla"; None takes the choice back.
    """
    token = _scope.set(_known(implementation, "implementation"))
    try:
        yield
    finally:
        _scope.reset(token)


@active.trace_time
def asked():
    """What `use` or the environment asks for, or None."""
    return _scope.get() or _known(os.environ.get(_VARIABLE) or None, _VARIABLE)


def prefer(use_kernel):
    """The `implementation` argument for a layer with this `use_kernel`.

    "kernel" stands for the active backend's own kernel.
    """
    return asked() or {"auto": None, True: "kernel", False: "native"}[use_kernel]


def choose(op, implementation, **call):
    """The implementation of `op` to run, or a ValueError that says why the one asked for cannot."""
    remedy = 'Use implementation=None or "native".'
    if implementation == "kernel":
        implementation, reason = _pick(op, True, **call)
        if implementation:
            return implementation
        implementation, remedy = next(reversed(loaded)), 'Use use_kernel="auto" or False.'
    else:
        implementation = _known(implementation, "implementation")
        if implementation is None:
            implementation, reason = _pick(op, False, **call)
            if reason is not None:
                _say_once(f"{op} runs in its native form: {reason}.")
            return implementation or "native"
        reason = _unsupported(op, implementation, **call)
    if reason is not None:
        raise ValueError(
            f"The {implementation} implementation of {op} was asked for and cannot run: {reason}. "
            f"{remedy} keras_xlstm.backends.available() lists what can run."
        )
    return implementation


@active.trace_time  # torch.compile would break its graph at a logger
def _say_once(message):
    if message not in _said:
        _said.add(message)
        _log.info(message)
