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
import sys
import tempfile
import time

ENGINES = dict.fromkeys(("data-parallel", "model-parallel"), "jax")
ENGINES |= {"ddp": "torch", "fsdp": "torch", "mirrored": "tensorflow"}
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

import common
import keras

from keras_xlstm.distribution import ModelParallel, fully_shard

if ENGINES[args.engine] == "torch":
    import torch


def read(part=0, parts=1):
    """Bytes (rows, length), and those that follow them; of every batch one of its parts."""
    return common.rows_of_source(args.steps * args.batch_size, args.length, 0, part, parts)


def fit(model, x, y):
    """An epoch; returns its loss."""
    return model.fit(x, y, len(x) // args.steps, shuffle=False).history["loss"][0]


def train(epoch):
    """Calls `epoch()`, which returns a loss, again and again."""
    for n in range(args.epochs):
        start, loss = time.perf_counter(), epoch()
        if ENGINES[args.engine] == "torch":  # where it is the loss of a process: to their mean
            loss = keras.ops.convert_to_tensor(loss) / args.devices
            torch.distributed.all_reduce(loss)
        speed = args.steps * args.batch_size * args.length / (time.perf_counter() - start)
        print(f"epoch {n + 1}: loss {loss:.4f}, {speed:,.0f} tokens/s", flush=True)


def on_jax():
    devices = keras.distribution.list_devices()[: args.devices]
    distribution = keras.distribution.DataParallel(devices=devices)
    if args.engine == "model-parallel":  # a pair of devices has the model, and a part of the batch
        shape, names = (args.devices // 2, 2), ("batch", "model")
        distribution = ModelParallel(keras.distribution.DeviceMesh(shape, names, devices))
    keras.distribution.set_distribution(distribution)
    return common.compiled(common.small_language_model())


def on_tensorflow():
    import tensorflow as tf

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU":
        parts = [tf.config.LogicalDeviceConfiguration()] * args.devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    with tf.distribute.MirroredStrategy([f"{kind}:{n}" for n in range(args.devices)]).scope():
        return common.compiled(
            common.small_language_model(), jit_compile=False
        )  # Keras cannot compile a mirrored step


def on_torch(rank, store):
    """One of the processes; the first one speaks, and writes the model."""
    if rank:
        sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(max(1, os.cpu_count() // args.devices))
    if on_gpu := torch.cuda.is_available():
        torch.cuda.set_device(rank)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": args.devices}
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", **options)
    model, data = common.small_language_model(), read(rank, args.devices)
    if args.engine == "ddp":
        layer = keras.layers.TorchModuleWrapper(torch.nn.parallel.DistributedDataParallel(model))
        trained = common.compiled(keras.Sequential([layer]))
        train(lambda: fit(trained, *data))
    else:
        module = fully_shard(model)
        optimizer = torch.optim.AdamW(module.parameters(), 4e-3)
        train(lambda: loop(module, optimizer, *data))
        module.gather()
    if rank == 0:
        model.save(args.out)
    torch.distributed.barrier()  # the file is whole before a process ends
    sys.stdout.flush()
    os._exit(0)  # threads of PyTorch's have ended Python with SIGABRT while it was finishing


def loop(module, optimizer, *data):
    """An epoch as PyTorch does it, which FSDP2 needs; returns its loss."""
    x, y = (keras.ops.convert_to_tensor(a).long().chunk(args.steps) for a in data)
    losses, bar = [], keras.utils.Progbar(args.steps)
    for inputs, targets in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.add(1, [("loss", losses[-1])])
    return sum(losses) / len(losses)


if __name__ == "__main__":
    if ENGINES[args.engine] == "torch":
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_torch, (f"{folder}/store",), args.devices)
    else:
        model = on_jax() if ENGINES[args.engine] == "jax" else on_tensorflow()
        data = read()
        train(lambda: fit(model, *data))
        model.save(args.out)
    print(f"wrote {args.out}")
