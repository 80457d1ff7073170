"""A model and data for `python -m lgd_kernels learn`: a small U-Net on crops of two photographs."""
