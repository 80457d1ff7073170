"""The main job on real data, `python -m lgd_kernels demo digits`, and where all is known, `demo mixture`."""
