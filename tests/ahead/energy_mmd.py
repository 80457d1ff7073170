"""Ahead of time: energy_mmd."""

import torch
from aot import VARIANTS, Inputs, Kernel, narrow

from lgd_kernels.ops.energy_mmd import triton
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd, MmdKernel

SAMPLES = 300
IN_2 = {"samples in 2": VARIANTS["plain"]._replace(shape=(SAMPLES, 2))}
IN_2048 = {"samples in 2048": VARIANTS["plain"]._replace(shape=(SAMPLES, 2048), dtypes=("bf16",))}


def forward(a: Inputs) -> None:
    x, y = a.data(1, *a.shape), a.data(1, *a.shape)
    d_x, d_y = torch.zeros(x.shape), torch.zeros(y.shape)
    terms = 1.0, True, True, True
    call = EnergyMmd(x, y, None, None, MmdKernel("energy", [1.0]), *terms, None, [True, True])
    triton.forward((torch.zeros(1, dtype=torch.float64), d_x, d_y), call)


CALLS = {  # a coordinate to a load in registers; in tiles the width is that of the layout of the product
    "energy_mmd_points_kernel": Kernel(forward, narrow, IN_2),
    "energy_mmd_pairs_kernel": Kernel(forward, narrow, IN_2048),
    "energy_mmd_turn_kernel": Kernel(forward, narrow, IN_2048),
}
