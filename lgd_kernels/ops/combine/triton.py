"""The Triton kernel and its launcher."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.combine.structs import Combine
from lgd_kernels.runtime.columns import triangle
from lgd_kernels.runtime.memory import partial_sums, sizes
from lgd_kernels.runtime.philox import STREAM_STEP
from lgd_kernels.runtime.triton_columns import column_arguments, form_columns, load_tensors, samples_read
from lgd_kernels.runtime.triton_common import column_blocks, keys_of, philox_tile, store_tile, tile
from lgd_kernels.runtime.triton_launch import launch, seed_arguments, tiling


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample"])
def combine_kernel(
    outputs,
    batch,
    row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    tensors,
    COLUMNS: tl.constexpr,
    source,
    GATHERED: tl.constexpr,
    coefficients,
    constant,
    noise_scale,
    seeds,
    seed_low,
    seed_high,
    first_sample,
    STREAM: tl.constexpr,
    clamp,
    OUTPUTS: tl.constexpr,
    WRITTEN: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`outputs` are the outputs [WRITTEN, B, row] and, if there are PRODUCTS of outputs, this program's part of their
    sums [B, column blocks, M]; coefficients are [B, P, K], constant and noise_scale [B, P]; clamp is (low, high) or
    None. WIDE: arithmetic is float64, as the sums are."""
    written, found = outputs
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows, present, first, elements = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + elements < row)[None, :]
    at, missing = samples_read(source, rows, present)
    read = form_columns(load_tensors(tensors, rows, at, first, elements, mask, GATHERED), COLUMNS, DTYPE)
    if noise_scale is not None:
        low_key, high_key, sample = keys_of(seeds, seed_low, seed_high, first_sample, rows, present)
        z = philox_tile(low_key, high_key, sample, STREAM, first, ROWS, BLOCK)
    made = ()
    for p in tl.static_range(OUTPUTS):
        place = rows * OUTPUTS + p
        out = tl.zeros((ROWS, BLOCK), DTYPE) + missing[:, None]
        for k in tl.static_range(len(COLUMNS) // 2):
            factor = tl.load(coefficients + place * (len(COLUMNS) // 2) + k, mask=present, other=0.0)
            out += factor.to(DTYPE)[:, None] * read[k]
        if constant is not None:
            out += tl.load(constant + place, mask=present, other=0.0).to(DTYPE)[:, None]
        if noise_scale is not None:
            out += tl.load(noise_scale + place, mask=present, other=0.0).to(DTYPE)[:, None] * z
        if clamp is not None:
            out = tl.where(out < clamp[0], clamp[0], tl.where(out > clamp[1], clamp[1], out))  # NaN stays NaN
        if p < WRITTEN:
            store_tile(written + p * tl.cast(batch, tl.int64) * row, row, rows, first, elements, mask, out)
        if len(PRODUCTS) > 0:
            made += (tl.where(mask, out, 0.0),)
    if len(PRODUCTS) > 0:
        found += (rows * column_blocks(row, BLOCK) + first // BLOCK) * (len(PRODUCTS) // 2)
    for m in tl.static_range(len(PRODUCTS) // 2):
        if PRODUCTS[2 * m + 1] >= 0:
            tl.store(found + m, tl.sum(made[PRODUCTS[2 * m]] * made[PRODUCTS[2 * m + 1]], 1), mask=present)
        else:
            tl.store(found + m, tl.sum(made[PRODUCTS[2 * m]], 1), mask=present)


def forward(outputs: tuple[Tensor, Tensor | None], a: Combine) -> None:
    written, found = outputs
    batch, count, _ = a.coefficients.shape
    grid, blocks, tiles = tiling(batch, sizes(a.read.tensors[0])[1])
    with partial_sums(found, blocks) as parts:
        launch(
            combine_kernel,
            grid,
            (written, parts),
            *tiles,
            *column_arguments(a.read),
            *(one if one is None else one.contiguous() for one in (a.coefficients, a.constant, a.noise_scale)),
            *seed_arguments(a.seed),
            STREAM_STEP,
            (a.low, a.high) if a.low > -math.inf or a.high < math.inf else None,
            count,
            written.shape[0],
            () if found is None else tuple(triangle(count)),
            found is not None and found.dtype == torch.float64,
            like=a.coefficients,
        )
