"""Ahead of time: moments."""

import torch
from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.moments import triton


def columns(a: Inputs) -> list[int]:
    """Return c, u and c - u; or five tensors, as many as a backward of combine has."""
    return [0, -1, 1, -1, 0, 1] if a.few else [n for k in range(5) for n in (k, -1)]


def tensors(a: Inputs) -> list[torch.Tensor]:
    return [a.data() for _ in range(2 if a.few else 5)]


def forward(a: Inputs) -> None:
    size = len(columns(a)) // 2
    pairs = [n for i in range(size) for j in range(size) for n in (i, j)] + [n for i in range(size) for n in (i, -1)]
    source = None if a.few else a.numbers.long()
    triton.forward(torch.zeros(a.batch, len(pairs) // 2), tensors(a), columns(a), pairs, source, 2)


def centred(a: Inputs) -> None:
    size = len(columns(a)) // 2
    triton.centred(torch.zeros(a.batch, size * size + size, dtype=torch.float64), tensors(a), columns(a))


CALLS = {"moments_kernel": Kernel(forward, of_rows(2)), "centred_moments_kernel": Kernel(centred, of_rows(2))}
