"""Models over several devices: weights cut along axes on JAX, FSDP2 on torch, time shared out."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras

from keras_xlstm import backends
from keras_xlstm.models.stack import StackModel

__all__ = ["ContextParallel", "ModelParallel", "context_parallel", "fully_shard"]

_CUT, _BATCH = "cut", "batch"
# How the variables of our layers are cut, by the end of their path and their rank. Whole heads stay
# together; a projection out is cut where the projection in before it was, so that the two need one
# sum over the devices.
_LAYOUTS = {
    # heads
    (r"(query|key|value|input_gate|forget_gate|output_gate)/kernel", 2): (None, _CUT),
    (r"(query|key|value|input_gate|forget_gate|cell_input|output_gate)/kernel", 3): (_CUT,),
    (r"(query|key|value|input_gate|forget_gate|output_gate)/bias", 1): (_CUT,),
    (r"(query|key|value)/bias", 2): (_CUT,),
    (r"recurrent_kernel", 4): (_CUT,),
    (r"bias", 3): (None, _CUT),
    (r"gates/kernel", 2): (None, _CUT),
    (r"convolution/kernel", 2): (None, _CUT),
    (r"convolution/bias", 1): (_CUT,),
    (r"head_norm/gamma", 1): (_CUT,),
    (r"skip", 1): (_CUT,),
    (r"output_projection/kernel", 2): (_CUT,),
    # carried states: those of a matrix memory, and the vectors of sLSTM
    (r"state_C", 4): (_BATCH, _CUT),
    (r"state_n", 3): (_BATCH, _CUT),
    (r"state_[hcnm]", 2): (_BATCH, _CUT),
    # channels
    (r"up_projection/kernel", 2): (None, _CUT),
    (r"up_projection/bias", 1): (_CUT,),
    (r"down_projection/kernel", 2): (_CUT,),
    # vocabulary
    (r"embedding/embeddings", 2): (_CUT,),
    (r"head/kernel", 2): (None, _CUT),
    # on every device: what is added to all features of a token, and what is small
    (r"(down_projection|output_projection)/bias", 1): (),
    (r"(feed_forward_)?norm/(gamma|scale)", 1): (),
    (r"lora_kernel_[ab]", 2): (),
}


class ModelParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that knows how to cut this package's layers and models.

    One axis of the mesh shares out the batch, the other one the model: heads with all that belongs
    to them (the states of `stateful` layers too), the hidden units of feed-forward blocks, and the
    vocabulary. On JAX alone, as far as Keras 3.15 goes. Set it before the model is made:

        keras.distribution.set_distribution(ModelParallel(device_mesh))

    Args:
        device_mesh: `keras.distribution.DeviceMesh` with two axes.
        layout_map: `keras.distribution.LayoutMap` for layers of other origin; what it matches goes
            by it, and all else that is not of this package is on every device.
        batch_dim_name: the axis of the mesh that shares out the batch; None takes the first.
        auto_shard_dataset: as in `keras.distribution.ModelParallel`.

    Raises:
        ValueError: where Keras runs on another backend, and where the mesh has not two axes. When a
            model is made: where the devices do not divide its heads, hidden units or vocabulary.

    Example:

    >>> if keras.backend.backend() == "jax":
    ...     devices = keras.distribution.list_devices()[:2]
    ...     mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    ...     with keras_xlstm.distribution.ModelParallel(mesh).scope():
    ...         model = keras_xlstm.models.xLSTMLanguageModel(256, units=64, num_blocks=2)
    """

    def __init__(self, device_mesh, layout_map=None, batch_dim_name=None, auto_shard_dataset=True):
        _needs("jax", "ModelParallel")
        batch_dim_name, self.model_dim_name = _two_axes(device_mesh, batch_dim_name, "the model")
        if layout_map is None:
            layout_map = keras.distribution.LayoutMap(device_mesh)
        super().__init__(
            layout_map=layout_map,
            batch_dim_name=batch_dim_name,
            auto_shard_dataset=auto_shard_dataset,
        )
        self._sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))

    def get_variable_layout(self, variable):
        """The layout of a variable, by its path and shape."""
        layout = super().get_variable_layout(variable)
        axes = axes_of(variable.path, len(variable.shape))
        if any(layout.axes) or not axes or self.get_tensor_layout(variable.path) is not None:
            return layout
        names = {_BATCH: self.batch_dim_name, _CUT: self.model_dim_name, None: None}
        axes = [names[axis] for axis in axes]
        for axis, (name, size) in enumerate(zip(axes, variable.shape, strict=False)):
            if name is not None and size % self._sizes[name]:
                raise ValueError(
                    f"{variable.path} of shape {tuple(variable.shape)} cannot be shared out among "
                    f"the {self._sizes[name]} devices along {name!r} of the mesh: its axis {axis} "
                    "must be a multiple of them. Choose `num_heads`, the vocabulary's size and "
                    "other sizes so, or a mesh with fewer devices along that axis."
                )
        axes += [None] * (len(variable.shape) - len(axes))
        return keras.distribution.TensorLayout(axes, self.device_mesh)


