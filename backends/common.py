"""What most frameworks have nothing of their own for: see framework.py."""

from keras import ops


def unchanged(x):
    return x


def none(first, *others):
    return None


def steps_of(x, steps):
    steps = ops.reshape(steps, (*ops.shape(steps), *[1] * (len(x.shape) - 2)))
    return ops.take_along_axis(x, steps, axis=1)


def activated(activation, x):
    return activation(x)


def changes(variable, x):
    return True


def scripting():
    return False


def fuse_optimizer(optimizer, captured):
    return None
