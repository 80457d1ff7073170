"""The Triton kernels and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.moments.structs import Moments
from lgd_kernels.runtime.columns import Columns, formed, same_as
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.memory import partial_sums, sizes
from lgd_kernels.runtime.triton_columns import column_arguments, form_columns, load_tensors, samples_read
from lgd_kernels.runtime.triton_common import column_blocks, tile
from lgd_kernels.runtime.triton_launch import SUMS_TILE, launch, rows_argument, tiling


@triton.jit
def moments_kernel(
    found,
    batch,
    row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    tensors,
    COLUMNS: tl.constexpr,
    source,
    GATHERED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SAME_AS: tl.constexpr,
):
    """`found` is [B, column blocks, M]: this program's part of each sample's sums."""
    rows, present, first, elements = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + elements < row)[None, :]
    at, missing = samples_read(source, rows, present)
    read = form_columns(load_tensors(tensors, rows, at, first, elements, mask, GATHERED), COLUMNS)
    found += (rows * column_blocks(row, BLOCK) + first // BLOCK) * (len(PRODUCTS) // 2)
    sums = ()
    for m in tl.static_range(len(PRODUCTS) // 2):
        if SAME_AS[m] < m:
            sums += (sums[SAME_AS[m]],)
        elif PRODUCTS[2 * m + 1] >= 0:
            sums += (tl.sum(read[PRODUCTS[2 * m]] * read[PRODUCTS[2 * m + 1]], 1) + missing,)
        else:
            sums += (tl.sum(read[PRODUCTS[2 * m]], 1) + missing,)
        tl.store(found + m, sums[m], mask=present)


@triton.jit
def centred_moments_kernel(parts, batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr, tensors, COLUMNS: tl.constexpr):
    """`parts` is [B, column blocks, K K + K]: products of each column less its mean over this program's part, and sums
    of the columns less their first element, without which the mean of a part would lose digits."""
    rows, present, first, elements = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + elements < row)[None, :]
    read = form_columns(load_tensors(tensors, rows, rows, first, elements, mask, 0), COLUMNS)
    one = tl.zeros((1,), tl.int32)
    origins = form_columns(load_tensors(tensors, rows, rows, 0, one, present[:, None], 0), COLUMNS)
    count = tl.minimum(tl.cast(row, tl.int64) - first, BLOCK).to(tl.float32)
    size: tl.constexpr = len(COLUMNS) // 2
    parts += (rows * column_blocks(row, BLOCK) + first // BLOCK) * (size * size + size)
    apart = ()
    for k in tl.static_range(size):
        beyond = tl.where(mask, read[k] - origins[k], 0.0)
        total = tl.sum(beyond, 1)
        tl.store(parts + size * size + k, total, mask=present)
        apart += (tl.where(mask, beyond - (total / count)[:, None], 0.0),)
    for i in tl.static_range(size):
        for j in tl.static_range(i, size):
            product = tl.sum(apart[i] * apart[j], 1)
            tl.store(parts + i * size + j, product, mask=present)
            tl.store(parts + j * size + i, product, mask=present)


def forward(found: Tensor, a: Moments) -> None:
    if a.centred:
        return centred(found, a.read)
    grid, blocks, tiles = tiling(found.shape[0], sizes(a.read.tensors[0])[1], SUMS_TILE)
    products = tuple(a.products), tuple(same_as(a.products))
    with partial_sums(found, blocks) as parts:
        launch(moments_kernel, grid, parts, *tiles, *column_arguments(a.read), *products, like=found)


def centred(found: Tensor, read: Columns) -> None:
    """Launch on parts of each sample, and merge the moments of the parts in float64."""
    batch, row = sizes(read.tensors[0])
    grid, blocks, tiles = tiling(batch, row)
    size, block = len(read.columns) // 2, tiles[3]
    parts = found.new_empty((batch, blocks, size * size + size), dtype=torch.float32)
    tensors = tuple(rows_argument(tensor) for tensor in read.tensors)
    launch(centred_moments_kernel, grid, parts, *tiles, tensors, tuple(read.columns), like=found)
    products, sums = parts.to(found.dtype).split((size * size, size), 2)
    counts = (row - block * torch.arange(blocks, device=found.device)).clamp(max=block)[:, None]
    means = sums.sum(1) / row
    apart = sums / counts - means[:, None]  # [B, blocks, K], of the means of the parts from that of the whole
    between = (counts * apart).transpose(1, 2) @ apart
    firsts = [tensor.flatten(1)[:, 0] if tensor.ndim > 1 else tensor for tensor in read.tensors]
    origins = formed(firsts, read.columns, arithmetic_dtype(*read.tensors))
    found[:, : size * size] = products.sum(1) + between.flatten(1)
    found[:, size * size :] = torch.stack(origins, 1) + means
