"""What blocks compute around the memory, without gradients: a pass each, in place of many."""
