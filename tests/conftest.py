import gc
import importlib.metadata
import importlib.util
import os
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")  # float64 tests; Keras still computes in float32
# On a GPU, products of float32 as they are: by default JAX rounds what goes into them to TF32.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# A cached graph of an older version of our operators would be run as it was.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Nearly all of the time is XLA compiling: code that runs once need not be fast. XLA_FLAGS="" runs
# everything as users do. Four devices, for JAX to shard over.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_force_host_platform_device_count=4"
)


def _is(package, version):
    """Whether it is this version, or not there."""
    try:
        return importlib.metadata.version(package).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return True


# Fusions by way of MLIR, in modules of their own, take five times as long to compile. Where XLA
# does not know a flag it ends the process: for versions alone that were tried.
_VERSIONS = {"jax": "0.10.", "tensorflow": "2.21.", "tensorflow-cpu": "2.21."}
if all(_is(*version) for version in _VERSIONS.items()):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# JAX compiles what is equal once: in all tests, all modules, and all processes of tests/run.py. What
# JAX 0.4 takes from that cache crashes or computes something else.
_FOLDER = tempfile.TemporaryDirectory()
_SHARED = os.environ.get("TESTS_SHARED", _FOLDER.name)
if not _is("jax", "0.4."):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_SHARED, "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
sys.path.insert(0, os.path.dirname(__file__))

import keras
import numpy as np
import pytest
import sweeps

pytest.register_assert_rewrite("cases", "contract", "tools")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import faster_interpreter  # noqa: F401


def pytest_collection_modifyitems(items):
    """Of a class that says what of it is for every run, the rest is a sweep; and sweeps.py."""
    backend = keras.backend.backend()
    for item in items:
        every_run = getattr(item.cls, "every_run", None)
        left = every_run is not None and not any(words in item.name for words in every_run)
        if left or sweeps.is_sweep(item.path, item.cls, item.name, backend):
            item.add_marker("sweep")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _fresh():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    # Keras collects garbage for every attribute that `quantize` deletes, Python now and then: not
    # the frameworks and the tests before, again and again.
    gc.freeze()
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True, scope="module")
def _memory():
    """Compiled functions are kept for good: gigabytes over the whole suite."""
    yield
    gc.unfreeze()
    keras.backend.clear_session()
    gc.collect()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
