"""The Pallas kernels and their hosts."""
