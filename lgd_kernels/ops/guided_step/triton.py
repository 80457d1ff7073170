"""The Triton kernels and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward
from lgd_kernels.runtime.memory import partial_sums, sizes
from lgd_kernels.runtime.philox import STREAM_STEP
from lgd_kernels.runtime.triton_common import (
    column_blocks,
    keys_of,
    load_tile,
    number_at,
    omega_at,
    philox_tile,
    step_coefficients,
    store_tile,
    tile,
)
from lgd_kernels.runtime.triton_launch import (
    launch,
    level_argument,
    number_argument,
    omega_arguments,
    rows_argument,
    seed_arguments,
    tiling,
)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample"])
def guided_step_kernel(
    x_s,
    x,
    cond,
    uncond,
    noise,
    batch,
    row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    omega,
    KNOTS: tl.constexpr,
    levels,
    PREDICTION: tl.constexpr,
    churn,
    seeds,
    seed_low,
    seed_high,
    first_sample,
    STREAM: tl.constexpr,
):
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, KNOTS, rows, present)[:, None]
    churned = number_at(churn, rows, present)
    to_x, to_guided, to_noise = step_coefficients(*levels, churned, rows, present, PREDICTION)
    x = load_tile(*x, rows, first, columns, mask)
    cond = load_tile(*cond, rows, first, columns, mask)
    uncond = load_tile(*uncond, rows, first, columns, mask)
    stepped = to_x[:, None] * x + to_guided[:, None] * (cond + w * (cond - uncond))
    if noise is not None:
        stepped += to_noise[:, None] * load_tile(*noise, rows, first, columns, mask)
    elif first_sample is not None:
        low, high, sample = keys_of(seeds, seed_low, seed_high, first_sample, rows, present)
        stepped += to_noise[:, None] * philox_tile(low, high, sample, STREAM, first, ROWS, BLOCK)
    store_tile(x_s, row, rows, first, columns, mask, stepped)


@triton.jit
def guided_step_backward_kernel(
    grads,
    upstream,
    cond,
    uncond,
    batch,
    row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    omega,
    KNOTS: tl.constexpr,
    levels,
    PREDICTION: tl.constexpr,
    churn,
):
    """`grads` are d_x, d_cond, d_uncond, d_noise and d_omega, [B, column blocks]: this program's part of each sum."""
    d_x, d_cond, d_uncond, d_noise, d_omega = grads
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, KNOTS, rows, present)[:, None]
    churned = number_at(churn, rows, present)
    to_x, to_guided, to_noise = step_coefficients(*levels, churned, rows, present, PREDICTION)
    d = load_tile(*upstream, rows, first, columns, mask)
    if d_x is not None:
        store_tile(d_x, row, rows, first, columns, mask, to_x[:, None] * d)
    if d_cond is not None:
        store_tile(d_cond, row, rows, first, columns, mask, to_guided[:, None] * (1 + w) * d)
    if d_uncond is not None:
        store_tile(d_uncond, row, rows, first, columns, mask, -to_guided[:, None] * w * d)
    if d_noise is not None:
        store_tile(d_noise, row, rows, first, columns, mask, to_noise[:, None] * d)
    if d_omega is not None:
        cond = load_tile(*cond, rows, first, columns, mask)
        uncond = load_tile(*uncond, rows, first, columns, mask)
        part = to_guided * tl.sum(d * (cond - uncond), 1)
        tl.store(d_omega + rows * column_blocks(row, BLOCK) + first // BLOCK, part, mask=present)


def forward(x_s, a: GuidedStep) -> None:
    grid, _, tiles = tiling(*sizes(x_s))
    omega, levels, prediction, churn = a.scalars
    launch(
        guided_step_kernel,
        grid,
        x_s,
        rows_argument(a.x),
        rows_argument(a.cond),
        rows_argument(a.uncond),
        rows_argument(a.noise),
        *tiles,
        *omega_arguments(omega),
        level_argument(levels),
        prediction,
        number_argument(churn),
        *seed_arguments(a.seed),
        STREAM_STEP,
        like=x_s,
    )


def backward(grads, b: GuidedStepBackward) -> None:
    grid, blocks, tiles = tiling(*sizes(b.upstream))
    omega, levels, prediction, churn = b.scalars
    with partial_sums(grads[4], blocks) as parts:
        launch(
            guided_step_backward_kernel,
            grid,
            (*grads[:4], parts),
            rows_argument(b.upstream),
            rows_argument(b.cond),
            rows_argument(b.uncond),
            *tiles,
            *omega_arguments(omega),
            level_argument(levels),
            prediction,
            number_argument(churn),
            like=b.upstream,
        )
