"""The Triton kernels and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from lgd_kernels.runtime.memory import contiguous, partial_sums, sizes, with_contiguous_rows
from lgd_kernels.runtime.triton_common import (
    column_blocks,
    load_tile,
    omega_arguments,
    omega_at,
    on_device,
    rounded_stores,
    store_tile,
    tile,
    tiling,
)


@triton.jit
def guided_score_kernel(
    guided, cond, cond_stride, uncond, uncond_stride, batch, row,
    omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows, knot_columns,
    OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
                 knot_columns, rows, present, OMEGA, KNOTS_S, KNOTS_T)[:, None]  # fmt: skip
    cond = load_tile(cond, cond_stride, rows, first, columns, mask)
    uncond = load_tile(uncond, uncond_stride, rows, first, columns, mask)
    store_tile(guided, row, rows, first, columns, mask, cond + w * (cond - uncond))


@triton.jit
def guided_score_backward_kernel(
    d_cond, d_uncond, d_omega, upstream, upstream_stride, cond, cond_stride, uncond, uncond_stride, batch, row,
    omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows, knot_columns,
    OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TO_COND: tl.constexpr, TO_UNCOND: tl.constexpr, TO_OMEGA: tl.constexpr,
):  # fmt: skip
    """d_omega is [B, column blocks]: this program's part of each sample's sum."""
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    w = omega_at(omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
                 knot_columns, rows, present, OMEGA, KNOTS_S, KNOTS_T)[:, None]  # fmt: skip
    d = load_tile(upstream, upstream_stride, rows, first, columns, mask)
    if TO_COND:
        store_tile(d_cond, row, rows, first, columns, mask, (1 + w) * d)
    if TO_UNCOND:
        store_tile(d_uncond, row, rows, first, columns, mask, -w * d)
    if TO_OMEGA:
        cond = load_tile(cond, cond_stride, rows, first, columns, mask)
        uncond = load_tile(uncond, uncond_stride, rows, first, columns, mask)
        part = tl.sum(d * (cond - uncond), 1)
        tl.store(d_omega + rows * column_blocks(row, BLOCK) + first // BLOCK, part, mask=present)


def forward(guided, a):
    cond, uncond, omega = with_contiguous_rows(a.cond), with_contiguous_rows(a.uncond), a.omega
    grid, _, shape = tiling(guided)
    with on_device(guided), rounded_stores(guided) as (out,):
        guided_score_kernel[grid](
            out, cond, cond.stride(0), uncond, uncond.stride(0), *sizes(guided),
            **omega_arguments(omega.tensor, omega.value, contiguous(omega.table), guided), **shape,
        )  # fmt: skip


def backward(grads, b):
    d_cond, d_uncond, d_omega = grads
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in b[:3])
    omega = b.omega
    grid, blocks, shape = tiling(upstream)
    with on_device(upstream), rounded_stores(d_cond, d_uncond) as outs, partial_sums(d_omega, blocks) as parts:
        d_cond, d_uncond = outs
        present = [upstream if tensor is None else tensor for tensor in (d_cond, d_uncond, parts, cond, uncond)]
        guided_score_backward_kernel[grid](
            *present[:3], upstream, upstream.stride(0), present[3], present[3].stride(0), present[4],
            present[4].stride(0), *sizes(upstream), **omega_arguments(omega.tensor, omega.value, contiguous(omega.table), upstream), **shape,
            TO_COND=d_cond is not None, TO_UNCOND=d_uncond is not None, TO_OMEGA=d_omega is not None,
        )  # fmt: skip
