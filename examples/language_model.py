"""Trains a byte-level xLSTM language model on the source code of Python's own standard library.

    python examples/language_model.py --steps 300

Nothing is downloaded: the text is what this Python came with, read through a TensorFlow Datasets
builder that needs no TensorFlow. Runs on any backend: KERAS_BACKEND=jax (default), torch or
tensorflow. Writes model.keras, sample.txt and loss.png.
"""

import argparse
import os
import pathlib
import sysconfig

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib
import numpy as np
import tensorflow_datasets as tfds

from keras_xlstm.models import exclude_from_weight_decay, xLSTMLanguageModel

matplotlib.use("agg")
import matplotlib.pyplot as plt


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
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(held_out),
        }

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
    _, triple_counts = np.unique(pairs * 256 + data[2:], return_counts=True)
    _, pair_counts = np.unique(pairs, return_counts=True)
    n = len(pairs)
    return (
        np.sum(pair_counts * np.log2(pair_counts)) - np.sum(triple_counts * np.log2(triple_counts))
    ) / n


def bits_per_byte(y_true, y_pred):
    loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    return loss / np.log(2)


def plot(history, entropy, path):
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = np.arange(1, len(history["bits_per_byte"]) + 1)
    axis.plot(epochs, history["bits_per_byte"], marker="o", label="training")
    axis.plot(epochs, history["val_bits_per_byte"], marker="o", label="held-out files")
    axis.axhline(
        entropy, color="gray", linestyle="--", label="order-2 entropy of the held-out files"
    )
    axis.set(
        xlabel="epoch",
        ylabel="bits per byte",
        title="Byte-level xLSTM on Python's standard library",
    )
    axis.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=320, help="training steps in all (default 320)"
    )
    parser.add_argument(
        "--epochs", type=int, default=8, help="the steps are shown in so many epochs (default 8)"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="bytes per window (default 256)")
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument(
        "--pattern", default="1:1", help="mLSTM:sLSTM blocks, in turn (default 1:1)"
    )
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--held-out-bytes", type=int, default=131072, help="how much to evaluate on"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/language_model"))
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = (read_bytes(args.out / "data", split) for split in ("train", "validation"))
    entropy = order_2_entropy(held_out)
    windows = max(1, args.held_out_bytes // args.length)  # spread over all held-out files
    start = np.linspace(0, len(held_out) - args.length - 1, windows).astype(int)[:, None]
    window = held_out[start + np.arange(args.length + 1)].astype("int32")
    validation = window[:, :-1], window[:, 1:]
    print(
        f"Keras on {keras.backend.backend()}: {len(train):,} bytes to train on, "
        f"{len(held_out):,} held out"
    )

    model = xLSTMLanguageModel(
        256, args.units, args.blocks, num_heads=args.heads, pattern=args.pattern, name="byte_xlstm"
    )
    model.summary()
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, args.steps, warmup_target=4e-3, warmup_steps=max(1, args.steps // 20), alpha=0.05
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.1, clipnorm=1.0)
    model.compile(
        exclude_from_weight_decay(optimizer, model),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[bits_per_byte],
    )
    batches = Windows(train, max(1, args.steps // args.epochs), args.batch_size, args.length)
    history = model.fit(
        batches, epochs=args.epochs, validation_data=validation, validation_batch_size=64
    ).history

    model.save(args.out / "model.keras")
    model = keras.models.load_model(
        args.out / "model.keras", custom_objects={"bits_per_byte": bits_per_byte}
    )
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
