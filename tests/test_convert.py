"""Official weights in and out: against the official models, whose process is originals.py's."""

import doctest
import json

import keras
import numpy as np
import pytest
from tools import BACKEND, array, assert_close, made, tensor, vjp

import keras_xlstm
from keras_xlstm import convert
from keras_xlstm.convert.safetensors import Safetensors
from keras_xlstm.models import xLSTMLanguageModel, xLSTMStack

PAPER = ["v1", "v1-cuda", "v1-stack", "v1-mlstm-bias", "v1-tied", "v1-slstm-plain", "v1-options"]
LARGE = ["large", "large-fused", "large-options"]
# What a block's config and a state dict both say.
SAID = {
    "num_heads", "projection_factor", "conv_kernel_size", "qkv_block_size", "use_bias", "epsilon",
    "feed_forward_factor", "key_dim_factor", "value_dim_factor", "gate_soft_cap",
}  # fmt: skip


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    pytest.importorskip("xlstm")
    pytest.importorskip("transformers")
    return made("originals", "originals.py", tmp_path_factory, HF_HUB_OFFLINE="1")


def read(folder, case):
    """The state dict, what went in and came out, the gradients."""
    parts = {"w": {}, "x": {}, "g": {}}
    for key, value in np.load(folder / f"{case}.npz").items():
        parts[key[0]][key[2:]] = value
    return parts.values()


def weights(model):
    return {v.path: array(v) for v in model.weights}


def small(pattern="1:1", **options):
    """A model with no weight left as it was made, of the originals' sizes: JAX compiles once."""
    arguments = {"units": 32, "num_blocks": 2, "num_heads": 2, "pattern": pattern, **options}
    model = xLSTMLanguageModel(11, **arguments)
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(array(v) + 0.1 * rng.uniform(-1, 1, v.shape).astype("float32"))
    return model


def small_large(**options):
    return small(None, units=64, architecture="large", logit_soft_cap=30.0, **options)


# ------------------------------------------------------------------------- against the originals


@pytest.mark.parametrize("case", PAPER[:-1])  # v1-options: below
def test_outputs(case, originals):
    tensors, x, _ = read(originals, case)
    model = convert.from_state_dict(tensors, dtype="float64")
    assert isinstance(model, xLSTMStack if case == "v1-stack" else xLSTMLanguageModel)
    # Compiled as one: op by op, JAX takes five times as long.
    assert_close(model.predict(x["inputs"], verbose=0), x["outputs"], 1e-5)


@pytest.mark.parametrize("case", LARGE)
def test_outputs_and_states(case, originals):
    """The same memory, whatever m it is scaled by."""
    tensors, x, _ = read(originals, case)
    model = convert.from_state_dict(tensors)
    features, states = model.run(tensor(x["inputs"], "int32"), model.get_initial_state(2))
    assert_close(model.logits(features), x["outputs"], 1e-5)
    for index, (C, n, m) in enumerate(states):
        theirs = x[f"m{index}"].astype("float64")[..., 0]
        shift = np.exp(array(m).astype("float64") - theirs)
        assert_close(array(C) * shift[..., None, None], x[f"C{index}"], 1e-5, f"C{index}")
        assert_close(array(n) * shift[..., None], x[f"n{index}"], 1e-5, f"n{index}")


@pytest.mark.parametrize("case", ["hub", "hub-bf16"])
def test_from_pretrained(case, originals):
    tensors, x, _ = read(originals, case)
    model = convert.from_pretrained(originals / case)
    assert_close(model.predict(x["inputs"], verbose=0), x["outputs"], 1e-5)
    written = convert.to_state_dict(model, "transformers")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, name)


def test_from_pretrained_in_bfloat16(originals, monkeypatch):
    monkeypatch.setattr(convert, "_PIECE", 100)  # of a large matrix, a few rows at a time
    model = convert.from_pretrained(originals / "hub-bf16", dtype="bfloat16")
    tensors, *_ = read(originals, "hub-bf16")
    kernel = model.blocks[0].query.kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == "bfloat16"
    for name, value in convert.to_state_dict(model, "transformers").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, tensors[name], name)


def exact_norm(self, x):
    x = x - keras.ops.sum(x, -1, keepdims=True) / x.shape[-1]
    variance = keras.ops.sum(x * x, -1, keepdims=True) / x.shape[-1]
    return x / keras.ops.sqrt(variance + self.epsilon) * self.gamma


