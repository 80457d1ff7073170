"""Name the columns that `moments` and `combine` read of their tensors `[B, ...]`.

A column is a tensor, given by its index, or the difference of two, `(i, j)` for `tensors[i] - tensors[j]`. Kernels form
differences in registers before they multiply or sum, because `||c - u||^2` computed from the moments of c and u is, in
float32, 2e-3 off where the difference is a hundredth of c, and 17 % where it is a thousandth.

Operators take columns as a flat list, two integers for each: plus and minus, -1 where nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Column = int | tuple[int, int]

MOST = 8  # tensors, columns, and outputs of one call


def flat(columns: Sequence[Column] | None, count: int) -> list[int]:
    """Return columns as the operators take them; None is every tensor as it is."""
    found: list[int] = []
    for column in range(count) if columns is None else columns:
        found += [column, -1] if isinstance(column, int) else column
    return found


def formed(tensors: Sequence[Tensor], columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return each column as a tensor of `dtype`."""
    wide = [tensor.to(dtype) for tensor in tensors]
    pairs = zip(columns[::2], columns[1::2], strict=True)
    return [wide[plus] if minus < 0 else wide[plus] - wide[minus] for plus, minus in pairs]


def every_pair(size: int) -> list[int]:
    """Return all pairs of `size` columns, row by row, then (i, -1) for the sum of each column."""
    pairs = [index for i in range(size) for j in range(size) for index in (i, j)]
    return pairs + [index for i in range(size) for index in (i, -1)]


def triangle(size: int) -> list[int]:
    """Return pairs of `size` columns, each once: (i, j) for i <= j, then (i, -1) for the sum of each column."""
    pairs = [index for i in range(size) for j in range(i, size) for index in (i, j)]
    return pairs + [index for i in range(size) for index in (i, -1)]


def same_as(pairs: list[int]) -> list[int]:
    """Return for each pair of columns the place of its first mirror image, which is summed once and written twice."""
    first: dict[tuple[int, ...], int] = {}
    found = []
    for m, pair in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        found.append(first.setdefault(tuple(sorted(pair)) if pair[1] >= 0 else pair, m))
    return found
