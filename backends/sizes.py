"""What is chosen by sizes on CPUs, where XLA compiles the loops: measured by benchmarks/cpu.py."""


def chunk_size(key_dim, value_dim, time):
    """How many steps the mLSTM computes at once: as many as make the weights of a chunk's pairs of
    steps no larger than a memory, so that both stay in the cache. A sequence of two such chunks or
    less is one."""
    size = 8
    while size < 64 and 4 * size * size <= key_dim * value_dim:
        size *= 2
    return time if isinstance(time, int) and time <= min(2 * size, 64) else size


def multiplies_inside(batch, time, features, units):
    """Whether the sLSTM's loop had better multiply x by the input kernel step by step: where all
    steps' gate inputs would not stay in a core's cache, unless the kernels are large beside a
    step's rows."""
    kernels = features + units
    large = batch * time * 4 * units >= 1 << 19
    return kernels <= batch or (large and kernels <= 20 * batch)