def exact_dense(self, x):
    x = keras.ops.einsum("...i,io->...o", x, self.kernel)
    return x if self.bias is None else x + self.bias


def test_gradients_and_the_last_digits_of_outputs(originals, monkeypatch):
    # Keras computes these in float32 under float64, the norm on torch and JAX, Dense on torch.
    monkeypatch.setattr(keras.layers.LayerNormalization, "call", exact_norm)
    monkeypatch.setattr(keras.layers.Dense, "call", exact_dense)
    tensors, x, want = read(originals, "v1-options")
    model = convert.from_state_dict(tensors, dtype="float64")
    tokens, cotangent = tensor(x["inputs"], "int32"), tensor(x["cotangent"], "float64")
    frozen = [v.value for v in model.non_trainable_variables]

    def logits(*values):
        return (model.stateless_call(list(values), frozen, tokens)[0],)

    values = [tensor(array(v), "float64") for v in model.trainable_variables]
    (got,), gradients = vjp(logits, values, [cotangent], compiled=BACKEND == "jax")
    # TensorFlow's GELU is good to 5e-9.
    assert_close(got, x["outputs"], 1e-8 if BACKEND == "tensorflow" else 1e-13)
    for variable, gradient in zip(model.trainable_variables, gradients):
        variable.assign(keras.ops.convert_to_tensor(gradient))
    # The gradients under the official names: a map of weights is its own, but for 1 + w.
    got = convert.to_state_dict(model)
    assert want.keys() == got.keys()
    # m is a constant in our gradients, which mLSTM's epsilon, 1e-6, makes inexact.
    for name, gradient in want.items():
        assert_close(got[name] + ("norm" in name), gradient, 1e-6, name)


# ------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("case", [*PAPER, *LARGE, "hub"])
def test_original_there_and_back(case, originals):
    tensors, *_ = read(originals, case)
    model = convert.from_state_dict(tensors, dtype="float64" if case in PAPER else None)
    format = "xlstm" if case in PAPER else "transformers" if case == "hub" else "xlstm_large"
    again = convert.to_state_dict(model, format)
    if case == "v1-cuda":
        tensors, *_ = read(originals, "v1")  # written in the vanilla layout
    if case == "large-fused":
        tensors, *_ = read(originals, "large")  # and as single projections
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        got = again[name]
        assert got.dtype == value.dtype
        assert got.flags.c_contiguous
        if case in PAPER and "norm" in name:  # what counts is 1 + w
            got, value = 1 + got, 1 + value
        np.testing.assert_array_equal(got, value, name)


@pytest.mark.parametrize(
    ("format", "make"),
    [
        ("xlstm", small),
        ("xlstm", lambda: small("0:1", slstm_options={"feed_forward_factor": None})),
        ("xlstm", lambda: small(tie_embeddings=True, mlstm_options={"use_bias": True})),
        ("xlstm", lambda: small(final_norm=False, slstm_options={"num_heads": 4})),
        ("xlstm_large", small_large),
        ("xlstm_large", lambda: small_large(final_norm=False, tie_embeddings=True)),
        ("transformers", small_large),
    ],
)  # fmt: skip
def test_model_there_and_back(format, make):
    model = make()
    tensors = convert.to_state_dict(model, format)
    again = convert.from_state_dict(tensors)
    want, got = weights(model), weights(again)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], name)
    for key in ("slstm_at", "final_norm", "tie_embeddings", "logit_soft_cap", "num_heads"):
        assert again.settings[key] == model.settings[key], key
    for one, other in zip(model.blocks, again.blocks):
        assert type(one) is type(other)
        one, other = one.get_config(), other.get_config()
        assert {k: one[k] for k in SAID & set(one)} == {k: other[k] for k in SAID & set(one)}