class ContextParallel(keras.distribution.ModelParallel):
    """Time shared out among devices, for sequences that are too long for one (context parallelism).

    One axis of the mesh shares out the batch, the other one time: each device has a stretch of
    every sequence, of inputs, of labels and of all that layers make of them. Every device has all
    weights. mLSTM gathers the memory that each stretch leaves, (C, n, m), and starts every stretch
    from what comes before it: outputs, states and gradients are those of one device. XLA shares out
    all other layers. On JAX; on torch take `context_parallel`. Set it before the model is made:

        keras.distribution.set_distribution(ContextParallel(device_mesh))

    Args:
        device_mesh: `keras.distribution.DeviceMesh` with two axes.
        batch_dim_name: the axis of the mesh that shares out the batch; None takes the first.
        auto_shard_dataset: as in `keras.distribution.ModelParallel`.

    Raises:
        ValueError: where Keras runs on another backend, and where the mesh has not two axes. When a
            model is called: for a length that the devices do not divide, and for sLSTM, which
            reads steps one after another.

    Example:

    >>> if keras.backend.backend() == "jax":
    ...     devices = keras.distribution.list_devices()[:2]
    ...     mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "time"), devices)
    ...     with keras_xlstm.distribution.ContextParallel(mesh).scope():
    ...         layer = keras_xlstm.layers.mLSTM(8, return_sequences=True)
    ...         y = layer(np.ones((1, 16, 4)))
    """

    def __init__(
        self,
        device_mesh: keras.distribution.DeviceMesh,
        batch_dim_name: str | None = None,
        auto_shard_dataset: bool = True,
    ) -> None:
        _needs("jax", "ContextParallel", "On torch, take context_parallel.")
        batch_dim_name, self.time_dim_name = _two_axes(device_mesh, batch_dim_name, "time")
        super().__init__(
            layout_map=keras.distribution.LayoutMap(device_mesh),
            batch_dim_name=batch_dim_name,
            auto_shard_dataset=auto_shard_dataset,
        )

    def get_data_layout(self, data_shape: Any) -> keras.distribution.TensorLayout:
        """The batch and, where the devices divide it, the axis behind it are shared out."""
        axes = [self.batch_dim_name, self.time_dim_name, *[None] * len(data_shape)]
        axes = axes[: len(data_shape)]
        sizes = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
        if len(axes) > 1 and data_shape[1] % sizes[self.time_dim_name]:
            axes[1] = None
        return keras.distribution.TensorLayout(axes, self.device_mesh)


