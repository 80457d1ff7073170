"""Ahead of time: combine."""

import torch
from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.combine import triton
from lgd_kernels.runtime.columns import triangle


def forward(a: Inputs) -> None:
    """Call it without moments and with them, in float32 and float64, of one output that is not written, or of three."""
    columns, count = [0, -1, 1, -1, 1, 2], 1 if a.few else 3
    scalars = torch.zeros(a.batch, count, 3), columns, *(None if a.few else torch.zeros(a.batch, count) for _ in "cn")
    seed = a.seed if a.few or a.seed.tensor is not None else a.seed._replace(value=1)
    source = None if a.few else a.numbers.long()
    outputs = a.data(count, *a.shape)
    sums = torch.zeros(a.batch, len(triangle(count)) // 2)
    for found in (None, sums, sums.double()):
        written = outputs if found is None or not a.few else outputs[:0]
        triton.forward(written, [a.data() for _ in range(3)], *scalars, *seed, source, -1.0, 1.0, found)


CALLS = {"combine_kernel": Kernel(forward, of_rows(3))}
