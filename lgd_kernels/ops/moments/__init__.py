"""Per-sample inner products and sums of several tensors, and of differences of them, in one read."""
