"""How sLSTM and mLSTM run: which implementations there are, which is chosen, how to ask for one.

    with keras_xlstm.backends.use("native"):
        model.export("model")

The choice is made when a function is traced: argument, then `use`, then the environment variable
KERAS_XLSTM_IMPLEMENTATION, then the layer's `use_kernel`, then what fits. Changing it after the
first `fit` does not trace again.
"""

if __name__ != "keras_xlstm.backends":
    raise ImportError("import keras_xlstm.backends, not the source folder backends/")

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops
from keras_xlstm.backends import reference, stretches
from keras_xlstm.backends.framework import framework as active
from keras_xlstm.backends.framework import load
from keras_xlstm.backends.mixing import block_diagonal  # noqa: F401 for layers
from keras_xlstm.backends.stretches import check_sequential, since_entering  # noqa: F401

__all__ = ["available", "use"]

# What layers and models ask of the framework: framework.py says what each is.
size, tensor, steps_of, signature = active.size, active.tensor, active.steps_of, active.signature
matmul, activated, fusion_barrier = active.matmul, active.activated, active.fusion_barrier
float32_gate_product, keep_unfused = active.float32_gate_product, active.keep_unfused
split_gate_and_up, token_losses = active.split_gate_and_up, active.token_losses
export_of, changes, unsorted = active.export_of, active.changes, active.unsorted
scripting, no_autograph, compiled = active.scripting, active.no_autograph, active.compiled
block_runners, fuse_optimizer = active.block_runners, active.fuse_optimizer
captured_train_step, state_copy = active.captured_train_step, active.state_copy
shares_time, own_stretch, remat = active.shares_time, active.own_stretch, active.remat

# Which backends each kernel language belongs to; where several fit, the first is picked.
_KERNELS = {"triton": ("torch", "jax"), "pallas": ("jax",), "xla": ("tensorflow",)}
_OPS = ("mlstm", "slstm")
_ANY_DTYPE = ("triton", "pallas")  # they cast for themselves
_VARIABLE = "KERAS_XLSTM_IMPLEMENTATION"
_scope = contextvars.ContextVar("keras_xlstm_implementation", default=None)
_log = logging.getLogger("keras_xlstm")
_said = set()
# What the active framework has of its own: {implementation: {op: module}}.
_implementations = {
    name: {op: load(module) for op, module in modules.items()}
    for name, modules in active.implementations.items()
}
_preferred = [name for name in _KERNELS if name in _implementations]


def host_values(x):
    """A tensor's numbers as a NumPy array where the host can read them at once; None of a tensor
    that is being traced, or on a GPU."""
    if isinstance(x, np.ndarray) or x is None:
        return x
    return active.host_values(x.value if isinstance(x, keras.Variable) else x)


def _unsupported(op, implementation, **call):
    """Why `implementation` cannot run `op` on the tensors of `call` (at all, without), or None."""
    if implementation == "native":
        return None
    if implementation not in _implementations:
        homes = _KERNELS[implementation]
        home = f"{' and '.join(homes)} backend{'s' * (len(homes) > 1)}"
        return f"it belongs to the {home} and Keras runs on {keras.backend.backend()}"
    return _implementations[implementation][op].unsupported(**call)


def _pick(op, forced, **call):
    """The first of the active framework's own that fits; otherwise None, and why each does not.

    `forced`: where none is the better choice, one that can run at all.
    """
    reason = able = None
    for name in _preferred:
        unsupported = _unsupported(op, name, **call)
        able = able or (None if unsupported else name)
        reason = unsupported or _implementations[name][op].not_preferred(**call)
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
def _asked():
    """What `use` or the environment asks for, or None."""
    return _scope.get() or _known(os.environ.get(_VARIABLE) or None, _VARIABLE)


def prefer(use_kernel):
    """The `implementation` argument for a layer with this `use_kernel`.

    "kernel" stands for the active backend's own kernel.
    """
    return _asked() or {"auto": None, True: "kernel", False: "native"}[use_kernel]


def _choose(op, implementation, **call):
    """The implementation of `op` to run, or a ValueError that says why the one asked for cannot."""
    remedy = 'Use implementation=None or "native".'
    if implementation == "kernel":
        implementation, reason = _pick(op, True, **call)
        if implementation:
            return implementation
        implementation, remedy = next(reversed(_implementations)), 'Use use_kernel="auto" or False.'
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


def _working(like, *tensors):
    """The tensors in the dtype of all arithmetic and of states: float32, or float64 for float64."""
    double = keras.backend.standardize_dtype(like.dtype) == "float64"
    dtype = "float64" if double else "float32"
    return [None if x is None else ops.cast(x, dtype) for x in tensors]


def mlstm(
    q, k, v, i, f, state=None, segment_ids=None, *,
    input_gate="exp", eps=1e-6, chunk_size=None, implementation=None, states=True,
):  # fmt: skip
    """`ops.mlstm` below its checks: masks are in the gates, `segment_ids` never fall from 0.

    Returns:
        h (B, T, H, V) in v's dtype and (C, n, m) in float32, which without `states` may be None.
    """
    active.check_export(q)
    run = functools.partial(
        _mlstm, input_gate=input_gate, eps=eps, chunk_size=chunk_size,
        implementation=implementation, states=states,
    )  # fmt: skip
    tensors = q, k, v, i, f, state, segment_ids
    shared = active.over_stretches(functools.partial(stretches.mlstm, run, input_gate), *tensors)
    return run(*tensors) if shared is None else shared


