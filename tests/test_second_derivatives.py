"""Gradients of gradients (penalties, physics losses) against differences of first ones, float64."""

import keras
import numpy as np
import pytest
from cases import CASES, flags, make_flags
from tools import BACKEND, array, assert_close, perturbed, tensor

import keras_xlstm
from keras_xlstm import layers

both = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# How the call is made, and what it has. On TensorFlow it is the native form that runs eagerly, in a
# graph what XLA compiles.
RUNS = [("eager", "plain"), ("eager", "flags"), ("eager", "single step")]
if BACKEND == "tensorflow":
    RUNS = [("eager", "plain"), ("eager", "single step"), ("graph", "flags"), ("xla", "flags")]


def gradients(loss, inputs):
    """Of loss(*inputs) by all inputs, to be differentiated again."""
    if BACKEND == "jax":
        import jax

        return jax.grad(loss, tuple(range(len(inputs))))(*inputs)
    if BACKEND == "torch":
        import torch

        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs)
    return tape.gradient(value, inputs)


def along(loss, inputs, directions):
    """The gradients of the slope of `loss` along `directions`, and the first gradients."""
    if BACKEND == "torch":  # the same leaves for both
        inputs = [x.detach().requires_grad_() for x in inputs]
    first = []

    def slope(*inputs):
        first[:] = gradients(loss, inputs)
        return sum((a * d).sum() if BACKEND == "torch" else keras.ops.sum(a * d)
                   for a, d in zip(first, directions, strict=True))  # fmt: skip

    return gradients(slope, inputs)


def check(loss, inputs, rng, way="eager", tolerance=1e-6):
    """`inputs`: float64."""
    directions = [tensor(rng.normal(size=x.shape), "float64") for x in inputs]

    def run(function):
        if way == "eager":
            return function
        import tensorflow as tf

        return tf.function(function, jit_compile=way == "xla", autograph=False)

    got = run(lambda *x: along(loss, x, directions))(*inputs)
    first = run(lambda *x: gradients(loss, x))
    above, below = (
        first(*(x + sign * 1e-5 * d for x, d in zip(inputs, directions, strict=True)))
        for sign in (1, -1)
    )
    for place, (a, b, c) in enumerate(zip(got, above, below, strict=True)):
        assert_close(a, (array(b) - array(c)) / 2e-5, tolerance, f"input {place}", least=1e-3)


@both
@pytest.mark.parametrize(("way", "kind"), RUNS)
def test_against_differences(case, way, kind, rng):
    """By every input and the first state, of outputs, and of those that go on from the last state:
    its own size is relative to m, which is no variable."""
    case = case(rng, B=2, H=2, T=1 if kind == "single step" else 9)
    op, options = getattr(keras_xlstm.ops, case.op), {}
    if case.op == "mlstm":
        options = {"chunk_size": 4, "eps": 0.0}  # with eps, m counts a little
    if kind == "flags":
        names, values = flags(**make_flags("holes", "returning", *case.extent, rng))
        options |= dict(zip(names, values, strict=True))
    weights = tensor(case.cotangents[0], "float64")

    def loss(*inputs):
        given, state = inputs[: case.given], inputs[case.given :]
        h, state = op(*given, initial_state=state, return_state=True, **options)
        return keras.ops.sum(weights * h**2 + op(*given, initial_state=state, **options))

    check(loss, case.tensors("float64"), rng, way)


@both
@pytest.mark.skipif(BACKEND != "jax", reason="JAX's own way of asking")
def test_hessian(case, rng):
    import jax

    case = case(rng, B=1, H=1, T=3)
    op = getattr(keras_xlstm.ops, case.op)
    first, *rest = case.tensors("float64")[: case.given]

    def loss(x):
        return keras.ops.sum(op(x, *rest) ** 2)

    hessian = jax.hessian(loss)(first)
    d = np.asarray(rng.normal(size=first.shape))
    ends = [jax.grad(loss)(first + sign * 1e-5 * d) for sign in (1, -1)]
    got = np.tensordot(array(hessian), d, d.ndim)
    assert_close(got, (array(ends[0]) - array(ends[1])) / 2e-5, 1e-6)


@pytest.mark.parametrize("Layer", [layers.mLSTM, layers.sLSTM, layers.mLSTMBlock])
def test_a_gradient_penalty_trains_a_layer(Layer, rng):
    """The gradient of a loss that holds the input's gradient, by the weights: as differences say."""
    if Layer is layers.mLSTMBlock:
        layer = Layer(num_heads=2)
    else:
        layer = Layer(8, num_heads=2, return_sequences=True)
    x = tensor(rng.normal(size=(3, 7, 8)))
    layer(x)
    perturbed(layer, rng)
    weight = layer.trainable_weights[0]
    step = rng.normal(size=weight.shape) / np.sqrt(np.prod(weight.shape))

    def penalty(value):
        def loss(x):
            if BACKEND == "jax":
                values = [value if w is weight else w.value for w in layer.trainable_weights]
                h = layer.stateless_call(values, layer.non_trainable_variables, x)[0]
            else:
                h = layer(x)
            return keras.ops.sum(h**2)

        (slope,) = gradients(loss, [x])
        return keras.ops.mean(slope**2)

    def at(distance):
        weight.assign(start + distance * step)
        return float(array(penalty(weight.value)))

    start = array(weight.value).copy()
    if BACKEND == "torch":
        import torch

        (found,) = torch.autograd.grad(penalty(None), [weight.value])
    elif BACKEND == "jax":
        import jax

        found = jax.grad(penalty)(weight.value)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = penalty(None)
        found = tape.gradient(value, weight.value)
    got = np.sum(array(found) * step)
    np.testing.assert_allclose(got, (at(3e-3) - at(-3e-3)) / 6e-3, rtol=2e-2)


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere the clipped gradient is differentiated")
def test_a_clipped_gradient_has_none(rng):
    x, R, *_ = CASES["slstm"](rng, T=5).tensors()
    with pytest.raises(RuntimeError, match="recurrent_gradient_clip=0.1"):
        gradients(
            lambda x, R: keras_xlstm.ops.slstm(x, R, recurrent_gradient_clip=0.1).sum(), [x, R]
        )
