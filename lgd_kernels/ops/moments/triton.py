"""The Triton kernel and its launcher."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.columns import same_as
from lgd_kernels.native import partial_sums, sizes, with_contiguous_rows
from lgd_kernels.triton_columns import form_columns, load_tensors, source_arguments, sources
from lgd_kernels.triton_common import column_blocks, on_device, tile, tiling


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