@contextlib.contextmanager
def context_parallel(group: Any = None) -> Iterator[None]:
    """Inside, each process of `torch.distributed` has a stretch of every sequence: time is shared
    out among them, for sequences that are too long for one device. On torch.

    The processes' stretches follow one another in the order of their ranks. mLSTM gathers the
    memory that each leaves, (C, n, m), and starts each from what comes before it; convolutions get
    the last steps before it. Outputs are those of the process's own stretch. States are those at
    the start and end of the whole sequence, the same in all processes.

    Gradients reach the stretches of other processes, so all of them call `backward`; the gradient
    of a weight is then the sum over the processes. `DistributedDataParallel` over them makes it the
    mean, as for a loss that is the mean over all steps.

    Args:
        group: the `torch.distributed.ProcessGroup` that shares out time; None is all processes.

    Raises:
        ValueError: where Keras runs on another backend, where `torch.distributed` is not
            initialised, and, when a layer is called, for sLSTM, `go_backwards` and
            `jit_compile=True`.

    Example, `torchrun --nproc-per-node 2 train.py`:

        torch.distributed.init_process_group()
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        keras.utils.set_random_seed(0)
        model = xLSTMLanguageModel(256, units=64, num_blocks=2)
        layer = keras.layers.TorchModuleWrapper(DistributedDataParallel(model))
        trained = keras.Sequential([layer])
        trained.compile("adam", SparseCategoricalCrossentropy(from_logits=True))
        with context_parallel():
            trained.fit(np.split(x, count, axis=1)[rank], np.split(y, count, axis=1)[rank])
        if rank == 0:
            model.save("model.keras")
    """
    _needs("torch", "context_parallel", "On JAX, take ContextParallel.")
    with backends.load("context").among(group):
        yield


def fully_shard(model, **options):
    """The model as a `torch.nn.Module` under FSDP2: every process of `torch.distributed` holds a
    slice of each weight, its gradient and its optimizer's state. On torch.

    `torch.distributed.fsdp.fully_shard` itself cannot take a Keras model: it swaps the parameters
    of modules, which Keras does not read, when modules are called, which Keras does past PyTorch.
    The module returned has the model's weights as parameters of its own; FSDP2 puts those of one
    block at a time together. Train it as PyTorch trains modules, with one of `torch.optim` made
    after this call. The Keras model is without weights then, until `module.gather()`.

    Args:
        model: `xLSTMLanguageModel` or `xLSTMStack`, equal in all processes: give them one seed,
            or load a file. Not compiled with `jit_compile=True`.
        **options: of `torch.distributed.fsdp.fully_shard`: `mesh`, `reshard_after_forward` and so
            on.

    Returns:
        A module: `module(inputs, training=True)` gives what `model(inputs, training=...)` gives,
        and `module.gather()`, called by every process, puts the weights into the Keras model, to
        save it or to generate with it.

    Raises:
        ValueError: where Keras runs on another backend, for other models, and where
            `torch.distributed` is not initialised.

    Example, `torchrun --nproc-per-node 2 train.py`:

        torch.distributed.init_process_group()
        keras.utils.set_random_seed(0)
        model = xLSTMLanguageModel(256, units=64, num_blocks=2)
        module = fully_shard(model)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
        for inputs, labels in batches:  # this process's own
            optimizer.zero_grad()
            loss = cross_entropy(module(inputs).flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
        module.gather()
        model.save("model.keras")
    """
    _needs("torch", "fully_shard")
    if not isinstance(model, StackModel):
        raise ValueError(
            "`model` must be an xLSTMLanguageModel or an xLSTMStack. "
            f"Received: {type(model).__name__}."
        )
    if any(block.runner is not type(block).runner for block in model.blocks):
        raise ValueError(
            "`model` was compiled with jit_compile=True, which does not go together with "
            "fully_shard. Compile it with jit_compile=False, or not at all."
        )
    return backends.load("fsdp").sharded(model, options)


def _two_axes(device_mesh, batch_dim_name, other):
    """The names of both axes of a mesh, that of the batch first."""
    names = tuple(device_mesh.axis_names)
    batch_dim_name = batch_dim_name or names[0]
    if len(names) != 2 or batch_dim_name not in names:
        raise ValueError(
            "`device_mesh` must have two axes, `batch_dim_name` and another one to share out "
            f"{other}. Received: axes {names}, batch_dim_name={batch_dim_name!r}."
        )
    return batch_dim_name, next(name for name in names if name != batch_dim_name)


def _needs(backend, what, remedy=""):
    active = keras.backend.backend()
    if active != backend:
        raise ValueError(
            f"{what} runs on the {backend} backend. Received: Keras on {active}. "
            f"{remedy}{' ' * bool(remedy)}See docs/devices.md for what there is on each."
        )


def axes_of(path, rank):
    """How a variable is cut: "cut", "batch" or None for each of its first axes, the rest whole;
    None if it is not of this package."""
    for (pattern, of_rank), axes in _LAYOUTS.items():
        if rank == of_rank and re.fullmatch(f"(.*/)?{pattern}", path):
            return axes
    return None
