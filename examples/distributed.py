"""Trains a byte-level language model on several devices, with the engines of each framework.

    python examples/distributed.py --engine data-parallel    # JAX: a device has a part of the batch
    python examples/distributed.py --engine model-parallel   # JAX: and of the model
    python examples/distributed.py --engine ddp              # torch: a process for each device
    python examples/distributed.py --engine fsdp             # torch: and weights in slices
    python examples/distributed.py --engine mirrored         # TensorFlow

On the GPUs that there are; otherwise on parts of the CPU, to see that it works. The text is the
source code of Python's own standard library. The engine decides on the Keras backend.
"""

import argparse
import os
import pathlib
import tempfile
import time

ENGINES = {
    "data-parallel": "jax", "model-parallel": "jax", "ddp": "torch", "fsdp": "torch",
    "mirrored": "tensorflow",
}  # fmt: skip
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--engine", choices=ENGINES, required=True)
parser.add_argument("--devices", type=int, default=2)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--steps", type=int, default=20, help="of an epoch")
parser.add_argument("--batch-size", type=int, default=16, help="of all devices together")
parser.add_argument("--length", type=int, default=128, help="bytes of a row")
parser.add_argument("--out", default="model.keras", help="where the model is written")
args = parser.parse_args()
if args.batch_size % args.devices or (args.engine == "model-parallel" and args.devices % 2):
    parser.error("--batch-size must be a multiple of --devices, which are even for model-parallel")
os.environ["KERAS_BACKEND"] = ENGINES[args.engine]
flags = os.environ.get("XLA_FLAGS", "")  # of JAX; this one is about the CPU alone
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.devices}"

import keras
import numpy as np

from keras_xlstm.distribution import ModelParallel, fully_shard
from keras_xlstm.models import xLSTMLanguageModel


def read_batches():
    """(steps, batch, length + 1) bytes."""
    paths = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), "uint8").astype("int32")
    shape = (args.steps, args.batch_size, 1)
    start = np.random.default_rng(0).integers(0, len(text) - args.length - 1, shape)
    return text[start + np.arange(args.length + 1)]


def language_model():
    keras.utils.set_random_seed(0)  # the same weights in every process
    return xLSTMLanguageModel(256, units=64, num_blocks=2, num_heads=4, pattern="1:1")


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(4e-3), loss, **options)
    return model


def fit(model, batches, show=True):
    """An epoch; returns its loss."""
    rows = batches.reshape(-1, args.length + 1)
    options = {"batch_size": batches.shape[1], "shuffle": False, "verbose": int(show)}
    return model.fit(rows[:, :-1], rows[:, 1:], **options).history["loss"][0]


def train(epoch, show=True):
    """Calls `epoch()`, which returns a loss, again and again."""
    for n in range(args.epochs):
        start = time.perf_counter()
        loss = epoch()
        speed = args.steps * args.batch_size * args.length / (time.perf_counter() - start)
        if show:
            print(f"epoch {n + 1}: loss {loss:.4f}, {speed:,.0f} tokens/s", flush=True)


def on_jax():
    from keras.distribution import DataParallel, DeviceMesh, list_devices

    devices = list_devices()[: args.devices]
    distribution = DataParallel(devices=devices)
    if args.engine == "model-parallel":  # a pair of devices has the model, and a part of the batch
        mesh = DeviceMesh((args.devices // 2, 2), ("batch", "model"), devices)
        distribution = ModelParallel(mesh)
    keras.distribution.set_distribution(distribution)
    return compiled(language_model())


def on_tensorflow():
    import tensorflow as tf

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU":
        parts = [tf.config.LogicalDeviceConfiguration()] * args.devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    with tf.distribute.MirroredStrategy([f"{kind}:{n}" for n in range(args.devices)]).scope():
        return compiled(language_model(), jit_compile=False)  # Keras cannot compile a mirrored step


def on_torch(rank, store):
    """One of the processes; the first one speaks."""
    import torch

    on_gpu, first = torch.cuda.is_available(), rank == 0
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // args.devices))
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": args.devices}
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", **options)
    batches = np.split(read_batches(), args.devices, axis=1)[rank]
    model = language_model()

    def mean(loss):
        loss = keras.ops.convert_to_tensor(loss)
        torch.distributed.all_reduce(loss)
        return loss.item() / args.devices

    if args.engine == "ddp":
        layer = keras.layers.TorchModuleWrapper(torch.nn.parallel.DistributedDataParallel(model))
        trained = compiled(keras.Sequential([layer]))
        train(lambda: mean(fit(trained, batches, first)), first)
    else:
        module = fully_shard(model)
        optimizer = torch.optim.AdamW(module.parameters(), 4e-3)
        train(lambda: mean(loop(module, optimizer, batches, first)), first)
        module.gather()
    if first:
        model.save(args.out)
    torch.distributed.destroy_process_group()


def loop(module, optimizer, batches, show):
    """An epoch as PyTorch does it, which FSDP2 needs; returns its loss."""
    import torch

    total, bar = 0.0, keras.utils.Progbar(len(batches), verbose=int(show))
    for batch in keras.ops.convert_to_tensor(batches).long():
        optimizer.zero_grad()
        logits = module(batch[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        total += loss.item()
        bar.add(1, [("loss", loss.item())])
    return total / len(batches)


if __name__ == "__main__":
    if ENGINES[args.engine] == "torch":
        import torch

        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_torch, (f"{folder}/store",), args.devices)
    else:
        model = on_jax() if ENGINES[args.engine] == "jax" else on_tensorflow()
        batches = read_batches()
        train(lambda: fit(model, batches))
        model.save(args.out)
    print(f"wrote {args.out}")
