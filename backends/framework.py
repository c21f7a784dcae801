"""What a framework provides: every public name of `backends/<framework>/__init__.py`, no others.

The reference is written in these and in `keras.ops`; `backends` hands some on to layers and
models. tests/test_framework.py holds each framework to this list. Shapes: B batch, T time, H heads.
"""

import importlib

import keras

_FRAMEWORKS = ("jax", "tensorflow", "torch")
if keras.backend.backend() not in _FRAMEWORKS:
    raise ImportError(
        f"keras_xlstm runs on {', '.join(_FRAMEWORKS)}. Received: the Keras backend "
        f"{keras.backend.backend()}. Set the environment variable KERAS_BACKEND."
    )


def load(*names):
    """The active framework's folder, or the module of that name in it: `load("export")`."""
    return importlib.import_module(".".join((__package__, keras.backend.backend(), *names)))


framework = load()

# As in keras.ops, but float64 stays float64, and each takes little time to call. `largest` is the
# maximum over an axis, `total` the sum over -1, -2 or both, `constant(x)` x without a gradient.
ARITHMETIC = (
    "tanh", "exp", "log1p", "log_sigmoid", "minimum", "maximum", "largest", "total", "cumsum",
    "swapaxes", "matmul", "constant",
)  # fmt: skip

# None where the framework has nothing better than what its caller does then.
OPTIONAL = (
    "native_slstm", "float32_gate_product", "keep_unfused", "token_losses", "block_runners",
    "captured_train_step", "default_compilation", "without_gradients", "version",
)  # fmt: skip


class Contract:
    """The rest. Flags:"""

    implementations: dict  # {implementation: {op: module here}}; the first that fits is picked
    joined_heads: int  # up to how many units the sLSTM's heads are multiplied as one kernel
    fuses_row_sums: bool  # sum(x * y) is one pass over x, so a product with a vector y is slower
    kernels_take_native: bool  # the native form, which they differentiate for second derivatives
    split_gate_and_up: bool  # two products with halves of a kernel are faster than a cut result

    # Loops and gradients. `step(carry, x) -> (carry, y)` over the first axis of all tensors `xs`.
    def scan(step, init, xs, reverse=False): ...
    # `step(carry, (*chunks of long, *entries of short)) -> (carry, chunks, entries)`. `long` ones
    # (B, N * L, ...) are cut along time, `short` ones (N, ...) are taken apart; what the step
    # returns is put together likewise.
    def scan_chunks(step, init, long, short, reverse=False): ...
    # Calls `forward(*tensors, **options) -> (outputs, residuals)` with the gradient
    # `backward(residuals, output_gradients, **options) -> one gradient (or None) per tensor`.
    # `tensors` may hold None.
    def differentiable(forward, backward, tensors, **options): ...
    # `reference.slstm` by a faster loop; it returns None where the reference itself must run.
    # `plain`: `reference.slstm_forward`, where a gradient is to be differentiated again.
    def native_slstm(
        plain, x, recurrent_kernel, bias, state, hold, reset, recurrent_scale, forget_gate,
        recurrent_gradient_clip,
    ): ...  # fmt: skip

    # Choices.
    def chunk_size(key_dim, value_dim, time): ...  # steps that the mLSTM computes at once
    # Whether the sLSTM's loop had better multiply x by the input kernel step by step.
    def multiplies_inside(batch, time, features, units): ...
    def joined_blocks(): ...  # up to what width a product in blocks is one with zeros between
    def alone_on_device(): ...  # whether no other device holds some of the heads
    # Whether a training step here reads all of its batch and of its weights.
    def whole_batch(): ...

    # Context parallelism. Whether a device has a stretch of the steps alone; how, where a tensor of
    # this process holds its stretch (None: all steps); a function of `common.Stretches` and tensors
    # on every device's stretch, or None where none has one.
    def shares_time(): ...
    def own_stretch(): ...
    def over_stretches(function, *tensors): ...
    def remat(function): ...  # keras.remat, whatever the context is when it computes again

    # Products and sums.
    def turned(x): ...  # (..., M, N) to (..., N, M), to be multiplied by something on the right
    def fusion_barrier(x): ...  # x, which the compiler must not fuse with what uses it
    def keep_unfused(x, kernel): ...  # both, for a product not to be joined with others of x
    # x (B, T, D) by a float32 kernel (D, 2, H), H small, in float32; or None: by two products.
    def float32_gate_product(x, kernel): ...
    # The function of `inference.Inference` by this name, of arguments; it may return None.
    def without_gradients(name, *arguments): ...
    # Cross-entropy (B, T) of logits (B, T, vocabulary) and ids (B, T) in few passes.
    def token_losses(logits, y, dtype): ...

    # Tensors.
    def size(number): ...  # a size as a number, where a tracer has a tensor of it
    def tensor(array): ...  # a NumPy array, bfloat16 too, as a tensor that may keep its memory
    def host_values(x): ...  # as a NumPy array where the host can read x at once; else None
    def signature(first, *others): ...  # equal for equal sizes and dtypes; None: to be converted
    def steps_of(x, steps): ...  # of x (B, T, ...) the steps (B, S): (B, S, ...)
    def concatenate_steps(parts): ...  # along time: tensors (B, T, ...) of one dtype

    # Tracing and files.
    def trace_time(function): ...  # marks one without tensors: it runs while its caller is traced
    def no_autograph(function): ...  # marks one that must be traced as it stands
    def export_of(x): ...  # the `export_context.Export` that x is traced for, or None
    def check_export(x): ...  # refuses x (B, T, ...) where a file could not hold a loop over it
    def changes(variable, x): ...  # whether x's file can hold a variable's new values
    def unsorted(x): ...  # whether no file can hold a sort along axis 1 of x, which is exported
    def activated(activation, x): ...  # activation(x) by operators that a file can hold
    def scripting(): ...  # whether this is TorchScript, whose converters know fewer operators

    # Compiling. `function(state, *tensors)` without gradients, by the `values` of `weights`
    # (models/step_weights.py) at each call. `kind`: "step", with the state that it returned, again
    # and again; "read", of prompts whose lengths are few. None: without weights.
    def compiled(function, weights=None, jit_compile="auto", kind=None): ...
    def version(x): ...  # of a variable's tensor: another one once it was written to
    def state_copy(state): ...  # a step's state, as tensors that no step uses up
    # {kind of block: its `runner`, compiled once for all equal}: how `compile(jit_compile=True)`
    # compiles. None: whole steps are compiled. `required`: what cannot be compiled is an error.
    def block_runners(blocks, required=True): ...
    # A compiled model's training step as a CUDA graph, parts of which may be compiled; whether
    # `compile` with `given` arguments and jit_compile="auto" makes one, and compiles blocks. None:
    # "auto" is Keras's.
    def captured_train_step(model, compiles=False, required=True): ...
    def default_compilation(model, given): ...
    def fuse_optimizer(optimizer, captured): ...  # shortens its update, in a CUDA graph or not
