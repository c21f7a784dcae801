"""Files that PyTorch writes: `.pt2`, and ONNX from the same graph."""

import warnings

import torch


class _Flat(torch.nn.Module):
    """A Keras model with lists of inputs and outputs, as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        outputs = self.model(list(inputs), training=False)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else outputs


def _program(model):
    # 2 rows: PyTorch takes a size of 1 for a constant.
    examples = tuple(
        torch.ones(
            [2, *x.shape[1:]] if x.shape[0] is None else x.shape, dtype=getattr(torch, x.dtype)
        )
        for x in model.inputs
    )
    batch = torch.export.Dim("batch")
    sizes = tuple({0: batch} if x.shape[0] is None else None for x in model.inputs)
    flat = _Flat(model).eval()
    examples = tuple(x.to(next(flat.parameters()).device) for x in examples)
    with torch.no_grad(), warnings.catch_warnings():
        # Keras's own: its variables are parameters of layers that share them.
        warnings.filterwarnings("ignore", message=".*not properly registered as a submodule.*")
        return torch.export.export(flat, examples, dynamic_shapes=(sizes,), strict=False)


def save(model, path):
    torch.export.save(_program(model), path)


def save_onnx(model, names, path):
    names = {"input_names": [x.name for x in model.inputs], "output_names": names}
    program = torch.onnx.export(_program(model), dynamo=True, verbose=False, **names)
    program.save(path, external_data=False)
