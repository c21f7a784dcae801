"""Trains a byte-level xLSTM language model on the source code of Python's own standard library.

    python examples/language_model.py --steps 300

Nothing is downloaded: the text is what this Python came with, read through a TensorFlow Datasets
builder that needs no TensorFlow. Writes model.keras, sample.txt and loss.png.
"""

import argparse
import os
import pathlib
import sysconfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], help="Keras's")
parser.add_argument("--steps", type=int, default=320, help="training steps in all")
parser.add_argument("--epochs", type=int, default=8, help="which the steps are shown in")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--length", type=int, default=256, help="bytes per window")
parser.add_argument("--units", type=int, default=128)
parser.add_argument("--blocks", type=int, default=2)
parser.add_argument("--pattern", default="1:1", help="mLSTM:sLSTM blocks, in turn")
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--held-out-bytes", type=int, default=131072, help="to evaluate on")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/language_model"))
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = args.backend or os.environ.get("KERAS_BACKEND", "jax")

import keras
import numpy as np
import tensorflow_datasets as tfds
from keras.optimizers.schedules import CosineDecay
from matplotlib.figure import Figure

from keras_xlstm.models import exclude_from_weight_decay, xLSTMLanguageModel


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """The standard library's modules, one per example; every tenth is held out."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        paths = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        held_out = paths[::10]
        train = sorted(set(paths) - set(held_out))
        splits = {"train": train, "validation": held_out}
        return {name: self._generate_examples(paths) for name, paths in splits.items()}

    def _generate_examples(self, paths):
        for path in paths:
            yield str(path), {"text": path.read_bytes().decode("utf-8", "replace")}


def read_bytes(data_dir, split):
    builder = PythonSource(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return np.frombuffer(b"\n\n".join(x["text"] for x in builder.as_data_source(split)), np.uint8)


class Windows(keras.utils.PyDataset):
    """Random windows of the training bytes: inputs, and the same one byte later."""

    def __init__(self, data, steps, batch_size, length, seed=0):
        super().__init__()
        self.data, self.steps, self.shape = data, steps, (batch_size, length)
        self.rng = np.random.default_rng(seed)

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        batch_size, length = self.shape
        start = self.rng.integers(0, len(self.data) - length - 1, (batch_size, 1))
        window = self.data[start + np.arange(length + 1)].astype("int32")
        return window[:, :-1], window[:, 1:]


def order_2_entropy(data):
    """Bits per byte of the best guess from the two bytes before, with these data's own counts."""
    pairs = data[:-2].astype("int64") * 256 + data[1:-1]
    counts = (np.unique(x, return_counts=True)[1] for x in (pairs, pairs * 256 + data[2:]))
    pair_bits, triple_bits = (np.sum(count * np.log2(count)) for count in counts)
    return (pair_bits - triple_bits) / len(pairs)


def bits_per_byte(y_true, y_pred):
    loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    return loss / np.log(2)


def plot(history, entropy, path):
    axis = Figure(figsize=(7, 4), layout="constrained").subplots()
    epochs = range(1, len(history["bits_per_byte"]) + 1)
    axis.plot(epochs, history["bits_per_byte"], marker="o", label="training")
    axis.plot(epochs, history["val_bits_per_byte"], marker="o", label="held-out files")
    axis.axhline(entropy, color="gray", linestyle="--", label="order-2 entropy, held-out files")
    axis.set(xlabel="epoch", ylabel="bits per byte", title="Byte-level xLSTM on Python's library")
    axis.legend()
    axis.figure.savefig(path, dpi=150)


def main():
    keras.utils.set_random_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = (read_bytes(args.out / "data", split) for split in ("train", "validation"))
    entropy = order_2_entropy(held_out)
    windows = max(1, args.held_out_bytes // args.length)  # spread over all held-out files
    start = np.linspace(0, len(held_out) - args.length - 1, windows).astype(int)[:, None]
    window = held_out[start + np.arange(args.length + 1)].astype("int32")
    validation = window[:, :-1], window[:, 1:]
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out")
    model = xLSTMLanguageModel(
        256, args.units, args.blocks, num_heads=args.heads, pattern=args.pattern, name="byte_xlstm"
    )
    model.summary()
    warm_up = max(1, args.steps // 20)
    rate = CosineDecay(0.0, args.steps, 0.05, warmup_target=4e-3, warmup_steps=warm_up)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1, clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(exclude_from_weight_decay(optimizer, model), loss, metrics=[bits_per_byte])
    batches = Windows(train, max(1, args.steps // args.epochs), args.batch_size, args.length)
    history = model.fit(
        batches, epochs=args.epochs, validation_data=validation, validation_batch_size=64
    ).history

    model.save(args.out / "model.keras")
    metrics = {"bits_per_byte": bits_per_byte}
    model = keras.models.load_model(args.out / "model.keras", custom_objects=metrics)
    _, held_out_bits = model.evaluate(*validation, batch_size=64, verbose=0)
    plot(history, entropy, args.out / "loss.png")
    [text] = model.generate([list(b"def ")], 400, temperature=0.7, seed=0)
    text = bytes(text.tolist()).decode("utf-8", "replace")
    (args.out / "sample.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}\n\nheld-out loss of the loaded model: {held_out_bits:.3f} bits per byte")
    print(f"order-2 entropy of the held-out files:  {entropy:.3f} bits per byte")
    print(f"wrote model.keras, sample.txt and loss.png to {args.out}")


if __name__ == "__main__":
    main()
