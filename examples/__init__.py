"""The main job on real data, `python -m examples.digits`, and where all is known, `python -m examples.mixture`."""
