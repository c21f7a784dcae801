"""Training over several devices: python tests/devices.py FOLDER (by test_devices.py).

Prints the losses of every way that the backend has, as JSON, and leaves models in FOLDER.
"""

import contextlib
import json
import os
import pathlib
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BACKEND, FOLDER = os.environ["KERAS_BACKEND"], pathlib.Path(sys.argv[-1])
if BACKEND == "jax" and __name__ == "__main__":
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"  # the last one counts
    os.environ["KERAS_XLSTM_INTERPRET"] = "1"

import keras
import numpy as np
from tools import HAS_PALLAS

import keras_xlstm
from keras_xlstm.models import xLSTMLanguageModel

BATCH, STEPS, EPOCHS = 8, 2, 3
IDS = np.random.default_rng(0).integers(0, 64, (BATCH * STEPS, 21), dtype="int32")
PAPER = {"pattern": "1:1"}
LARGE = {"architecture": "large", "tie_embeddings": True, "remat": True, "dropout": 0.1}


def language_model(**options):
    keras.utils.set_random_seed(0)
    return xLSTMLanguageModel(64, 32, num_blocks=2, num_heads=4, seed=1, **options)


def losses(
    model, ids=IDS, batch_size=BATCH, epochs=EPOCHS, optimizer=None, steps=slice(None), **options
):
    optimizer = optimizer or keras.optimizers.AdamW(1e-2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **options)
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "epochs": epochs}
    return model.fit(ids[:, :-1][:, steps], ids[:, 1:][:, steps], **options).history["loss"]


def evaluated(model):
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model.evaluate(IDS[:, :-1], IDS[:, 1:], batch_size=BATCH, verbose=0)


def on_jax():
    from keras.distribution import DataParallel, DeviceMesh, list_devices

    from keras_xlstm.distribution import ContextParallel, ModelParallel

    def over(distribution, implementation="native", **options):
        with distribution.scope(), keras_xlstm.backends.use(implementation):
            model = language_model(**options)
            return model, losses(model)

    along = ContextParallel(DeviceMesh((2, 4), ("batch", "time"), list_devices()))
    cut = ModelParallel(DeviceMesh((2, 4), ("batch", "model"), list_devices()))
    with keras_xlstm.backends.use("native"):
        yield "paper, one", losses(language_model(**PAPER), epochs=EPOCHS + 1)
        yield "large, one", losses(language_model(**LARGE))
    yield "large, data", over(DataParallel(), **LARGE)[1]
    yield "large, context", over(along, **LARGE)[1]
    model, found = over(cut, **PAPER)
    yield "paper, model", found
    model.save(FOLDER / "model.keras")
    model.save_weights(FOLDER / "model.weights.h5")
    yield "large, model", over(cut, **LARGE)[1]
    if HAS_PALLAS:
        yield "paper, model, kernels", over(cut, "pallas", **PAPER)[1]


def on_tensorflow():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for name, scope in {"one": contextlib.nullcontext(), "mirrored": strategy.scope()}.items():
        with scope:
            model = language_model(**PAPER)
            epochs = EPOCHS + (name == "one")
            yield f"paper, {name}", losses(model, epochs=epochs, jit_compile=False)
    model.save(FOLDER / "model.keras")
    with strategy.scope():
        model = language_model(**PAPER)
        yield "paper, mirrored, compiled", losses(model, epochs=EPOCHS, jit_compile=True)
        plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        plain.compile("sgd", "mse", jit_compile=True)
    try:
        plain.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
    except tf.errors.InvalidArgumentError:
        yield "Keras compiles a mirrored step", False


def on_torch():
    import torch

    torch.multiprocessing.spawn(process, nprocs=2)
    yield from json.loads((FOLDER / "found.json").read_text()).items()
    # torch.optim's AdamW adds epsilon elsewhere than Keras's; SGD is the same.
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    yield "context, one", losses(language_model(), optimizer=keras.optimizers.AdamW(1e-2))
    for name, optimizer in {"ddp": keras.optimizers.AdamW(1e-2), "fsdp": sgd}.items():
        model = language_model(**PAPER)
        yield f"{name}, one", losses(model, optimizer=optimizer)
        yield f"{name}, one, evaluated", evaluated(model)


def process(rank):
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{FOLDER / 'store'}", rank=rank, world_size=2
    )
    own = IDS.reshape(STEPS, 2, BATCH // 2, -1)[:, rank]
    with keras_xlstm.distribution.context_parallel():
        half = slice(rank * 10, rank * 10 + 10)
        found = {"context": mean_of(losses(with_ddp(language_model(remat=True)), steps=half))}
    model = language_model(**PAPER)
    mine = losses(with_ddp(model), own.reshape(BATCH, -1), BATCH // 2)
    found["ddp"] = mean_of(mine)
    if rank == 0:
        model.save(FOLDER / "ddp.keras")

    model = language_model(**PAPER, remat=True)
    module = keras_xlstm.distribution.fully_shard(model)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    mine = [np.mean([step(module, optimizer, x) for x in own]) for _ in range(EPOCHS)]
    found["fsdp"] = mean_of(mine)
    sizes = [(p.to_local().numel(), p.numel()) for p in module.parameters()]
    found["fsdp, share"] = np.divide(*np.sum(sizes, axis=0))
    module.gather()
    if rank == 0:
        model.save(FOLDER / "fsdp.keras")
        (FOLDER / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # threads of PyTorch's have ended Python with SIGABRT while it was finishing


def with_ddp(model):
    import torch

    parallel = torch.nn.parallel.DistributedDataParallel(model)
    return keras.Sequential([keras.layers.TorchModuleWrapper(parallel)])


def step(module, optimizer, ids):
    import torch

    ids = torch.tensor(ids, dtype=torch.long)
    optimizer.zero_grad()
    logits = module(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def mean_of(mine):
    """Over the processes."""
    import torch

    total = torch.tensor(mine, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return (total / 2).tolist()


if __name__ == "__main__":
    print(json.dumps(dict(globals()[f"on_{BACKEND}"]())))
