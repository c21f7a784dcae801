"""How sLSTM and mLSTM run: which implementations there are, which is chosen, how to ask for one.

    with keras_xlstm.backends.use("native"):
        model.export("model")

The choice is made when a function is traced: argument, then `use`, then the environment variable
KERAS_XLSTM_IMPLEMENTATION, then the layer's `use_kernel`, then what fits. Changing it after the
first `fit` does not trace again.
"""

if __name__ != "keras_xlstm.backends":
    raise ImportError("import keras_xlstm.backends, not the source folder backends/")

import functools

import keras
import numpy as np
from keras import ops
from keras_xlstm.backends import head_loss as head_loss
from keras_xlstm.backends import reference, stretches
from keras_xlstm.backends.choice import asked, available, choose, loaded, use
from keras_xlstm.backends.choice import prefer as prefer
from keras_xlstm.backends.framework import framework as active
from keras_xlstm.backends.framework import load as load
from keras_xlstm.backends.mixing import block_diagonal  # noqa: F401 for layers
from keras_xlstm.backends.stretches import check_sequential, since_entering  # noqa: F401

__all__ = ["available", "use"]

# What layers and models ask of the framework: framework.py says what each is.
size, tensor, steps_of, signature = active.size, active.tensor, active.steps_of, active.signature
matmul, activated, fusion_barrier = active.matmul, active.activated, active.fusion_barrier
float32_gate_product, keep_unfused = active.float32_gate_product, active.keep_unfused
split_gate_and_up, token_losses = active.split_gate_and_up, active.token_losses
concatenate_steps, changes = active.concatenate_steps, active.changes
export_of, unsorted = active.export_of, active.unsorted
scripting, no_autograph, compiled = active.scripting, active.no_autograph, active.compiled
block_runners, fuse_optimizer = active.block_runners, active.fuse_optimizer
captured_train_step, default_compilation = active.captured_train_step, active.default_compilation
state_copy, version = active.state_copy, active.version
whole_batch = active.whole_batch
shares_time, own_stretch, remat = active.shares_time, active.own_stretch, active.remat


def _kernel(name):
    """A function of `inference.Inference`; it returns None where layers are to compute."""

    def run(*arguments):
        allowed = active.without_gradients is not None and asked() in (None, "triton")
        return active.without_gradients(name, *arguments) if allowed else None

    return run


head_norm, rms_norm, gated_unit = map(_kernel, ("head_norm", "rms_norm", "gated_unit"))
gate_pair, products_of_few = _kernel("gate_pair"), _kernel("products_of_few")
added_product = _kernel("added_product")

_ANY_DTYPE = ("triton", "pallas")  # they cast for themselves


def host_values(x):
    """A tensor's numbers as a NumPy array where the host can read them at once; None of a tensor
    that is being traced, or on a GPU."""
    if isinstance(x, np.ndarray) or x is None:
        return x
    return active.host_values(x.value if isinstance(x, keras.Variable) else x)


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
    by_name = implementation or asked()
    chosen = choose("mlstm", by_name, q=q, v=v, chunk_size=chunk_size)
    tensors = q, k, v, i, f, state, segment_ids
    options = {"input_gate": input_gate, "eps": eps, "chunk_size": chunk_size}
    if chosen in _ANY_DTYPE:
        second = _second(by_name, _working_mlstm, reference.mlstm, **options)
        run = loaded[chosen]["mlstm"].mlstm
        return run(*tensors, states=states, **options, **second)
    run = reference.mlstm if chosen == "native" else _xla("mlstm", by_name)
    return _working_mlstm(run, *tensors, **options)


def _second(by_name, *native, **options):
    """What a kernel takes for second derivatives; None, an error, if it was asked for by name."""
    if not active.kernels_take_native:
        return {}
    return {"native": None if by_name else functools.partial(*native, **options)}


def _xla(op, by_name):
    return functools.partial(getattr(loaded["xla"][op], op), twice=by_name is None)


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
    by_name = implementation or asked()
    return choose("mlstm", by_name, q=k, v=v, chunk_size=None) in ("native", "xla")


def mlstm_last(q, k, v, i, f, state, *options):
    """`reference.mlstm_last` for tensors of any dtype."""
    active.check_export(k)
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
    by_name = implementation or asked()
    chosen = choose("slstm", by_name, x=x)
    tensors = (x, recurrent_kernel, bias, state, hold, reset, recurrent_scale)
    if chosen in _ANY_DTYPE:
        second = _second(by_name, _working_slstm, _native_slstm, **options)
        return loaded[chosen]["slstm"].slstm(*tensors, **options, **second)
    run = _native_slstm if chosen == "native" else _xla("slstm", by_name)
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
