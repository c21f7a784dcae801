"""Trains a byte-level language model in processes of one machine or many, and goes on after a stop.

Each process is started with the same command; docs/devices.md has them for SLURM, too.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        --max-restarts 3 examples/several_machines.py --engine fsdp    # or ddp
    python examples/several_machines.py --engine jax --processes 2 --process 0 \\
        --coordinator HOST:29500
    TF_CONFIG='{"cluster": {"worker": ["HOST:29500", "HOST2:29500"]}, "task": {"type": "worker",
        "index": 0}}' python examples/several_machines.py --engine tensorflow

Each process reads its own rows of every batch. After each epoch the first process writes the model
and the optimizer. A run that finds them goes on from there, so a run that was stopped is started
again by the same command. All processes must see the folder of the checkpoint.
"""

import argparse
import os
import pathlib

BACKENDS = {"ddp": "torch", "fsdp": "torch", "jax": "jax", "tensorflow": "tensorflow"}
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--engine", choices=BACKENDS, required=True)
parser.add_argument("--coordinator", help="jax: HOST:PORT of process 0; on SLURM it is found")
parser.add_argument("--processes", type=int, help="jax: how many; on SLURM it is found")
parser.add_argument("--process", type=int, help="jax: which one this is, from 0 on")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--steps", type=int, default=20, help="of an epoch")
parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
parser.add_argument("--length", type=int, default=128, help="bytes of a row")
parser.add_argument("--checkpoint", default="checkpoint", type=pathlib.Path, help="a folder")
args = parser.parse_args()
os.environ["KERAS_BACKEND"] = BACKENDS[args.engine]

import common
import keras
import numpy as np

from keras_xlstm.distribution import fully_shard


def rows_of_a_batch(parts):
    """Of one of the parts, which are equal."""
    if args.batch_size % parts:
        raise SystemExit(f"--batch-size {args.batch_size} must be a multiple of {parts} devices")
    return args.batch_size // parts


def read(epoch, process, processes):
    """The bytes (rows, length) of an epoch that one process trains on, and those after them."""
    rows = args.steps * rows_of_a_batch(processes) * processes
    return common.rows_of_source(rows, args.length, epoch, process, processes)


def finished_epochs():
    """By the name of the newest checkpoint: of one that is being written the name is another."""
    return max([int(path.name) for path in args.checkpoint.glob("[0-9]*")], default=0)


def train(epoch_of, save, process, barrier=None):
    """`epoch_of(epoch)` trains one and returns its loss; `save(folder)` is called by the first
    process, or by all where there is a barrier for them."""
    for epoch in range(finished_epochs(), args.epochs):
        loss = epoch_of(epoch)
        part, whole = args.checkpoint / f"part-{epoch + 1}", args.checkpoint / f"{epoch + 1}"
        if process == 0:
            print(f"epoch {epoch + 1}: loss {loss:.6f}", flush=True)
        if process == 0 or barrier:
            part.mkdir(parents=True, exist_ok=True)
            save(part)
        if barrier:
            barrier()
        if process == 0:
            part.rename(whole)  # it has its name when it is whole


def fit(model, epoch, process, processes):
    x, y = read(epoch, process, processes)
    options = {"shuffle": False, "verbose": 0}
    return model.fit(x, y, rows_of_a_batch(processes), **options).history["loss"][0]


def load_or_make(**options):
    if epoch := finished_epochs():
        return keras.models.load_model(args.checkpoint / f"{epoch}" / "model.keras")
    return common.compiled(common.small_language_model(), **options)


def on_jax():
    keras.utils.set_random_seed(0)
    keras.distribution.initialize(args.coordinator, args.processes, args.process)
    import jax

    process, processes = jax.process_index(), jax.process_count()
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    model = load_or_make()

    def save(folder):  # what Keras makes to write a file is this process's alone
        keras.distribution.set_distribution(None)
        model.save(folder / "model.keras")
        keras.distribution.set_distribution(parallel)

    train(lambda epoch: fit(model, epoch, process, processes), save, process)
    jax.distributed.shutdown()


def on_tensorflow():
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    task = strategy.cluster_resolver
    process, processes = task.task_id, len(task.cluster_spec().as_dict()["worker"])
    with strategy.scope():
        model = load_or_make(jit_compile=False)
        model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(batch):
        # Not `fit`: Keras 3.15 takes means over workers of ids and of losses in ways that fail.
        loss = strategy.run(model.train_step, args=(batch,))["loss"]
        return strategy.reduce("MEAN", loss, axis=None)

    def epoch_of(epoch):
        x, y = read(epoch, process, processes)
        rows = rows_of_a_batch(strategy.num_replicas_in_sync)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(rows)
        model.reset_metrics()
        for batch in strategy.distribute_datasets_from_function(lambda context: data):
            loss = step(batch)
        return float(loss)

    train(epoch_of, lambda folder: model.save(folder / "model.keras"), process)


def with_fsdp(process, processes, mean):
    """Every process writes its slices, and reads them again, on as many processes or others."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    module = fully_shard(common.small_language_model())
    optimizer = torch.optim.AdamW(module.parameters(), 4e-3)
    if epoch := finished_epochs():
        weights, slots = get_state_dict(module, optimizer)
        state = {"weights": weights, "optimizer": slots}
        checkpoint.load(state, checkpoint_id=args.checkpoint / f"{epoch}")
        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
        )

    def epoch_of(epoch):
        x, y = (
            keras.ops.convert_to_tensor(a).long().chunk(args.steps)
            for a in read(epoch, process, processes)
        )
        losses = []
        for inputs, targets in zip(x, y, strict=True):
            optimizer.zero_grad()
            logits = module(inputs).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return mean(sum(losses) / len(losses))

    def save(folder):
        weights, slots = get_state_dict(module, optimizer)
        checkpoint.save({"weights": weights, "optimizer": slots}, checkpoint_id=folder)

    train(epoch_of, save, process, torch.distributed.barrier)


def on_torch():
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def mean(loss):
        loss = torch.as_tensor(loss, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
        torch.distributed.all_reduce(loss)
        return loss.item() / processes

    if args.engine == "ddp":
        layer = torch.nn.parallel.DistributedDataParallel(common.small_language_model())
        model = common.compiled(keras.Sequential([keras.layers.TorchModuleWrapper(layer)]))
        model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        if epoch := finished_epochs():
            with np.load(args.checkpoint / f"{epoch}" / "all.npz") as arrays:
                for variable, name in zip(variables, arrays, strict=True):
                    variable.assign(arrays[name])

        def save(folder):
            np.savez(folder / "all.npz", *map(keras.ops.convert_to_numpy, variables))

        train(lambda epoch: mean(fit(model, epoch, process, processes)), save, process)
    else:
        with_fsdp(process, processes, mean)
    torch.distributed.barrier()
    os._exit(0)  # threads of PyTorch's have ended Python with SIGABRT while it was finishing


if __name__ == "__main__":
    {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[BACKENDS[args.engine]]()
