"""The sLSTM in Triton."""
