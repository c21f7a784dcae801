"""What a file that PyTorch writes cannot hold."""

import torch
from keras_xlstm.backends import export_context
from keras_xlstm.backends.torch.tracing import exporting


@torch.compiler.assume_constant_result
def _export():
    if not exporting():
        return None
    # Where a tracer is called without Keras, what it makes is PyTorch's own.
    found = export_context.current() or export_context.Export(None, False, None)
    return found._replace(format=found.format or "torch")


def export_of(x):
    """What x is traced for, if it is for a file, or None."""
    return _export()


def check_export(x):
    """Refuses x (B, T, ...) where its length is to stay open in a file: PyTorch's tracers write
    loops out step by step, and a file would be right for the length of the example alone."""
    export = _export()
    if export is None:
        return
    symbolic = not isinstance(x.shape[1], (int, torch.Tensor))
    if symbolic or export.open_length:
        raise ValueError(
            "PyTorch writes a loop over time into a file step by step, so that the file would be "
            "right for one length alone. Received: an input whose length is not fixed. Give "
            "keras.Input, or export's `input_signature`, a fixed length; or use "
            "keras_xlstm.export.export_model(model, folder, format, length=...); or load the model "
            "with the Keras backend jax or tensorflow, whose files take any length "
            "(docs/export.md)."
        )
