"""The Triton kernels and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward
from lgd_kernels.runtime.memory import partial_sums, sizes
from lgd_kernels.runtime.triton_common import column_blocks, load_tile, omega_at, store_tile, tile
from lgd_kernels.runtime.triton_launch import launch, omega_arguments, rows_argument, tiling


@triton.jit
def guided_score_kernel(
    guided, cond, uncond, batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr, omega, KNOTS: tl.constexpr
):
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, KNOTS, rows, present)[:, None]
    cond = load_tile(*cond, rows, first, columns, mask)
    uncond = load_tile(*uncond, rows, first, columns, mask)
    store_tile(guided, row, rows, first, columns, mask, cond + w * (cond - uncond))


@triton.jit
def guided_score_backward_kernel(
    grads, upstream, cond, uncond, batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr, omega, KNOTS: tl.constexpr
):
    """`grads` are d_cond, d_uncond and d_omega, [B, column blocks]: this program's part of each sum."""
    d_cond, d_uncond, d_omega = grads
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, KNOTS, rows, present)[:, None]
    d = load_tile(*upstream, rows, first, columns, mask)
    if d_cond is not None:
        store_tile(d_cond, row, rows, first, columns, mask, (1 + w) * d)
    if d_uncond is not None:
        store_tile(d_uncond, row, rows, first, columns, mask, -w * d)
    if d_omega is not None:
        cond = load_tile(*cond, rows, first, columns, mask)
        uncond = load_tile(*uncond, rows, first, columns, mask)
        part = tl.sum(d * (cond - uncond), 1)
        tl.store(d_omega + rows * column_blocks(row, BLOCK) + first // BLOCK, part, mask=present)


def forward(guided, a: GuidedScore) -> None:
    grid, _, tiles = tiling(*sizes(guided))
    data = rows_argument(a.cond), rows_argument(a.uncond)
    launch(guided_score_kernel, grid, guided, *data, *tiles, *omega_arguments(a.omega), like=guided)


def backward(grads, b: GuidedScoreBackward) -> None:
    grid, blocks, tiles = tiling(*sizes(b.upstream))
    data = rows_argument(b.upstream), rows_argument(b.cond), rows_argument(b.uncond)
    with partial_sums(grads[2], blocks) as parts:
        outputs = (*grads[:2], parts)
        omega = omega_arguments(b.omega)
        launch(guided_score_backward_kernel, grid, outputs, *data, *tiles, *omega, like=b.upstream)
