"""A multiple of each sample."""
