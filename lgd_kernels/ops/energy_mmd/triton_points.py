"""Few dimensions: a thread holds a point with its coordinates and gradient in registers, and visits other points one
after another."""

# mypy: disable-error-code="assignment"
# (device functions grow tuples)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.energy_mmd.triton_values import Meeting, Values, share_of, value_and_slope
from lgd_kernels.runtime.triton_launch import cdiv, launch

PROGRAMS = 1056  # enough for a large GPU: 8 for each of 132 multiprocessors
SPAN = 64  # points whose terms are added up in float32 before they join the rest in float64
MOST = 2**24  # elements of gradients in parts


@triton.jit(do_not_specialize=["columns"])
def energy_mmd_points_kernel(
    sums,
    x,
    y,
    p,
    q,
    coefficient,
    n,
    k,
    columns,
    parameters,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SAME: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Compute, for ROWS points of x with `columns` points of y, the sum of p_i q_j k(x_i, y_j) and d/dx_i of it, times
    a coefficient. `sums` are parts [B, blocks, splits] float64 and turns [B, splits, n, D] float32, or None."""
    parts, turns = sums
    blocks = tl.cdiv(n, ROWS)
    item, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    split, splits = tl.program_id(1), tl.num_programs(1)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < n
    x += item * n * D
    y += item * k * D
    q += item * k
    at, totals = (), ()
    for c in tl.static_range(D):
        at += (tl.load(x + rows * D + c, mask=there, other=0.0).to(tl.float32),)
        totals += (tl.zeros((ROWS,), tl.float64),)
    total = tl.zeros((ROWS,), tl.float64)
    begin = split * columns
    end = tl.minimum(begin + columns, k)
    if SAME == "right":
        begin = tl.maximum(begin, block * ROWS)
    for first in range(begin, end, SPAN):
        value, turn = tl.zeros((ROWS,), tl.float32), ()
        for _ in tl.static_range(D):
            turn += (tl.zeros((ROWS,), tl.float32),)
        for j in range(first, tl.minimum(first + SPAN, end)):
            other = tl.cast(j, tl.int64)
            s, apart = tl.zeros((ROWS,), tl.float32), ()
            for c in tl.static_range(D):
                here = tl.load(y + other * D + c).to(tl.float32)
                if KIND == "polynomial":
                    s += at[c] * here
                    apart += (here,)
                else:
                    s += (at[c] - here) * (at[c] - here)
                    apart += (at[c] - here,)
            found, slope = value_and_slope(s, parameters, KIND, COUNT)
            weight = tl.load(q + other)
            if SAME != "no":
                found *= share_of(rows, other, SAME, DIAGONAL)
                if not DIAGONAL:
                    slope = tl.where(rows == other, 0.0, slope)
            if parts is not None:
                value += weight * found
            if turns is not None:
                slope *= weight if KIND == "polynomial" else 2 * weight
                turned = ()
                for c in tl.static_range(D):
                    turned += (turn[c] + slope * apart[c],)
                turn = turned
        total += value.to(tl.float64)
        if turns is not None:
            added = ()
            for c in tl.static_range(D):
                added += (totals[c] + turn[c].to(tl.float64),)
            totals = added
    scale = tl.load(coefficient + item)
    own = tl.load(p + item * n + rows, mask=there, other=0.0).to(tl.float64) * scale
    if parts is not None:
        total = tl.where(there, total, 0.0)
        tl.store(parts + (item * blocks + block) * splits + split, tl.sum(total * own, 0))
    if turns is not None:
        turns += (item * splits + split) * n * D
        for c in tl.static_range(D):
            tl.store(turns + rows * D + c, (totals[c] * own).to(tl.float32), mask=there)


def meet(of: Meeting, values: Values, value: bool, gradient: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the sum of p_i q_j k(x_i, y_j), [B], and its gradient to x, [B, n, D], times the coefficient, in float64;
    None for one that is not wanted."""
    x, y = of.x.points, of.y.points
    (batch, n, dimension), k = x.shape, y.shape[1]
    rows = 256 if dimension <= 8 else 128
    blocks = cdiv(n, rows)
    splits = max(1, min(cdiv(PROGRAMS, batch * blocks), cdiv(k, SPAN), 64))
    while splits > 1 and gradient and splits * x.numel() > MOST:
        splits //= 2
    columns = cdiv(cdiv(k, splits), SPAN) * SPAN
    splits = cdiv(k, columns)
    parts = x.new_empty((batch, blocks * splits), dtype=torch.float64) if value else None
    turns = x.new_empty((batch, splits, n, dimension), dtype=torch.float32) if gradient else None
    launch(
        energy_mmd_points_kernel,
        (batch * blocks, splits),
        (parts, turns),
        x,
        y,
        of.x.weights,
        of.y.weights,
        of.coefficient,
        n,
        k,
        columns,
        *values,
        dimension,
        "no" if not of.same else "all" if gradient else "right",
        of.diagonal,
        rows,
        SPAN,
        like=x,
    )
    return None if parts is None else parts.sum(1), None if turns is None else turns.sum(1, dtype=torch.float64)
