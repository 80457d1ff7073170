"""The Triton kernels and their launcher."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.ops.dynamic_threshold.structs import DynamicThreshold
from lgd_kernels.runtime.memory import sizes
from lgd_kernels.runtime.triton_common import column_blocks, load_tile, store_tile, tile
from lgd_kernels.runtime.triton_launch import launch, rows_argument, tiling

SELECTED = 2048  # elements of a sample that a program of 8 warps counts at a time; with 4 warps Triton 3.6 spills


@triton.jit
def _magnitudes(x0, first, columns, row):
    """Return the bits of |x0|, and the mask of elements that exist."""
    mask = first + columns < row
    bits = tl.load(x0 + first + columns, mask=mask, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return bits & 0x7FFFFFFF, mask


@triton.jit
def dynamic_threshold_select_kernel(order, x0, row, rank, NEXT: tl.constexpr, BLOCK: tl.constexpr):
    """Find in a sample, one to a program, the element of |x0| of this rank, digit by digit, and with NEXT the element
    after it. Bits order as the magnitudes do. Counts are integers: the order of addition changes no bit."""
    sample = tl.program_id(0).to(tl.int64)
    x0 = x0[0] + sample * x0[1]
    columns, bins = tl.arange(0, BLOCK), tl.arange(0, 256)
    left, equal = tl.cast(rank, tl.int64), tl.cast(0, tl.int64)
    prefix = tl.cast(0, tl.int32)
    for digit in tl.static_range(4):
        counts = tl.zeros((256,), tl.int64)
        for block in range(column_blocks(row, BLOCK)):
            bits, mask = _magnitudes(x0, block * BLOCK, columns, row)
            if digit > 0:
                mask &= (bits >> (32 - 8 * digit)) == prefix
            counts += tl.histogram((bits >> (24 - 8 * digit)) & 255, 256, mask=mask)
        before = tl.cumsum(counts, 0) <= left  # digits that all come before the digit sought
        found = tl.sum(before.to(tl.int32), 0)
        left -= tl.sum(tl.where(before, counts, 0), 0)
        equal = tl.sum(tl.where(bins == found, counts, 0), 0)
        prefix = (prefix << 8) | found
    above, largest = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for block in range(column_blocks(row, BLOCK)):
        bits, mask = _magnitudes(x0, block * BLOCK, columns, row)
        above = tl.minimum(above, tl.where(mask & (bits > prefix), bits, 0x7FFFFFFF))
        largest = tl.maximum(largest, bits)
    missing = tl.max(largest, 0) > 0x7F800000
    second = tl.where((left + 1 == equal) & NEXT, tl.min(above, 0), prefix)
    nan = float("nan")
    tl.store(order + 2 * sample, tl.where(missing, nan, prefix.to(tl.float32, bitcast=True)))
    tl.store(order + 2 * sample + 1, tl.where(missing, nan, second.to(tl.float32, bitcast=True)))


@triton.jit
def dynamic_threshold_kernel(out, x0, batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr, order, weight, most):
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    low = tl.load(order + 2 * rows, mask=present, other=1.0)
    high = tl.load(order + 2 * rows + 1, mask=present, other=1.0)
    quantile = tl.where(high == low, low, low + weight * (high - low))
    s = tl.where(quantile < 1, 1.0, tl.where(quantile > most, most, quantile))[:, None]  # NaN stays
    x = load_tile(*x0, rows, first, columns, mask)
    clipped = tl.minimum(tl.maximum(x, -s), s)
    store_tile(out, row, rows, first, columns, mask, tl.div_rn(clipped, tl.zeros_like(clipped) + s))


def forward(outputs, a: DynamicThreshold) -> None:
    out, order = outputs
    batch, row = sizes(a.x0)
    grid, _, tiles = tiling(batch, row)
    x0, (rank, weight) = rows_argument(a.x0), a.position()
    select = dynamic_threshold_select_kernel
    launch(select, (batch,), order, x0, row, rank, weight > 0, SELECTED, like=out, num_warps=8)
    launch(dynamic_threshold_kernel, grid, out, x0, *tiles, order, weight, a.max_value, like=out)
