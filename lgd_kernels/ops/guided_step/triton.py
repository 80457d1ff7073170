"""The Triton kernels and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.runtime.memory import contiguous, partial_sums, sizes, with_contiguous_rows
from lgd_kernels.runtime.philox import STREAM_STEP
from lgd_kernels.runtime.triton_common import (
    NOISE_NONE,
    NOISE_TENSOR,
    column_blocks,
    level_arguments,
    load_tile,
    number_arguments,
    omega_arguments,
    omega_at,
    on_device,
    per_sample,
    philox_tile,
    rounded_stores,
    sample_keys,
    seed_arguments,
    step_coefficients,
    store_tile,
    tile,
    tiling,
)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample"])
def guided_step_kernel(
    x_s, x, x_stride, cond, cond_stride, uncond, uncond_stride, noise, noise_stride, batch, row,
    signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churn, churn_stride, churn_value,
    omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows, knot_columns,
    seed, seed_stride, seed_low, seed_high, first_sample, STREAM: tl.constexpr,
    PREDICTION: tl.constexpr, CHURN: tl.constexpr, NOISE: tl.constexpr,
    OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
                 knot_columns, rows, present, OMEGA, KNOTS_S, KNOTS_T)[:, None]  # fmt: skip
    churned = per_sample(churn, churn_stride, churn_value, rows, present, CHURN)
    to_x, to_guided, to_noise = step_coefficients(signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churned,
                                                  rows, present, PREDICTION)  # fmt: skip
    x = load_tile(x, x_stride, rows, first, columns, mask)
    cond = load_tile(cond, cond_stride, rows, first, columns, mask)
    uncond = load_tile(uncond, uncond_stride, rows, first, columns, mask)
    stepped = to_x[:, None] * x + to_guided[:, None] * (cond + w * (cond - uncond))
    if NOISE == NOISE_TENSOR:
        stepped += to_noise[:, None] * load_tile(noise, noise_stride, rows, first, columns, mask)
    elif NOISE != NOISE_NONE:
        low, high, sample = sample_keys(seed, seed_stride, seed_low, seed_high, first_sample, rows, present, NOISE)
        stepped += to_noise[:, None] * philox_tile(low, high, sample, STREAM, first, ROWS, BLOCK)
    store_tile(x_s, row, rows, first, columns, mask, stepped)


@triton.jit
def guided_step_backward_kernel(
    d_x, d_cond, d_uncond, d_noise, d_omega, upstream, upstream_stride, cond, cond_stride, uncond, uncond_stride,
    batch, row, signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churn, churn_stride, churn_value,
    omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows, knot_columns,
    PREDICTION: tl.constexpr, CHURN: tl.constexpr,
    OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TO_X: tl.constexpr, TO_COND: tl.constexpr, TO_UNCOND: tl.constexpr, TO_NOISE: tl.constexpr, TO_OMEGA: tl.constexpr,
):  # fmt: skip
    """d_omega is [B, column blocks]: this program's part of each sample's sum."""
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
                 knot_columns, rows, present, OMEGA, KNOTS_S, KNOTS_T)[:, None]  # fmt: skip
    churned = per_sample(churn, churn_stride, churn_value, rows, present, CHURN)
    to_x, to_guided, to_noise = step_coefficients(signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churned,
                                                  rows, present, PREDICTION)  # fmt: skip
    d = load_tile(upstream, upstream_stride, rows, first, columns, mask)
    if TO_X:
        store_tile(d_x, row, rows, first, columns, mask, to_x[:, None] * d)
    if TO_COND:
        store_tile(d_cond, row, rows, first, columns, mask, to_guided[:, None] * (1 + w) * d)
    if TO_UNCOND:
        store_tile(d_uncond, row, rows, first, columns, mask, -to_guided[:, None] * w * d)
    if TO_NOISE:
        store_tile(d_noise, row, rows, first, columns, mask, to_noise[:, None] * d)
    if TO_OMEGA:
        cond = load_tile(cond, cond_stride, rows, first, columns, mask)
        uncond = load_tile(uncond, uncond_stride, rows, first, columns, mask)
        part = to_guided * tl.sum(d * (cond - uncond), 1)
        tl.store(d_omega + rows * column_blocks(row, BLOCK) + first // BLOCK, part, mask=present)


def forward(x_s, a):
    x, cond, uncond, noise = (with_contiguous_rows(tensor) for tensor in a[:4])
    omega, levels, prediction, churn = a.scalars
    grid, _, shape = tiling(x_s)
    noise_or_x = x if noise is None else noise
    with on_device(x_s), rounded_stores(x_s) as (out,):
        guided_step_kernel[grid](
            out, x, x.stride(0), cond, cond.stride(0), uncond, uncond.stride(0), noise_or_x, noise_or_x.stride(0),
            *sizes(x_s), *level_arguments(levels), *number_arguments(*churn, x),
            **omega_arguments(omega.tensor, omega.value, contiguous(omega.table), x),
            **seed_arguments(*a.seed, noise, x), STREAM=STREAM_STEP,
            PREDICTION=prediction, CHURN=churn.tensor is not None, **shape,
        )  # fmt: skip


def backward(grads, b):
    d_x, d_cond, d_uncond, d_noise, d_omega = grads
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in b[:3])
    omega, levels, prediction, churn = b.scalars
    grid, blocks, shape = tiling(upstream)
    with (
        on_device(upstream),
        rounded_stores(d_x, d_cond, d_uncond, d_noise) as outs,
        partial_sums(d_omega, blocks) as parts,
    ):
        wanted = dict(zip(("TO_X", "TO_COND", "TO_UNCOND", "TO_NOISE", "TO_OMEGA"),
                          (out is not None for out in (*outs, parts)), strict=True))  # fmt: skip
        *out, cond, uncond = (upstream if tensor is None else tensor for tensor in (*outs, parts, cond, uncond))
        guided_step_backward_kernel[grid](
            *out, upstream, upstream.stride(0), cond, cond.stride(0), uncond, uncond.stride(0), *sizes(upstream),
            *level_arguments(levels), *number_arguments(*churn, upstream),
            **omega_arguments(omega.tensor, omega.value, contiguous(omega.table), upstream),
            PREDICTION=prediction, CHURN=churn.tensor is not None, **wanted, **shape,
        )  # fmt: skip
