"""Name the columns that `moments` and `combine` read of their tensors `[B, ...]`.

A column is a tensor, named by its index, or the difference of two, `(i, j)` for `tensors[i] - tensors[j]`, formed in
registers before it is multiplied or summed. The result depends on that: `||c - u||^2` computed from the moments of c
and u is, in float32, 2e-3 off where the difference is a hundredth of c, and 17 % where a thousandth.

Operators take columns as a flat list, two integers for each: plus and minus, -1 where nothing is subtracted. Products
of columns are such a list too: left and right, -1 for the sum of the left column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Column = int | tuple[int, int]

MOST = 8  # tensors, columns, and outputs of one call


class Columns(NamedTuple):
    """Columns of tensors, at a source or in order (`Columns` in csrc/common/columns.h)."""

    tensors: list[Tensor]
    columns: list[int]
    source: Tensor | None  # int64 [B']: the sample that each output reads
    gathered: int  # how many tensors, from the first, are read at `source`; the rest are [B', ...]

    @property
    def batch(self) -> int:
        return (self.tensors[0] if self.source is None else self.source).shape[0]


def flat(columns: Sequence[Column] | None, count: int) -> list[int]:
    """Return columns as the operators take them; None is every tensor as it is."""
    found: list[int] = []
    for column in range(count) if columns is None else columns:
        found += (column, -1) if isinstance(column, int) else column
    return found


def formed(tensors: Sequence[Tensor], columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return each column as a tensor of `dtype`."""
    wide = [tensor.to(dtype) for tensor in tensors]
    return [wide[plus] if minus < 0 else wide[plus] - wide[minus] for plus, minus in twos(columns)]


def twos(numbers: list[int]) -> list[tuple[int, int]]:
    """Return a flat list of columns or products two by two."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def every_product(size: int) -> list[int]:
    """Return all products of `size` columns, row by row, then (i, -1) for the sum of each column."""
    products = [index for i in range(size) for j in range(size) for index in (i, j)]
    return products + [index for i in range(size) for index in (i, -1)]


def triangle(size: int) -> list[int]:
    """Return each product of `size` columns once: (i, j) for i <= j, then (i, -1) for the sum of each column."""
    products = [index for i in range(size) for j in range(i, size) for index in (i, j)]
    return products + [index for i in range(size) for index in (i, -1)]


def same_as(products: list[int]) -> list[int]:
    """Return for each product the place of the first that equals it: (j, i) is summed once with (i, j)."""
    first: dict[tuple[int, int], int] = {}
    return [first.setdefault((i, j) if j < 0 else (min(i, j), max(i, j)), m) for m, (i, j) in enumerate(twos(products))]
