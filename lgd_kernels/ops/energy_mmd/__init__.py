"""MMD between two sets of samples, streamed over tiles: the matrix of distances is never stored."""
