"""The mLSTM in Triton and, for NVIDIA's Hopper, in Gluon."""
