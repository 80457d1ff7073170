"""Ahead of time: combine."""

import torch
from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.combine import triton
from lgd_kernels.ops.combine.structs import Combine
from lgd_kernels.runtime.arguments import Seed
from lgd_kernels.runtime.columns import Columns, triangle


def forward(a: Inputs) -> None:
    """Call it without moments and with them, in float32 and float64, of one output that is not written, or of three."""
    count = 1 if a.few else 3
    coefficients, numbers = torch.zeros(a.batch, count, 3), torch.zeros(a.batch, count)
    read = Columns([a.data() for _ in range(3)], [0, -1, 1, -1, 1, 2], None if a.few else a.numbers.long(), 3)
    seed = a.seed if a.few or a.seed.tensor is not None else Seed(None, 1, 0)
    scalars = (None, None) if a.few else (numbers, numbers)
    call = Combine(read, coefficients, *scalars, seed, -1.0, 1.0, a.dtype)
    outputs = a.data(count, *a.shape)
    sums = torch.zeros(a.batch, len(triangle(count)) // 2)
    for found in (None, sums, sums.double()):
        triton.forward((outputs if found is None or not a.few else outputs[:0], found), call)


CALLS = {"combine_kernel": Kernel(forward, of_rows(3))}
