"""What the Pallas kernels are made of: launches, products, loops, places in a grid."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def launch(kernel, inputs, outputs, programs, name, interpret, aliases=None, **options):
    """Runs `kernel(**references)` over a grid. `inputs` and `outputs` by name; None is left out."""
    inputs = {k: v for k, v in inputs.items() if v is not None}
    names = [*inputs, *outputs]
    results = pl.pallas_call(
        lambda *references: kernel(**dict(zip(names, references, strict=True))),
        grid=programs,
        out_shape=list(outputs.values()),
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(**options),
        interpret=interpret,
        name=name,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def output(shape, dtype="float32"):
    """What `launch` is to make."""
    return jax.ShapeDtypeStruct(shape, dtype)


def dot(a, b, sums, precision):
    """The product over axis sums[0] of a and sums[1] of b, in float32."""
    return lax.dot_general(
        a, b, (((sums[0],), (sums[1],)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


# Whole numbers of 32 bits, whether or not JAX has 64.
def div(x, n):
    return lax.div(x, jnp.int32(n))


def rem(x, n):
    return lax.rem(x, jnp.int32(n))


def loop(start, stop, body, carry):
    return lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, carry)


def place(s, *counts):
    """Coordinates of a program among those of its head, the first fastest (counts: powers of two),
    and b, head and bh."""
    pid, head, b = (pl.program_id(axis) for axis in range(3))
    coordinates = []
    for count in counts:
        coordinates.append(rem(pid, count))
        pid = div(pid, count)
    return *coordinates, pid, b, head, b * s.H + head