def test_arrays_are_copies():
    model = small()
    tensors = convert.to_state_dict(model)
    before = weights(model)
    again = convert.from_state_dict(tensors)
    for value in tensors.values():
        value += 1
    for name, value in weights(again).items():
        np.testing.assert_array_equal(value, before[name])
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_overrides():
    tensors = convert.to_state_dict(small_large(), "xlstm_large")
    options = {"gate_soft_cap": None}
    model = convert.from_state_dict(
        tensors, dropout=0.1, mlstm_options=options, logit_soft_cap=None, name="mine"
    )
    assert model.name == "mine"
    assert model.settings["logit_soft_cap"] is None
    assert [(b.dropout, b.gate_soft_cap) for b in model.blocks] == [(0.1, None)] * 2
    assert model.settings["mlstm_options"]["key_dim_factor"] == 0.5


@pytest.mark.skipif(BACKEND != "torch", reason="torch after another backend may crash")
@pytest.mark.parametrize("prefix", ["module.", "model.backbone.", "net.xlstm.", "_orig_mod."])
@pytest.mark.parametrize("format", ["xlstm", "xlstm_large", "transformers", "stack"])
def test_a_prefix_is_left_out(format, prefix):
    if format == "stack":
        model = xLSTMStack(32, 2, num_heads=2, slstm_at=[1])
    else:
        model = small() if format == "xlstm" else small_large()
    tensors = convert.to_state_dict(model, "xlstm" if format == "stack" else format)
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    same = convert.from_state_dict(wrapped)
    assert type(same) is type(model)
    convert.load_state_dict(same, wrapped)
    for name, value in weights(same).items():
        np.testing.assert_array_equal(value, weights(model)[name], err_msg=name)


def test_a_prefix_of_some_is_named():
    tensors = convert.to_state_dict(small())
    wrapped = {f"model.net.{name}": tensor for name, tensor in tensors.items()}
    for more, message in (
        ({"model.temperature": np.zeros(1)}, "prefix 'model.net.', and others: 'model.temp"),
        ({f"ema.{n}": t for n, t in tensors.items()}, "prefix 'ema.' and 'model.net.'. Give"),
        (tensors, "prefix '' and 'model.net.'. Give"),
    ):
        for call in (convert.from_state_dict, lambda t: convert.load_state_dict(small(), t)):
            with pytest.raises(ValueError, match=message):
                call({**wrapped, **more})


def test_torch_tensors():
    import torch

    tensors = convert.to_state_dict(small())
    as_torch = {name: torch.nn.Parameter(torch.tensor(t)) for name, t in tensors.items()}
    for name, value in convert.to_state_dict(convert.from_state_dict(as_torch)).items():
        np.testing.assert_array_equal(value, tensors[name])
    as_bf16 = {name: value.bfloat16() for name, value in as_torch.items()}
    model = convert.from_state_dict(as_bf16)
    kernel = as_bf16["lm_head.weight"].detach().float().numpy().T
    np.testing.assert_array_equal(array(model.get_layer("head").kernel), kernel)


def test_lora_is_merged_and_not_loaded_into():
    model = small_large()
    tokens = np.array([[1, 5, 2, 0]])
    model.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(array(variable) + 0.1)
    merged = convert.from_state_dict(convert.to_state_dict(model, "xlstm_large"))
    assert_close(merged.predict(tokens, verbose=0), model.predict(tokens, verbose=0), 1e-5)
    with pytest.raises(ValueError, match="LoRA"):
        convert.load_state_dict(model, convert.to_state_dict(merged, "xlstm_large"))


# ------------------------------------------------------------------------- what does not fit


