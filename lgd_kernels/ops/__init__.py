"""Hold one op in each folder. No op imports another; what ops share is in `runtime`."""
