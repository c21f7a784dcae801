"""Runs exported files in their own runtimes, in a process without Keras and without the package.

python -I tests/exported.py FORMAT FOLDER    # of every FOLDER/*/x.npy: sequence and streaming
"""

import pathlib
import sys

import numpy as np


def onnx(path):
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(f"{path}.onnx")
    names = [output.name for output in session.get_outputs()]

    def run(**inputs):
        return dict(zip(names, session.run(None, inputs), strict=True))

    return {x.name: x.shape for x in session.get_inputs()}, run


def openvino(path):
    import openvino

    model = openvino.Core().read_model(f"{path}.xml")
    # The CPU plugin's default is bfloat16 where the processor has it.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", options)

    def run(**inputs):
        outputs = compiled(inputs)
        return {output.get_any_name(): outputs[output].copy() for output in compiled.outputs}

    shapes = {
        x.get_any_name(): [d.get_length() if d.is_static else -1 for d in x.partial_shape]
        for x in compiled.inputs
    }
    return shapes, run


def litert(path):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(f"{path}.tflite").get_signature_runner()
    shapes = {name: x["shape_signature"] for name, x in run.get_input_details().items()}
    return shapes, run


def tf_saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]

    def run(kept=loaded, **inputs):
        outputs = function(**{name: tf.constant(x) for name, x in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    return {n: list(x.shape) for n, x in function.structured_input_signature[1].items()}, run


def torch(path):
    import torch

    program = torch.export.load(f"{path}.pt2")
    module, examples = program.module(), program.example_inputs[0]

    def run(**inputs):
        outputs = module(*(torch.from_numpy(x) for x in inputs.values()))
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        names = ["output", *(f"next_{n}" for n in range(1, len(outputs)))]
        return {n: x.detach().numpy() for n, x in zip(names, outputs, strict=True)}

    return {str(n): list(x.shape) for n, x in enumerate(examples)}, run


def stream(shapes, run, x):
    """All steps of x: the states are those inputs that have a `next_` output."""
    first = next(n for n in shapes if f"next_{n}" not in run_names(shapes))
    states = {
        n: np.zeros([len(x), *map(int, shape[1:])], "float32")
        for n, shape in shapes.items()
        if n != first
    }
    outputs = []
    for t in range(x.shape[1]):
        new = run(**{first: np.ascontiguousarray(x[:, t]), **states})
        outputs.append(new["output"])
        states = {n: new[f"next_{n}"] for n in states}
    return np.stack(outputs, 1), states


def run_names(shapes):
    """Inputs that are states have a name of two parts; positions of a .pt2 file count from 0."""
    return {f"next_{n}" for n in shapes if n not in ("frame", "input", "token_ids", "0")}


def main(format, folder):
    for case in sorted(pathlib.Path(folder).iterdir()):
        x = np.load(case / "x.npy")
        for part in ("sequence", "streaming"):
            if not list(case.glob(f"{part}*")):
                continue
            shapes, run = globals()[format](str(case / part))
            if part == "sequence":
                (name,) = shapes
                outputs, states = run(**{name: x})["output"], {}
            else:
                outputs, states = stream(shapes, run, x)
            np.savez(case / f"{part}-ran.npz", outputs=outputs, **states)
    # TensorFlow imports Keras by itself.
    assert "keras_xlstm" not in sys.modules
    assert "keras" not in sys.modules or format == "tf_saved_model"


if __name__ == "__main__":
    main(*sys.argv[1:])