def test_every_wrong_tensor_is_named_and_nothing_assigned():
    model = small()
    tensors = convert.to_state_dict(small(seed=1))
    before = weights(model)
    wrong = dict(tensors)
    wrong.pop("lm_head.weight")
    wrong["ghost"] = wrong["token_embedding.weight"]
    wrong["xlstm_block_stack.blocks.0.xlstm.proj_up.weight"] = np.zeros((3, 4), "float32")
    wrong["xlstm_block_stack.blocks.1.ffn.proj_up.weight"] = np.zeros((128, 32), "int8")
    message = (
        r"missing: 'lm_head.weight'; unknown: 'ghost'; misshapen: .*0.xlstm.proj_up.weight' of "
        r"shape \(3, 4\) in place of \(128, 32\); not floating point: .*proj_up.weight' of dtype int8"
    )
    with pytest.raises(ValueError, match=message):
        convert.load_state_dict(model, wrong)
    many = {**tensors, **{f"x{n}": np.zeros(3) for n in range(12)}}
    with pytest.raises(ValueError, match="'x7' and 2 more"):
        convert.load_state_dict(model, many)
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_tensor_that_cannot_be_read_leaves_the_model_as_it_was():
    class Unreadable:
        shape, dtype = (32,), np.dtype("float32")

        def __array__(self, dtype=None, copy=None):
            raise OSError("the disk is gone")

    model = small()
    before = weights(model)
    tensors = convert.to_state_dict(small(seed=1))
    tensors["xlstm_block_stack.post_blocks_norm.weight"] = Unreadable()
    with pytest.raises(OSError, match="the disk is gone"):
        convert.load_state_dict(model, tensors)
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, "Received: no tensors"),
        (lambda t: {k: v for k, v in t.items() if ".blocks.0." not in k}, "blocks 1"),
        (lambda t: {k: v for k, v in t.items() if "learnable_skip" not in k}, "learnable_skip"),
        (lambda t: {k: v for k, v in t.items() if "conv1d" not in k}, "0.xlstm.conv1d.conv.weight"),
        (lambda t: {**t, "lm_head.weight": np.zeros((7, 4))}, "lm_head.weight' of shape"),
        (lambda t: {**t, "xlstm_block_stack.blocks.1.ffn.proj_up.bias": np.ones(128)}, "unknown"),
    ],
)  # fmt: skip
def test_not_a_model(change, message):
    tensors = change(convert.to_state_dict(small()))
    with pytest.raises(ValueError, match=message):
        convert.from_state_dict(tensors)


def test_a_width_of_no_factor():
    tensors = convert.to_state_dict(small_large(), "xlstm_large")
    for name in tensors:
        if "ffn.proj_down" in name:
            tensors[name] = tensors[name][:, :100]
        if "ffn.proj_up" in name:
            tensors[name] = tensors[name][:100]
    with pytest.raises(ValueError, match="feed_forward_factor gives must be a multiple of 64"):
        convert.from_state_dict(tensors)


@pytest.mark.parametrize(
    ("format", "make", "message"),
    [
        ("xlstm", small_large, 'architecture="large"'),
        ("transformers", small, 'architecture="paper"'),
        ("gguf", small, "`format` must be one of"),
        ("xlstm", lambda: small(logit_soft_cap=3.0), "a logit_soft_cap"),
        ("xlstm", lambda: small(mlstm_options={"conv_kernel_size": 0}), "without a convolution"),
        ("xlstm", lambda: small(slstm_options={"forget_activation": "exponential"}), "forget_act"),
        ("xlstm_large", lambda: small_large(mlstm_options={"use_bias": True}), "use_bias"),
        ("transformers", lambda: small_large(final_norm=False), "final_norm=False"),
        ("transformers", lambda: xLSTMStack(64, 1, architecture="large"), "no embedding"),
        ("xlstm", lambda: keras.Sequential([keras.Input((3,))]), "Received: Sequential"),
    ],
)  # fmt: skip
def test_no_such_format(format, make, message):
    with pytest.raises(ValueError, match=message):
        convert.to_state_dict(make(), format)


def test_wrong_architecture():
    with pytest.raises(ValueError, match='must have architecture="large"'):
        convert.load_state_dict(small(), convert.to_state_dict(small_large(), "transformers"))


def test_quantized_models_are_refused():
    model = small_large()
    tensors = convert.to_state_dict(model, "xlstm_large")
    model.blocks[0].query.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        convert.to_state_dict(model, "xlstm_large")
    with pytest.raises(ValueError, match="quantized"):
        convert.load_state_dict(model, tensors)


def test_a_tied_head_must_be_the_embedding():
    model = small(tie_embeddings=True)
    tensors = convert.to_state_dict(model)
    assert convert.from_state_dict(tensors).settings["tie_embeddings"]
    assert not convert.from_state_dict(tensors, tie_embeddings=False).settings["tie_embeddings"]
    head = tensors.pop("lm_head.weight")
    assert convert.from_state_dict(tensors).settings["tie_embeddings"]
    with pytest.raises(ValueError, match="must equal the embedding"):
        convert.load_state_dict(model, {**tensors, "lm_head.weight": head + 1})
    assert not convert.from_state_dict({**tensors, "lm_head.weight": head + 1}).settings[
        "tie_embeddings"
    ]


# ------------------------------------------------------------------------- files

