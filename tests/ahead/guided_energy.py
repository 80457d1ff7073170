"""Ahead of time: guided_energy."""

import torch
from aot import VARIANTS, Inputs, Kernel, narrow

from lgd_kernels.ops.guided_energy import triton
from lgd_kernels.ops.guided_energy.statistics import Statistics
from lgd_kernels.ops.guided_energy.structs import (
    EnergyCall,
    EnergyOptions,
    GuidedEnergy,
    GuidedEnergyBackward,
    Target,
)
from lgd_kernels.runtime.arguments import Seed

PLAIN = VARIANTS["plain"]
DRAWN = PLAIN._replace(noise="seed", dtypes=("bf16",))
ALL = {
    **VARIANTS,
    "16 particles": PLAIN._replace(particles=16),
    "16 particles, drawn": DRAWN._replace(particles=16),
}


def arguments(a: Inputs) -> GuidedEnergy:
    m = a.variant.particles
    data = a.data(a.batch, m, *a.shape[1:])
    x0, none = data[:, 0].contiguous(), Seed(None, None, 0)
    target = {
        "none": Target(data, "tensor", m, none),
        "tensor": Target(x0, "expected", 1, none),
    }.get(a.variant.noise, Target(x0, "renoise", m, a.seed))
    noise = data if a.variant.noise == "tensor" else None
    return GuidedEnergy(data, data, data, noise, a.scalars, a.seed, target)


def forward(a: Inputs) -> None:
    given, m = arguments(a), a.variant.particles
    statistics = torch.zeros((a.batch, Statistics.numbers(m, given.target.k)), dtype=torch.float64)
    triton.forward((a.numbers, a.numbers, statistics), EnergyCall(given, EnergyOptions(1.75, 1.0, True)))


def backward(a: Inputs) -> None:
    given, m = arguments(a), a.variant.particles
    shapes = (a.batch, m, given.target.k), (a.batch, m * (m - 1) // 2)
    weights = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    triton.backward(given.data, GuidedEnergyBackward(given, *weights, [True] * 5))


def wide(count: int):
    """Return `loads` of a kernel that reads 16 bytes to a thread unless it draws or needs several launches."""

    def loads(variant: str, dtype: str, target: str) -> int:
        return count if ALL[variant].shape[1] % 16 == 0 and (dtype == "fp32" or variant == "plain") else 0

    return loads


CALLS = {
    "guided_energy_kernel": Kernel(forward, wide(12), ALL),
    "guided_energy_finish_kernel": Kernel(forward, narrow, ALL),  # sums of chunks: a few kilobytes
    "guided_energy_backward_kernel": Kernel(backward, wide(7), ALL),  # four targets and a particle, or more targets
}
LOADS = {
    **{f"few {m}x{k}": (3 * m + k,) * 2 for m, k in ((1, 1), (2, 2), (4, 1), (4, 4))},  # particles x targets
    **dict.fromkeys(("many", "finish", "backward"), (4, 4)),
}  # CUDA: float32, 16 bits; 16 bytes of each row at a time
