"""The Triton kernels and their launcher."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.runtime.memory import sizes, with_contiguous_rows
from lgd_kernels.runtime.triton_common import column_blocks, load_tile, store_tile, tile
from lgd_kernels.runtime.triton_old import COMPILE, on_device, rounded_stores, tiling

SELECTED = 2048  # elements of a sample that its program, of 8 warps, counts at a time: with 4, Triton 3.6 spills


@triton.jit
def _magnitudes(x0, first, columns, row):
    """The bits of |x0|, and which of them there are."""
    mask = first + columns < row
    bits = tl.load(x0 + first + columns, mask=mask, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return bits & 0x7FFFFFFF, mask


@triton.jit
def dynamic_threshold_select_kernel(order, x0, stride, row, rank, NEXT: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each sample: of |x0| the element of this rank, digit by digit, and with NEXT the one after it. Bits
    order as the magnitudes do. Counts are integers, so no order of addition shows."""
    sample = tl.program_id(0).to(tl.int64)
    x0 += sample * stride
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
        before = tl.cumsum(counts, 0) <= left  # digits that all come before the one sought
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
def dynamic_threshold_kernel(out, order, x0, stride, batch, row, weight, most, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    low = tl.load(order + 2 * rows, mask=present, other=1.0)
    high = tl.load(order + 2 * rows + 1, mask=present, other=1.0)
    quantile = tl.where(high == low, low, low + weight * (high - low))
    s = tl.where(quantile < 1, 1.0, tl.where(quantile > most, most, quantile))[:, None]  # NaN stays
    x = load_tile(x0, stride, rows, first, columns, mask)
    clipped = tl.minimum(tl.maximum(x, -s), s)
    store_tile(out, row, rows, first, columns, mask, tl.div_rn(clipped, tl.zeros_like(clipped) + s))


def forward(out, order, x0, rank, weight, max_value):
    x0 = with_contiguous_rows(x0)
    batch, row = sizes(x0)
    grid, _, shape = tiling(x0)
    with on_device(x0), rounded_stores(out) as (stored,):
        dynamic_threshold_select_kernel[(batch,)](
            order, x0, x0.stride(0), row, rank, NEXT=weight > 0, BLOCK=SELECTED, **(COMPILE | {"num_warps": 8})
        )
        dynamic_threshold_kernel[grid](stored, order, x0, x0.stride(0), batch, row, weight, max_value, **shape)
