"""The main job on real data: `python -m lgd_kernels demo digits`."""
