"""What a graph is traced for: a file, XLA, or a format without loops."""

import contextlib
import contextvars

import tensorflow as tf
from keras_xlstm.backends import export_context

_unrolled = contextvars.ContextVar("keras_xlstm_unrolled", default=False)
_by_xla = contextvars.ContextVar("keras_xlstm_by_xla", default=False)
_differentiated = contextvars.ContextVar("keras_xlstm_differentiated", default=False)


@contextlib.contextmanager
def _during(variable):
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def unrolled():
    """Scans that are traced inside become plain operations: for formats without loops."""
    return _during(_unrolled)


def by_xla():
    """What is traced inside is compiled by XLA, for sure."""
    return _during(_by_xla)


def differentiated():
    """TensorFlow differentiates twice what is traced inside."""
    return _during(_differentiated)


def without_loop(length):
    """Whether a loop over so many steps, if it is known, is traced step by step."""
    return _unrolled.get() or (length is not None and exported_to() in ("litert", "openvino"))


def chunks_without_loop(count):
    """Likewise of a loop over chunks: XLA compiles no second derivative of one, for it cuts and
    turns what it reads."""
    return without_loop(count) or (_differentiated.get() and count is not None)


def for_xla():
    return _by_xla.get()


def export_of(x):
    return None if tf.executing_eagerly() else export_context.current()


def exported_to():
    """The format that the graph being traced is exported to, or None."""
    export = export_of(None)
    return export and export.format


def check_export(x):
    """Refuses x (B, T, ...) where a file of that format could not hold a loop over it."""
    format = exported_to()
    if format == "litert" and x.shape[1] is None:
        raise ValueError(
            "LiteRT's runtime does not run TensorFlow's loops over time; they are written out step "
            "by step. Received: an input whose length is not fixed. Give keras.Input, or export's "
            "`input_signature`, a fixed length; or use keras_xlstm.export.export_model(model, "
            "folder, 'litert', length=...), or its parts=('streaming',), one step with its states "
            "(docs/export.md)."
        )
    graph = getattr(tf.compat.v1.get_default_graph(), "name", "")
    looped = x.shape[1] == 1 and "while_body" in graph
    if format in ("litert", "openvino") and looped:
        raise ValueError(
            f"A {format} file cannot hold the loop of keras.layers.RNN on TensorFlow. Received: a "
            "cell of keras_xlstm in this loop. Build it with unroll=True and an input of fixed "
            "length, use keras_xlstm.layers.sLSTM, or take keras_xlstm.export.export_model(model, "
            f"folder, {format!r}, parts=('streaming',)), one step with its states."
        )
