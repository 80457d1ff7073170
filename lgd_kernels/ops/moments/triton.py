"""The Triton kernel and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lgd_kernels.runtime.columns import formed, same_as
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.memory import partial_sums, sizes, with_contiguous_rows
from lgd_kernels.runtime.triton_columns import form_columns, load_tensors, source_arguments, sources
from lgd_kernels.runtime.triton_common import column_blocks, tile
from lgd_kernels.runtime.triton_old import on_device, tiling


@triton.jit
def moments_kernel(
    found, tensors, strides, source, samples, batch, row,
    COLUMNS: tl.constexpr, PAIRS: tl.constexpr, SAME_AS: tl.constexpr, GATHERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found is [B, column blocks, M]: this program's part of each sample's sums."""
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    at, missing = sources(source, samples, rows, present, GATHERED)
    read = form_columns(load_tensors(tensors, strides, rows, at, first, columns, mask, GATHERED), COLUMNS)
    found += (rows * column_blocks(row, BLOCK) + first // BLOCK) * (len(PAIRS) // 2)
    sums = ()
    for m in tl.static_range(len(PAIRS) // 2):
        if SAME_AS[m] < m:
            sums += (sums[SAME_AS[m]],)
        elif PAIRS[2 * m + 1] >= 0:
            sums += (tl.sum(read[PAIRS[2 * m]] * read[PAIRS[2 * m + 1]], 1) + missing,)
        else:
            sums += (tl.sum(read[PAIRS[2 * m]], 1) + missing,)
        tl.store(found + m, sums[m], mask=present)


@triton.jit
def centred_moments_kernel(
    parts, tensors, strides, batch, row, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts is [B, column blocks, K K + K]: products of each column less its mean over this program's part, and sums of
    the columns less their first element, without which the mean of a part would lose digits."""
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    read = form_columns(load_tensors(tensors, strides, rows, rows, first, columns, mask, 0), COLUMNS)
    one = tl.zeros((1,), tl.int32)
    origins = form_columns(load_tensors(tensors, strides, rows, rows, 0, one, present[:, None], 0), COLUMNS)
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


def centred(found, tensors, columns):
    tensors = [with_contiguous_rows(tensor) for tensor in tensors]
    grid, blocks, shape = tiling(tensors[0])
    batch, row = sizes(tensors[0])
    size = len(columns) // 2
    parts = found.new_empty((batch, blocks, size * size + size), dtype=torch.float32)
    with on_device(found):
        centred_moments_kernel[grid](
            parts, tuple(tensors), tuple(tensor.stride(0) for tensor in tensors), batch, row,
            COLUMNS=tuple(columns), **shape,
        )  # fmt: skip
    products, sums = parts.to(found.dtype).split((size * size, size), 2)
    counts = (row - shape["BLOCK"] * torch.arange(blocks, device=found.device)).clamp(max=shape["BLOCK"])[:, None]
    means = sums.sum(1) / row
    apart = sums / counts - means[:, None]  # [B, blocks, K], of the means of the parts from that of the whole
    between = (counts * apart).transpose(1, 2) @ apart
    origins = formed([tensor.flatten(1)[:, 0] if tensor.ndim > 1 else tensor for tensor in tensors], columns,
                     arithmetic_dtype(*tensors))  # fmt: skip
    found[:, : size * size] = products.sum(1) + between.flatten(1)
    found[:, size * size :] = torch.stack(origins, 1) + means


def forward(found, tensors, columns, pairs, source, gathered):
    tensors = [with_contiguous_rows(tensor) for tensor in tensors]
    like = tensors[0][:1].expand(found.shape[0], *tensors[0].shape[1:])
    grid, blocks, shape = tiling(like)
    with on_device(found), partial_sums(found, blocks) as parts:
        moments_kernel[grid](
            parts, tuple(tensors), tuple(tensor.stride(0) for tensor in tensors), *source_arguments(source, tensors[0]),
            *sizes(like), COLUMNS=tuple(columns), PAIRS=tuple(pairs), SAME_AS=tuple(same_as(pairs)),
            GATHERED=0 if source is None else gathered, **shape,
        )  # fmt: skip