def _mlstm(
    q, k, v, i, f, state, segment_ids, input_gate, eps, chunk_size, implementation, states
):  # fmt: skip
    """On one device."""
    asked = implementation or _asked()
    chosen = _choose("mlstm", asked, q=q, v=v, chunk_size=chunk_size)
    tensors = q, k, v, i, f, state, segment_ids
    options = {"input_gate": input_gate, "eps": eps, "chunk_size": chunk_size}
    if chosen in _ANY_DTYPE:
        second = _second(asked, _working_mlstm, reference.mlstm, **options)
        run = _implementations[chosen]["mlstm"].mlstm
        return run(*tensors, states=states, **options, **second)
    run = reference.mlstm if chosen == "native" else _xla("mlstm", asked)
    return _working_mlstm(run, *tensors, **options)


def _second(asked, *native, **options):
    """What a kernel takes for second derivatives; None, an error, if it was asked for by name."""
    if not active.kernels_take_native:
        return {}
    return {"native": None if asked else functools.partial(*native, **options)}


def _xla(op, asked):
    return functools.partial(getattr(_implementations["xla"][op], op), twice=asked is None)


def _working_mlstm(run, q, k, v, i, f, state, segment_ids, **options):
    dtype = v.dtype
    q, k, v, i, f = _working(v, q, k, v, i, f)
    state = None if state is None else tuple(_working(v, *state))
    h, state = run(q, k, v, i, f, state, segment_ids, **options)
    return ops.cast(h, dtype), state


def reads_once(k, v, implementation):
    """Whether the mLSTM's output after the last step alone had better be a sum over all steps: it
    is where no kernel would run."""
    if size(k.shape[1]) == 1 or implementation in ("xla", "kernel"):  # asked for by name
        return False
    if shares_time():
        return False
    asked = implementation or _asked()
    return _choose("mlstm", asked, q=k, v=v, chunk_size=None) in ("native", "xla")


def mlstm_last(q, k, v, i, f, state, *options):
    """`reference.mlstm_last` for tensors of any dtype."""
    dtype = v.dtype
    q, k, v, i, f = _working(v, q, k, v, i, f)
    state = None if state is None else tuple(_working(v, *state))
    h, state = reference.mlstm_last(q, k, v, i, f, state, *options)
    return ops.cast(h, dtype), state


def multiplies_inside(x, units, implementation):
    """Whether sLSTM's loop multiplies x (B, T, F) by an input kernel faster than a product before
    it: a matter of sizes, for the native form alone, in float32."""
    return (
        implementation in (None, "native", "xla")
        and keras.backend.standardize_dtype(x.dtype) == "float32"
        and size(x.shape[1]) != 1
        and active.multiplies_inside(*x.shape, units)
    )


def _native_slstm(*tensors, **options):
    found = None
    if active.native_slstm is not None:
        found = active.native_slstm(reference.slstm_forward, *tensors, **options)
    return reference.slstm(*tensors, **options) if found is None else found


def slstm(
    x, recurrent_kernel, bias=None, state=None, mask=None, segment_ids=None, *,
    forget_gate="sigmoid", recurrent_gradient_clip=None, recurrent_scale=None, kernel=None,
    implementation=None,
):  # fmt: skip
    """`ops.slstm` below its checks: `segment_ids` never fall from 0. A masked step holds h too,
    which is a recurrent input, so here the mask goes down to the loop. With `kernel`, for which
    `multiplies_inside` was asked, x is (B, T, F).

    Returns:
        h (B, T, H, D) in x's dtype and (h, c, n, m) in float32.
    """
    active.check_export(x)
    check_sequential()
    hold = None if mask is None else ops.logical_not(mask)
    reset = None if segment_ids is None else reference.segment_starts(segment_ids)
    options = {
        "forget_gate": forget_gate, "recurrent_gradient_clip": recurrent_gradient_clip,
    }  # fmt: skip
    asked = implementation or _asked()
    chosen = _choose("slstm", asked, x=x)
    tensors = (x, recurrent_kernel, bias, state, hold, reset, recurrent_scale)
    if chosen in _ANY_DTYPE:
        second = _second(asked, _working_slstm, _native_slstm, **options)
        return _implementations[chosen]["slstm"].slstm(*tensors, **options, **second)
    run = _native_slstm if chosen == "native" else _xla("slstm", asked)
    return _working_slstm(run, *tensors, kernel, **options)


def _working_slstm(
    run, x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, kernel=None, **options
):
    dtype = x.dtype
    x, recurrent_kernel, bias, recurrent_scale = _working(
        x, x, recurrent_kernel, bias, recurrent_scale
    )
    if state is None:
        if kernel is None:
            state = (ops.zeros_like(x[:, 0, 0]),) * 4
        else:
            state = (ops.zeros((ops.shape(x)[0], *recurrent_kernel.shape[:2]), x.dtype),) * 4
    state = tuple(_working(x, *state))
    if kernel is not None:
        options["kernel"] = kernel
    h, state = run(x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, **options)
    return ops.cast(h, dtype), state
