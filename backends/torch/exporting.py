"""What a file that PyTorch writes cannot hold."""

import torch
from keras_xlstm.backends import exports
from keras_xlstm.backends.torch.operators import exporting


@torch.compiler.assume_constant_result
def _open_length():
    export = exports.current()
    return export is not None and export.open_length


def check_export(x):
    """Refuses x (B, T, ...) where its length is to stay open in a file: PyTorch's tracers write
    loops out step by step, and a file would be right for the length of the example alone."""
    if not exporting():
        return
    symbolic = not isinstance(x.shape[1], (int, torch.Tensor))
    if symbolic or _open_length():
        raise ValueError(
            "PyTorch writes a loop over time into a file step by step, so that the file would be "
            "right for one length alone. Received: an input whose length is not fixed. Give "
            "keras.Input, or export's `input_signature`, a fixed length; or use "
            "keras_xlstm.export.export_model(model, folder, format, length=...); or load the model "
            "with the Keras backend jax or tensorflow, whose files take any length "
            "(docs/export.md)."
        )
