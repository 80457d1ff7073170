"""The Triton kernel and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lgd_kernels.runtime.columns import triangle
from lgd_kernels.runtime.memory import partial_sums, sizes, with_contiguous_rows
from lgd_kernels.runtime.philox import STREAM_STEP
from lgd_kernels.runtime.triton_columns import form_columns, load_tensors, source_arguments, sources
from lgd_kernels.runtime.triton_common import column_blocks, philox_tile, store_tile, tile
from lgd_kernels.runtime.triton_old import NOISE_NONE, on_device, rounded_stores, sample_keys, seed_arguments, tiling


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample"])
def combine_kernel(
    outputs, found, tensors, strides, coefficients, constant, noise_scale, source, samples, batch, row, low, high,
    seed, seed_stride, seed_low, seed_high, first_sample, STREAM: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, GATHERED: tl.constexpr, CONSTANT: tl.constexpr, CLAMP: tl.constexpr,
    NOISE: tl.constexpr, WRITTEN: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """outputs is [WRITTEN, B, row]; found [B, column blocks, M], this program's part of the sums for PAIRS of outputs;
    coefficients [B, P, K], constant and noise_scale [B, P]. WIDE: in float64, as found is."""
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    at, missing = sources(source, samples, rows, present, GATHERED)
    read = form_columns(load_tensors(tensors, strides, rows, at, first, columns, mask, GATHERED), COLUMNS, DTYPE)
    if NOISE != NOISE_NONE:
        low_key, high_key, sample = sample_keys(seed, seed_stride, seed_low, seed_high, first_sample, rows, present,
                                                NOISE)  # fmt: skip
        z = philox_tile(low_key, high_key, sample, STREAM, first, ROWS, BLOCK)
    made = ()
    for p in tl.static_range(OUTPUTS):
        place = rows * OUTPUTS + p
        out = tl.zeros((ROWS, BLOCK), DTYPE) + missing[:, None]
        for k in tl.static_range(len(COLUMNS) // 2):
            factor = tl.load(coefficients + place * (len(COLUMNS) // 2) + k, mask=present, other=0.0)
            out += factor.to(DTYPE)[:, None] * read[k]
        if CONSTANT:
            out += tl.load(constant + place, mask=present, other=0.0).to(DTYPE)[:, None]
        if NOISE != NOISE_NONE:
            out += tl.load(noise_scale + place, mask=present, other=0.0).to(DTYPE)[:, None] * z
        if CLAMP:
            out = tl.where(out < low, low, tl.where(out > high, high, out))  # NaN stays NaN
        if p < WRITTEN:
            store_tile(outputs + p * tl.cast(batch, tl.int64) * row, row, rows, first, columns, mask, out)
        if len(PAIRS) > 0:
            made += (tl.where(mask, out, 0.0),)
    if len(PAIRS) > 0:
        found += (rows * column_blocks(row, BLOCK) + first // BLOCK) * (len(PAIRS) // 2)
    for m in tl.static_range(len(PAIRS) // 2):
        if PAIRS[2 * m + 1] >= 0:
            tl.store(found + m, tl.sum(made[PAIRS[2 * m]] * made[PAIRS[2 * m + 1]], 1), mask=present)
        else:
            tl.store(found + m, tl.sum(made[PAIRS[2 * m]], 1), mask=present)


def forward(outputs, tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
            low, high, found=None):  # fmt: skip
    tensors = [with_contiguous_rows(tensor) for tensor in tensors]
    coefficients = coefficients.contiguous()
    constant, noise_scale = (coefficients if one is None else one.contiguous() for one in (constant, noise_scale))
    like = tensors[0][:1].expand(coefficients.shape[0], *tensors[0].shape[1:])
    grid, blocks, shape = tiling(like)
    with on_device(outputs), rounded_stores(outputs) as (out,), partial_sums(found, blocks) as parts:
        combine_kernel[grid](
            out, out if found is None else parts, tuple(tensors), tuple(tensor.stride(0) for tensor in tensors),
            coefficients, constant, noise_scale,
            *source_arguments(source, tensors[0]), *sizes(like), low, high,
            **seed_arguments(seed, seed_value, first_sample, None, coefficients), STREAM=STREAM_STEP,
            OUTPUTS=coefficients.shape[1], WRITTEN=outputs.shape[0],
            PAIRS=() if found is None else tuple(triangle(coefficients.shape[1])),
            WIDE=found is not None and found.dtype == torch.float64,
            COLUMNS=tuple(columns), GATHERED=0 if source is None else len(tensors),
            CONSTANT=constant is not coefficients, CLAMP=low > float("-inf") or high < float("inf"), **shape,
        )  # fmt: skip
