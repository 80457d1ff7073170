"""Few dimensions: a thread holds a point, coordinates and gradient in registers, and meets one other after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lgd_kernels.ops.energy_mmd.triton_values import share_of, value_and_slope
from lgd_kernels.runtime.triton_old import on_device

PROGRAMS = 1056  # that keep a large GPU busy: 8 for each of 132 multiprocessors
SPAN = 64  # points whose terms are added up in float32, before they join the rest in float64
MOST = 2**24  # elements of gradients in parts


@triton.jit(do_not_specialize=["columns"])
def energy_mmd_points_kernel(
    parts, turns, x, y, p, q, coefficient, n, k, columns, parameters, D: tl.constexpr, KIND: tl.constexpr,
    COUNT: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of ROWS points of x with `columns` of y: the sum of p_i q_j k(x_i, y_j), and d/dx_i of it, times a coefficient.
    parts [B, blocks, splits] float64; turns [B, splits, n, D] float32."""
    blocks = tl.cdiv(n, ROWS)
    item, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    split, splits = tl.program_id(1), tl.num_programs(1)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < n
    x += item * n * D
    y += item * k * D
    q += item * k
    at, sums = (), ()
    for c in tl.static_range(D):
        at += (tl.load(x + rows * D + c, mask=there, other=0.0).to(tl.float32),)
        sums += (tl.zeros((ROWS,), tl.float64),)
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
            if VALUE:
                value += weight * found
            if GRADIENT:
                slope *= weight if KIND == "polynomial" else 2 * weight
                turned = ()
                for c in tl.static_range(D):
                    turned += (turn[c] + slope * apart[c],)
                turn = turned
        total += value.to(tl.float64)
        if GRADIENT:
            added = ()
            for c in tl.static_range(D):
                added += (sums[c] + turn[c].to(tl.float64),)
            sums = added
    scale = tl.load(coefficient + item)
    own = tl.load(p + item * n + rows, mask=there, other=0.0).to(tl.float64) * scale
    if VALUE:
        total = tl.where(there, total, 0.0)
        tl.store(parts + (item * blocks + block) * splits + split, tl.sum(total * own, 0))
    if GRADIENT:
        turns += (item * splits + split) * n * D
        for c in tl.static_range(D):
            tl.store(turns + rows * D + c, (sums[c] * own).to(tl.float32), mask=there)


def meet(x, y, p, q, coefficient, values, same, diagonal, value, gradient):
    """(sum [B] float64, gradient [B, n, D] float64) of p_i q_j k(x_i, y_j), times the coefficient [B]; None where not
    wanted."""
    (batch, n, dimension), k = x.shape, y.shape[1]
    rows = 256 if dimension <= 8 else 128
    blocks = triton.cdiv(n, rows)
    splits = max(1, min(triton.cdiv(PROGRAMS, batch * blocks), triton.cdiv(k, SPAN), 64))
    while splits > 1 and gradient and splits * x.numel() > MOST:
        splits //= 2
    columns = triton.cdiv(triton.cdiv(k, splits), SPAN) * SPAN
    splits = triton.cdiv(k, columns)
    parts = torch.empty((batch, blocks * splits), dtype=torch.float64, device=x.device)
    turns = torch.empty((batch, splits, n, dimension) if gradient else 0, dtype=torch.float32, device=x.device)
    with on_device(x):
        energy_mmd_points_kernel[batch * blocks, splits](
            parts, turns, x, y, p, q, coefficient, n, k, columns, **values, D=dimension,
            SAME="no" if not same else "all" if gradient else "right", DIAGONAL=diagonal, VALUE=value,
            GRADIENT=gradient, ROWS=rows, SPAN=SPAN, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return parts.sum(1) if value else None, turns.sum(1, dtype=torch.float64) if gradient else None
