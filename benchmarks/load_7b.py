"""xLSTM-7B from files: memory and time of `convert.from_pretrained` at full size.

    python benchmarks/load_7b.py write /tmp/7b                      # 13.7 GB, random numbers
    KERAS_BACKEND=torch python benchmarks/load_7b.py load /tmp/7b --dtype bfloat16

`write` makes a folder as Hugging Face's save_pretrained does, with the published configuration and
shards of 2 GB. `load` says what the process held at most, checks tensors bit by bit against the
files and the number of parameters against the published one, and runs a few tokens.
"""

import argparse
import json
import os
import pathlib
import platform
import time

import memory
import numpy as np
import record

UNITS, BLOCKS, HEADS, VOCABULARY, HIDDEN = 4096, 32, 8, 50304, 10944
PARAMETERS = 6_865_424_896
SHARD = 2 * 10**9  # bytes


def shapes(blocks):
    """Name to shape, in the order of the files."""
    D, F = UNITS, HIDDEN
    found = {"backbone.embeddings.weight": (VOCABULARY, D)}
    for block in range(blocks):
        parts = {
            "norm_mlstm.weight": (D,),
            "mlstm_layer.q.weight": (D // 2, D),
            "mlstm_layer.k.weight": (D // 2, D),
            "mlstm_layer.v.weight": (D, D),
            "mlstm_layer.ogate_preact.weight": (D, D),
            "mlstm_layer.igate_preact.weight": (HEADS, D),
            "mlstm_layer.igate_preact.bias": (HEADS,),
            "mlstm_layer.fgate_preact.weight": (HEADS, D),
            "mlstm_layer.fgate_preact.bias": (HEADS,),
            "mlstm_layer.multihead_norm.weight": (D,),
            "mlstm_layer.out_proj.weight": (D, D),
            "norm_ffn.weight": (D,),
            "ffn.proj_up_gate.weight": (F, D),
            "ffn.proj_up.weight": (F, D),
            "ffn.proj_down.weight": (D, F),
        }
        found |= {f"backbone.blocks.{block}.{name}": shape for name, shape in parts.items()}
    return {**found, "backbone.out_norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}


def bits(name, shape):
    """bfloat16 of both signs between 2^-7 and 2^-5, of norms between 1 and 4, as 16-bit words."""
    rng = np.random.default_rng(list(name.encode()))
    words = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), "<u2").reshape(shape)
    return words & 0xFF | 0x3F80 if "norm" in name else words & 0x80FF | 0x3C00


def write(folder, blocks):
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "xlstm", "embedding_dim": UNITS, "hidden_size": UNITS,
        "num_heads": HEADS, "num_blocks": blocks, "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for name, shape in shapes(blocks).items():
        length = 2 * int(np.prod(shape))
        if size + length > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += length
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header, start = {}, 0
        for name, shape in shard.items():
            end = start + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            where[name], start = file, end
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shard.items():
                bits(name, shape).tofile(out)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak():
    """GB that this process held at most, files mapped into memory included."""
    return memory.peak() * 2**20 / 1e9


def chosen(model, blocks):
    """Official names, whose rows follow one another, and the variable that holds them."""
    first, last = model.blocks[0], model.blocks[-1]
    one, other = "backbone.blocks.0.", f"backbone.blocks.{blocks - 1}."
    return [
        (["backbone.embeddings.weight"], model.get_layer("embedding").embeddings),
        ([one + "mlstm_layer.q.weight"], first.query.kernel),
        ([one + "mlstm_layer.igate_preact.bias"], first.input_gate.bias),
        ([other + "norm_ffn.weight"], last.feed_forward_norm.scale),
        (
            [other + "ffn.proj_up_gate.weight", other + "ffn.proj_up.weight"],
            last.feed_forward.up_projection.kernel,
        ),
        (["backbone.out_norm.weight"], model.get_layer("norm").scale),
        (["lm_head.weight"], model.get_layer("head").kernel),
    ]


def same(names, variable, known):
    """Whether a variable is what `write` wrote, bit by bit."""
    from keras import ops

    for name, part in zip(names, ops.split(variable, len(names), axis=-1), strict=True):
        want = bits(name, known[name])
        want = want.T if want.ndim == 2 and "embeddings" not in name else want
        # By rows, as float32: 16 of its bits are those of bfloat16 and the others 0.
        for start in range(0, len(want), 1024):
            got = ops.convert_to_numpy(ops.cast(part[start : start + 1024], "float32"))
            if not np.array_equal(got.view("<u4"), want[start : start + 1024].astype("<u4") << 16):
                return False
    return True


def load(folder, blocks, dtype, tokens):
    import keras

    from keras_xlstm import convert

    print(
        f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, "
        f"keras {keras.__version__} on {keras.backend.backend()}, {dtype}"
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    before, start = peak(), time.perf_counter()
    model = convert.from_pretrained(folder, dtype=dtype)
    seconds, most = time.perf_counter() - start, peak()
    print(
        f"files {size:.2f} GB, read in {seconds:.0f} s; the process held {most:.2f} GB at most, "
        f"{most / size:.2f} of them, and {before:.2f} before"
    )
    case = f"xLSTM-7B, {blocks} blocks, {dtype}"
    record.add(__file__, case, "time to load", "s", {"from_pretrained": seconds})
    record.add(__file__, case, "memory held", "GB", {"from_pretrained": most}, {"files": size})
    known = shapes(blocks)
    count = sum(int(np.prod(shape)) for shape in known.values())
    published = count == PARAMETERS if blocks == BLOCKS else "not asked"
    print(f"{model.count_params():,} parameters, as in the files: {model.count_params() == count}")
    print(f"as published: {published}")
    for names, variable in chosen(model, blocks):
        kind = keras.backend.standardize_dtype(variable.dtype)
        print(f"{' and '.join(names)}: {kind}, equal: {same(names, variable, known)}", flush=True)
    if tokens:
        ids, start = np.arange(tokens, dtype="int32")[None], time.perf_counter()
        logits = model.predict(ids, verbose=0).astype("float32")
        finite = bool(np.isfinite(logits).all())
        print(
            f"logits {logits.shape}, finite: {finite}, in {time.perf_counter() - start:.1f} s; "
            f"held at most {peak():.2f} GB"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["write", "load"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer, to try this script")
    parser.add_argument("--dtype", default="bfloat16", help="policy of the layers")
    parser.add_argument("--tokens", type=int, default=8, help="to run at the end; 0 for none")
    record.option(parser)
    args = parser.parse_args()
    if args.command == "write":
        write(args.folder, args.blocks)
    else:
        load(args.folder, args.blocks, args.dtype, args.tokens)


if __name__ == "__main__":
    main()
