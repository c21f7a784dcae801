"""What several examples share: texts to model, a Transformer to compare with, and equal sizes."""

import bisect
import functools
import importlib
import pathlib
import sysconfig

import keras
import numpy as np
from keras import layers

from keras_xlstm.models import xLSTMLanguageModel

# ------------------------------------------------------------------ models


def small_language_model():
    """Of bytes; with the same weights in every process."""
    keras.utils.set_random_seed(0)
    return xLSTMLanguageModel(256, units=64, num_blocks=2, num_heads=4, pattern="1:1")


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(4e-3), loss, **options)
    return model


class Positions(layers.Layer):
    """Adds sines of the position, at any length."""

    def call(self, x):
        rates = 10_000.0 ** -keras.ops.linspace(0.0, 1.0, x.shape[-1] // 2)
        angle = keras.ops.arange(keras.ops.shape(x)[1], dtype="float32")[:, None] * rates
        waves = keras.ops.concatenate([keras.ops.sin(angle), keras.ops.cos(angle)], -1)
        return x + keras.ops.cast(0.05 * waves, x.dtype)  # of the size of the embeddings


def lstm(x):
    """Two layers of the width of `x`."""
    for _ in range(2):
        x = layers.LSTM(x.shape[-1], return_sequences=True)(x)
    return x


def transformer(x, blocks, heads):
    """Causal pre-norm blocks. Without positions in `x` the causal mask alone tells the order."""
    width = x.shape[-1]
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x += layers.Dense(width)(y)
    return layers.LayerNormalization()(x)


def nearest_width(build, name, parameters):
    """The multiple of 4 for which `build(name, width)` comes nearest to so many parameters.

    To be called before anything else is built: it clears Keras's session.
    """

    @functools.cache
    def count(width):
        with keras.StatelessScope(initialize_variables=False):  # drawing them takes seconds
            return build(name, width).count_params()

    widths = range(8, 4096, 4)
    wider = bisect.bisect_left(widths, parameters, 1, len(widths) - 1, key=count)
    width = min(widths[wider - 1 : wider + 1], key=lambda w: abs(count(w) - parameters))
    off = count(width) / parameters - 1
    print(f"{name}: width {width}, {count(width):,} parameters, {off:+.1%}", flush=True)
    keras.utils.clear_session()  # forgets the variables without values
    return width


# ------------------------------------------------------------------ texts


def needed(package, others, instead):
    """The package, or an end that says what to do."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install {package} {others}, or {instead}") from None


def read_text(source, folder):
    """Bytes to train on, and held-out ones.

    Args:
        source: a file, whose last tenth is held out; a folder of .txt files, every tenth of which
            is; "tfds:NAME", of TensorFlow Datasets' catalogue; None for Python's own source code.
        folder: where TensorFlow Datasets keeps its files.
    """
    if source and source.startswith("tfds:"):
        return read_catalogue(source.removeprefix("tfds:"), folder)
    root = pathlib.Path(source or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        text = root.read_bytes()
        return text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    found = sorted(root.rglob("*.txt" if source else "*.py"))
    skip = set() if source else {"test", "tests", "idle_test", "site-packages"}
    texts = [p.read_bytes() for p in found if not skip & set(p.relative_to(root).parts)]
    if len(texts) < 10:
        raise SystemExit(f"--text must be a file or hold ten .txt files or more, not {root}")
    return b"\n\n".join(t for n, t in enumerate(texts) if n % 10), b"\n\n".join(texts[::10])


def read_catalogue(name, folder):
    """A stock builder's training part, and its other parts as the held-out text.

    Without a network, put the file that it would download, under its own name, into
    downloads/manual in `folder`.
    """
    instead = "give --text a file with the same text"
    needed("tensorflow", "tensorflow-datasets importlib-resources", instead)  # builders read by it
    tfds = needed("tensorflow_datasets", "importlib-resources", instead)
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    train, *others = (
        b"\n\n".join(example["text"] for example in builder.as_data_source(split))
        for split in ("train", "validation", "test")
        if split in builder.info.splits
    )
    return train, b"".join(others)


def tokenized(train, held_out, vocabulary):
    """Token ids of both texts, and how many bytes each token of the vocabulary stands for."""
    if vocabulary == 256:
        return *(np.frombuffer(text, np.uint8) for text in (train, held_out)), np.ones(256)
    tokenizers = needed("tokenizers", "", "leave out --vocabulary, for bytes")
    pieces = tokenizers.ByteLevelBPETokenizer()
    train, held_out = (text.decode("utf-8", "replace") for text in (train, held_out))
    pieces.train_from_iterator(train.splitlines(True), vocabulary, show_progress=True)
    sizes = np.ones(vocabulary)
    for piece, token in pieces.get_vocab().items():
        sizes[token] = len(piece)  # one character for each byte
    return *(np.array(pieces.encode(text).ids) for text in (train, held_out)), sizes


def windows(ids, starts, length):
    """Tokens from the places in `starts` on, and those that follow them: both (starts, length)."""
    window = ids[starts.astype(int)[:, None] + np.arange(length + 1)].astype("int32")
    return window[:, :-1], window[:, 1:]


def rows_of_source(count, length, seed=0, part=0, parts=1):
    """Bytes of Python's own source code and those that follow them, both (rows, length): of `count`
    rows one of `parts` parts."""
    text = np.frombuffer(read_text(None, None)[0], np.uint8)
    starts = np.random.default_rng(seed).random(count)[part::parts]
    return windows(text, starts * (len(text) - length - 1), length)