CONFIG = {
    "model_type": "xlstm",
    "hidden_size": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "vocab_size": 11,
}


def write_tensors(path, tensors, change=None):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        end = len(data) + value.nbytes
        entry = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), end]}
        header[name] = {**entry, **(change or {})}
        data += value.tobytes()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.fixture
def folder(tmp_path):
    tensors = convert.to_state_dict(small_large(), "transformers")
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def refused(folder, message, **overrides):
    with pytest.raises(ValueError, match=message):
        convert.from_pretrained(folder, **overrides)


def configure(folder, **config):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))


def test_config(folder):
    model = convert.from_pretrained(folder, dropout=0.2, logit_soft_cap=None)
    assert model.settings["logit_soft_cap"] is None
    assert model.blocks[0].dropout == 0.2
    assert (model.blocks[0].gate_soft_cap, model.blocks[0].epsilon) == (15.0, 1e-6)
    configure(folder, output_logit_soft_cap=5.0, gate_soft_cap=6.0, norm_eps=1e-3)
    model = convert.from_pretrained(folder)
    assert model.settings["logit_soft_cap"] == 5.0
    assert (model.blocks[1].gate_soft_cap, model.blocks[1].epsilon) == (6.0, 1e-3)
    for name, value in {
        "hidden_size": 32,
        "num_blocks": 3,
        "num_heads": 4,
        "vocab_size": 9,
    }.items():
        configure(folder, **{name: value})
        refused(folder, f"must agree. Received: .* is {value} in config.json")
    configure(folder, tie_word_embeddings=True)
    refused(folder, "tie_embeddings is True in config.json and False by the tensors")
    assert not convert.from_pretrained(folder, tie_embeddings=False).settings["tie_embeddings"]
    configure(folder, model_type="mamba")
    refused(folder, "model_type='mamba'")
    configure(folder, use_bias=True)
    refused(folder, "must have use_bias=False")
    (folder / "config.json").write_text("{")
    refused(folder, "must be a JSON object")
    (folder / "config.json").unlink()
    refused(folder, "without config.json")


def test_damaged_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    refused(folder, "whole safetensors file.* does not fit")
    path.write_bytes(whole[:100])
    refused(folder, "fewer than its header")
    path.write_bytes(whole[:5])
    refused(folder, "fewer than its header")
    path.write_bytes(b"\x02" + bytes(7) + b"{}")
    refused(folder, "no tensors")
    path.write_bytes(b"\x02" + bytes(7) + b"{]")
    refused(folder, "no JSON object")
    one = {"a": np.zeros(4, "float32")}
    for change, message in [
        ({"dtype": "I8"}, "of type I8"),
        ({"shape": [5]}, "does not fit"),
        ({"shape": [-4]}, "does not fit"),
        ({"data_offsets": [-16, 0]}, "does not fit"),
        ({"data_offsets": [0]}, "bad entry"),
    ]:
        write_tensors(path, one, change)
        refused(folder, message)
    path.unlink()
    refused(folder, "with neither")


def test_damaged_shards(originals, tmp_path):
    def copied(name):
        target = tmp_path / name
        target.mkdir()
        for path in (originals / "hub-bf16").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target, target / "model.safetensors.index.json"

    folder, index = copied("lost")
    (folder / "model-00002-of-00004.safetensors").unlink()
    refused(folder, "model-00002-of-00004.safetensors', which does not")
    folder, index = copied("elsewhere")
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    refused(folder, "must lie beside it")
    folder, index = copied("emptied")
    write_tensors(folder / "model-00003-of-00004.safetensors", {})
    refused(folder, "files without 'backbone")
    index.write_text("[]")
    refused(folder, "must map names to files")


def test_files_are_read_when_needed(folder):
    tensors = Safetensors(folder)
    value = tensors["lm_head.weight"]
    assert (value.shape, value.dtype) == ((11, 64), np.float32)
    assert not isinstance(value, np.ndarray)
    assert len(tensors) == len(list(tensors)) == 2 * 15 + 3


@pytest.mark.parametrize("name", [n for n in convert.__all__ if n != "from_pretrained"])
def test_docstring(name):
    names = {"np": np, "keras_xlstm": keras_xlstm}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(convert, name), globs=names)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted
    assert not results.failed
