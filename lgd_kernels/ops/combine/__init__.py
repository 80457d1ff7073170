"""Per-sample linear combinations of several tensors, with noise drawn on the way: what every guidance rule comes to."""
