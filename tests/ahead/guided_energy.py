"""Ahead of time: guided_energy."""

import torch
from aot import VARIANTS, Inputs, Kernel, narrow

from lgd_kernels.ops.guided_energy import triton

PLAIN = VARIANTS["plain"]
DRAWN = PLAIN._replace(noise="seed", dtypes=("bf16",))
ALL = {
    **VARIANTS,
    "16 particles": PLAIN._replace(particles=16),
    "16 particles, drawn": DRAWN._replace(particles=16),
}


def arguments(a: Inputs):
    m = a.variant.particles
    data = a.data(a.batch, m, *a.shape[1:])
    kind = {"none": "tensor", "tensor": "expected"}.get(a.variant.noise, "renoise")
    target, k = (data, m) if kind == "tensor" else (data[:, 0].contiguous(), 1 if kind == "expected" else m)
    noise = data if a.variant.noise == "tensor" else None
    omega, levels, prediction, churn = a.scalars
    given = data, data, data, noise, *omega, levels, prediction, *churn, *a.seed, target, kind, k, *a.seed[:2]
    return data, noise, target, m, k, given


def forward(a: Inputs) -> None:
    *_, m, k, given = arguments(a)
    found = torch.zeros((a.batch, 2 * m * k + m + 3 * (m * (m - 1) // 2)), dtype=torch.float64)
    triton.forward(a.numbers, a.numbers, found, *given, 1.75, 1.0, True)


def backward(a: Inputs) -> None:
    data, noise, target, m, k, given = arguments(a)
    shapes = (a.batch, m, k), (a.batch, m * (m - 1) // 2)
    triton.backward(data, data, data, noise, target, *(torch.zeros(s, dtype=torch.float64) for s in shapes), *given)


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
