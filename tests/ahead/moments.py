"""Ahead of time: moments."""

import torch
from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.moments import triton
from lgd_kernels.ops.moments.structs import Moments
from lgd_kernels.runtime.columns import Columns, every_product


def columns(a: Inputs) -> Columns:
    """Return c, u and c - u; or five tensors, as many as a backward of combine has."""
    if a.few:
        return Columns([a.data(), a.data()], [0, -1, 1, -1, 0, 1], None, 0)
    return Columns([a.data() for _ in range(5)], [n for k in range(5) for n in (k, -1)], a.numbers.long(), 2)


def forward(a: Inputs) -> None:
    products = every_product(len(columns(a).columns) // 2)
    triton.forward(torch.zeros(a.batch, len(products) // 2), Moments(columns(a), products, False))


def centred(a: Inputs) -> None:
    read = columns(a)._replace(source=None, gathered=0)
    products = every_product(len(read.columns) // 2)
    triton.forward(torch.zeros(a.batch, len(products) // 2, dtype=torch.float64), Moments(read, products, True))


CALLS = {"moments_kernel": Kernel(forward, of_rows(2)), "centred_moments_kernel": Kernel(centred, of_rows(2))}
