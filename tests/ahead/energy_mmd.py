"""Ahead of time: energy_mmd."""

import torch
from aot import VARIANTS, Inputs, Kernel, narrow

from lgd_kernels.ops.energy_mmd import triton

SAMPLES = 300
IN_2 = {"samples in 2": VARIANTS["plain"]._replace(shape=(SAMPLES, 2))}
IN_2048 = {"samples in 2048": VARIANTS["plain"]._replace(shape=(SAMPLES, 2048), dtypes=("bf16",))}


def forward(a: Inputs) -> None:
    x, y = a.data(1, *a.shape), a.data(1, *a.shape)
    slopes, loss = (torch.zeros(x.shape) for _ in range(2)), torch.zeros(1, dtype=torch.float64)
    triton.forward(loss, *slopes, x, y, None, None, "energy", [1.0], 1.0, True, True, None)


CALLS = {  # a coordinate to a load in registers; in tiles the width is that of the layout of the product
    "energy_mmd_points_kernel": Kernel(forward, narrow, IN_2),
    "energy_mmd_pairs_kernel": Kernel(forward, narrow, IN_2048),
    "energy_mmd_turn_kernel": Kernel(forward, narrow, IN_2048),
}
