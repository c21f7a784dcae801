"""What only a GPU can show: the same bits at every call, and work on several streams at once."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from tools import BACKEND, GPU, array, tensor

from keras_xlstm import ops

if not GPU:
    pytest.skip("needs a GPU, on torch or JAX", allow_module_level=True)
if BACKEND == "torch":
    import torch
else:
    import jax

KERNEL = {"torch": "triton", "jax": "pallas"}[BACKEND]
# B, T, heads, sizes: several programs everywhere; sLSTM heads in one program and in several.
MLSTM = [
    (2, 1000, 4, 128, 256), (16, 2048, 4, 64, 128), (4, 300, 4, 128, 128), (2, 700, 4, 256, 512),
    (2, 300, 3, 192, 96), (8, 1024, 16, 128, 256),
]  # fmt: skip
SLSTM = [(16, 100, 4, 64), (16, 100, 4, 192), (8, 60, 1, 768)]
CASES = [("mlstm", sizes) for sizes in MLSTM] + [("slstm", sizes) for sizes in SLSTM]
each_case = pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)


def function(kind, sizes, seed=0):
    """(outputs and gradients of x, x): everything that a training step asks of the kernels."""
    rng = np.random.default_rng(seed)
    B, T, H, *heads = sizes
    if kind == "mlstm":
        K, V = heads
        shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    else:
        (D,) = heads
        shapes = [(B, T, 4, H, D), (H, D, 4, D), (4, H, D)]
    x = [tensor(rng.normal(size=s).astype("float32") / 8) for s in shapes]
    x = [keras.ops.cast(t, "bfloat16") for t in x]
    call = {"mlstm": ops.mlstm, "slstm": ops.slstm}[kind]

    def forward(*x):
        return call(*x, implementation=KERNEL)

    if BACKEND == "torch":

        def both(*x):
            leaves = [t.detach().requires_grad_() for t in x]
            h = forward(*leaves)
            return [h.detach(), *torch.autograd.grad(h, leaves, h.detach())]

    else:

        @jax.jit
        def both(*x):
            h, backward = jax.vjp(forward, *x)
            return [h, *backward(h)]

    return both, x


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(array(keras.ops.cast(t, "float32"))) for t in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


@each_case
def test_same_bits_at_every_call(kind, sizes):
    both, x = function(kind, sizes)
    want = both(*x)
    for _ in range(10):
        assert_same_bits(both(*x), want)


TRAINING = """
import hashlib, keras, numpy
from keras_xlstm.models import xLSTMLanguageModel
if keras.backend.backend() == "torch":
    import torch
    torch.use_deterministic_algorithms(True)
keras.utils.set_random_seed(0)
keras.config.set_dtype_policy("mixed_bfloat16")
model = xLSTMLanguageModel(97, 256, 2, num_heads=4, pattern="1:1")
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
ids = numpy.random.default_rng(0).integers(0, 97, (16, 301), dtype="int32")
fit = model.fit(ids[:, :-1], ids[:, 1:], batch_size=4, epochs=2, shuffle=False, verbose=0)
digest = hashlib.sha256()
for variable in model.weights:
    digest.update(keras.ops.convert_to_numpy(variable).tobytes())
print("training:", fit.history["loss"], digest.hexdigest())
"""


def test_same_bits_of_two_trainings():
    """Losses and weights, where what is around the kernels is asked to be deterministic."""
    flags = "--xla_gpu_deterministic_ops=true"
    env = os.environ | {"XLA_FLAGS": flags, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", TRAINING]
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [run.communicate()[0].partition("training:")[2] for run in runs]
    assert found[0] == found[1] != ""


@pytest.mark.skipif(BACKEND != "torch", reason="JAX has its own streams")
@each_case
def test_streams_at_once(kind, sizes):
    """Each with inputs of its own, enough of them in flight to meet on the device; where an sLSTM's
    programs wait for each other, two such grids must not wait for ever."""
    work = [function(kind, sizes, seed) for seed in range(3)]
    want = [both(*x) for both, x in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    found = []
    for _ in range(5):
        for stream, (both, x) in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                found.append(both(*x))
    torch.cuda.synchronize()
    for n, got in enumerate(found):
        assert_same_bits(got, want[n % len(work)])
