"""What kernels are to JAX: functions that its transformations, Keras and several devices know."""

import keras
import numpy as np
import pytest
from tools import array, assert_close

import keras_xlstm
from contract.base import Contract


def losses(make, batch=4):
    """Of two epochs of a small model around `make()`."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=s).astype("float32") for s in ((8, 9, 3), (8, 1)))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((9, 3), batch), make(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]


class two_devices:
    def __init__(self, count):
        self.count = count

    def __enter__(self):
        devices = keras.distribution.list_devices()[: self.count]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))

    def __exit__(self, *error):
        keras.distribution.set_distribution(None)


def needs_two_devices():
    import jax

    if jax.device_count() < 2:
        pytest.skip("needs two devices")


class OnJax(Contract):
    tiny = {}  # noqa: RUF012  sizes to transform and to shard
    fits = 1e-4

    def inputs(self, rng, **sizes):
        case = self.Case(rng, **{"B": 2, "T": 9, **self.tiny, **sizes})
        return case.tensors(self.dtypes[0])[: case.required]

    def h(self, *inputs):
        return getattr(keras_xlstm.ops, self.Case.op)(*inputs, **self.given())

    def gradient(self, function):
        """Of the squares of what it returns, by all inputs."""
        import jax
        import jax.numpy as jnp

        def loss(*inputs):
            return jnp.sum(function(*inputs).astype("float32") ** 2)

        return jax.grad(loss, argnums=tuple(range(self.Case.required)))

    def test_jit_and_remat(self, rng):
        import jax

        inputs = self.inputs(rng)
        want = self.gradient(self.h)(*inputs)
        for transform in (jax.jit, jax.checkpoint):
            for a, b in zip(self.gradient(transform(self.h))(*inputs), want, strict=True):
                assert_close(a, array(b), 1e-5)

    def test_vmap(self, rng):
        """Of outputs and gradients, over all inputs and over some."""
        import jax
        import jax.numpy as jnp

        inputs = self.inputs(rng)
        stacked = [jnp.stack([x, 2 * x]) for x in inputs]
        gradient = self.gradient(self.h)
        for mapped in (set(range(len(inputs))), {0}):
            axes = tuple(0 if n in mapped else None for n in range(len(inputs)))
            given = [stacked[n] if n in mapped else x for n, x in enumerate(inputs)]
            got = jax.jit(jax.vmap(gradient, axes))(*given)
            for index in range(2):
                one = [x[index] if n in mapped else x for n, x in enumerate(given)]
                for a, b in zip(got, gradient(*one), strict=True):
                    assert_close(a[index], array(b), 1e-5)

    def layer(self, **options):
        return getattr(keras_xlstm.layers, self.Case.layer)(8, num_heads=2, **options)

    @pytest.mark.parametrize("batch", [4, None], ids=["static", "symbolic"])
    def test_fit(self, batch):
        """Keras works out shapes with a batch that has no size."""
        with keras_xlstm.backends.use(self.implementation):
            got = losses(self.layer, batch)
        np.testing.assert_allclose(
            got, losses(lambda: self.layer(use_kernel=False), batch), rtol=self.fits
        )

    def test_fit_over_two_devices(self):
        """Each device runs the kernels on its part of the batch."""
        needs_two_devices()
        found = []
        for count in (1, 2):
            with two_devices(count), keras_xlstm.backends.use(self.implementation):
                found.append(losses(self.layer))
        np.testing.assert_allclose(*found, rtol=1e-5)

    def test_what_does_not_fit_is_refused(self, unfit, words, rng):
        changed = {**unfit}
        dtype = changed.pop("dtype", "float32")
        options = {k: changed.pop(k) for k in ("chunk_size",) if k in changed}
        empty = changed.pop("empty", False)
        case = self.Case(rng, **{"B": 1, "T": 3, "H": 1, **changed})
        inputs = case.tensors(dtype)[: case.required]
        inputs = [x[:0] for x in inputs] if empty else inputs
        with pytest.raises(ValueError, match=words):
            getattr(keras_xlstm.ops, case.op)(*inputs, **self.given(options))


class Sharded:
    """Of inputs that all have an axis to shard."""

    @pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
    def test_shard_map(self, axis, rng):
        import jax

        needs_two_devices()
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec(*[None] * axis, "data")
        inputs = self.inputs(rng)
        # A kernel does not say over which axes its results vary: check_vma=False.
        how = {"mesh": mesh, "in_specs": (spec,) * 5, "out_specs": spec, "check_vma": False}
        sharded = jax.shard_map(self.h, **how)
        got, want = (jax.jit(self.gradient(f))(*inputs) for f in (sharded, self.h))
        for a, b in zip(got, want, strict=True):
            assert_close(a, array(b), 1e-5)
