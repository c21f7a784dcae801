"""What most frameworks have nothing of their own for: see framework.py."""

from typing import Any, NamedTuple

from keras import ops


class Stretches(NamedTuple):
    """How time is shared out, as one device sees it: `place` counts the stretches before its own;
    `gather(x)` is x of all devices, (count, *x.shape), and has a gradient."""

    count: int
    place: Any
    gather: Any


def unchanged(x):
    return x


def none(first, *others):
    return None


def steps_of(x, steps):
    steps = ops.reshape(steps, (*ops.shape(steps), *[1] * (len(x.shape) - 2)))
    return ops.take_along_axis(x, steps, axis=1)


def concatenate_steps(parts):
    return ops.concatenate(parts, axis=1)


def activated(activation, x):
    return activation(x)


def changes(variable, x):
    return True


def scripting():
    return False


def shares_time():
    return False


def own_stretch():
    return None


def over_stretches(function, *tensors):
    return None


def fuse_optimizer(optimizer, captured):
    return None
