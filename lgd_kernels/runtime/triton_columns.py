"""Device functions of `moments` and `combine`: they read tensors, also at other samples, and form columns of them."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.runtime.columns import Columns
from lgd_kernels.runtime.triton_common import load_tile
from lgd_kernels.runtime.triton_launch import rows_argument


@triton.jit
def samples_read(source, rows, mask):
    """Return the sample that each row reads, and what to add to its results: 0, or NaN for an invalid source.

    `source` is (indices, number of samples), or None: each row reads its own sample."""
    if source is None:
        return rows, tl.zeros_like(rows).to(tl.float32)
    else:
        at = tl.load(source[0] + rows, mask=mask, other=0)
        inside = (at >= 0) & (at < source[1])
        return tl.where(inside, at, 0), tl.where(inside, 0.0, float("nan"))


@triton.jit
def load_tensors(tensors, rows, at, first, elements, mask, GATHERED: tl.constexpr):
    """Load a tile of each tensor, (data, stride): of the first GATHERED at samples `at`, of the rest at `rows`."""
    found = ()
    for n in tl.static_range(len(tensors)):
        if n < GATHERED:
            found += (load_tile(tensors[n][0], tensors[n][1], at, first, elements, mask),)
        else:
            found += (load_tile(tensors[n][0], tensors[n][1], rows, first, elements, mask),)
    return found


@triton.jit
def form_columns(tensors, COLUMNS: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Return each column as a tile of DTYPE: a tensor, or the difference of two."""
    found = ()
    for k in tl.static_range(len(COLUMNS) // 2):
        if COLUMNS[2 * k + 1] < 0:
            found += (tensors[COLUMNS[2 * k]].to(DTYPE),)
        else:
            found += (tensors[COLUMNS[2 * k]].to(DTYPE) - tensors[COLUMNS[2 * k + 1]].to(DTYPE),)
    return found


def column_arguments(read: Columns) -> tuple:
    """Return the four arguments of a kernel that reads columns: tensors, COLUMNS, source, GATHERED."""
    tensors, columns, source, gathered = read
    rows = tuple(rows_argument(tensor) for tensor in tensors)
    if source is None:
        return rows, tuple(columns), None, 0
    return rows, tuple(columns), (source.contiguous(), tensors[0].shape[0]), gathered
