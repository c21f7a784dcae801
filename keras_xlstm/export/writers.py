"""Writes a model in the format of another runtime, with the converters of its backend."""

import tempfile

import keras

from keras_xlstm import backends


def write(backend, format, model, names, path):
    """`model` has lists of inputs and outputs; `names` are those of the outputs."""
    named = keras.Model(model.inputs, dict(zip(names, model.outputs, strict=True)))
    if format == "torch":
        backends.load("export").save(model, path)
    elif format == "tf_saved_model":
        named.export(path, format=format, verbose=False, input_signature=[_specs(model)])
    elif format == "litert":
        with backends.load("export").litert() as options:
            named.export(path, format=format, verbose=False, **options)
    elif format == "onnx":
        _write_onnx(backend, model, names, path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_onnx(backend, model, names, f"{folder}/model.onnx")
            _onnx_to_openvino(f"{folder}/model.onnx", model, names, path)


def _specs(model):
    return [keras.InputSpec(shape=x.shape, dtype=x.dtype, name=x.name) for x in model.inputs]


def _write_onnx(backend, model, names, path):
    if backend == "torch":
        backends.load("export").save_onnx(model, names, path)
    else:
        model.export(path, format="onnx", verbose=False, input_signature=[_specs(model)])
    _finish_onnx(path, names)


def _finish_onnx(path, names):
    """Gives outputs their names, and checks the file: a converter may leave operators in it that
    ONNX does not have."""
    import onnx

    proto = onnx.load(path)
    graph = proto.graph
    for node in [node for node in graph.node if node.op_type == "Erfc"]:  # tf2onnx, of gelu
        erf = f"{node.output[0]}_erf"
        one = onnx.helper.make_tensor(f"{erf}_one", onnx.TensorProto.FLOAT, [], [1.0])
        graph.initializer.append(one)
        new = [
            onnx.helper.make_node("Erf", [node.input[0]], [erf]),
            onnx.helper.make_node("Sub", [one.name, erf], [node.output[0]]),
        ]
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, made in enumerate(new):
            graph.node.insert(place + offset, made)
    for output, name in zip(graph.output, names, strict=True):
        if output.name != name:
            graph.node.append(onnx.helper.make_node("Identity", [output.name], [name]))
            output.name = name
    onnx.save(proto, path)
    onnx.checker.check_model(path)


def _onnx_to_openvino(source, model, names, path):
    import openvino

    converted = openvino.convert_model(source)
    for op in converted.get_ops():  # a runtime that joins two tensors gives the one both names
        for inner in op.outputs():
            inner.get_tensor().set_names(set())
    ports = [*converted.inputs, *converted.outputs]
    for port, name in zip(ports, [*(x.name for x in model.inputs), *names], strict=True):
        port.get_tensor().set_names({name})  # one each: the converter adds its own
    # Not rounded to float16, which is the default.
    openvino.save_model(converted, path, compress_to_fp16=False)
