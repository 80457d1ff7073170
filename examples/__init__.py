"""Studies that run from a checkout, outside the wheel: `python -m examples.digits`, `.mixture`, `.photographs`."""
