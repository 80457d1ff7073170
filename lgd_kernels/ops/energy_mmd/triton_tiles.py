"""Many dimensions: tiles of a product, or of differences, in two kernels. The first turns a tile of pairs into its
share of the sum and, where gradients are wanted, into the weights w_ij of x_i - y_j; the second multiplies the weights
of a block of pairs with the points, for either end. A tile that holds a close pair is taken from differences in both:
the first decides, and leaves a mark for the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lgd_kernels.ops.energy_mmd.triton_values import share_of, value_and_slope
from lgd_kernels.runtime.triton_old import on_device

TILE = 32  # points; of 64, a thread would hold more numbers than there are registers on sm_80 and sm_120
WARPS, STAGES = 8, 2
BLOCK, VALUES_BLOCK = 4096, 32768  # points of a block of pairs with weights, 64 MiB, and without
CLOSEST = 1e-2  # of ||x||^2 + ||y||^2: as on the CPU


@triton.jit
def _differences(x, y, rows, columns, here, there, D, TILE: tl.constexpr):
    """||x_i - y_j||^2 of a tile."""
    s = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, D, 32):  # squares that are added up before they join the rest
        part = tl.zeros((TILE, TILE), tl.float32)
        for c in range(first, tl.minimum(first + 32, D)):
            a = tl.load(x + rows * D + c, mask=here, other=0.0).to(tl.float32)
            b = tl.load(y + columns * D + c, mask=there, other=0.0).to(tl.float32)
            apart = a[:, None] - b[None, :]
            part += apart * apart
        s += part
    return s


@triton.jit
def _products(x, y, rows, columns, here, there, D, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    s = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, D, DEPTH):
        c = first + tl.arange(0, DEPTH)
        a = tl.load(x + rows[:, None] * D + c[None, :], mask=here[:, None] & (c < D)[None, :], other=0.0)
        b = tl.load(y + columns[None, :] * D + c[:, None], mask=there[None, :] & (c < D)[:, None], other=0.0)
        s = tl.dot(a.to(tl.float32), b.to(tl.float32), s, input_precision=PRECISION)
    return s


@triton.jit(do_not_specialize=["first_row", "first_column", "rows_here", "columns_here"])
def energy_mmd_pairs_kernel(
    parts, weights, close, x, y, x_norms, y_norms, p, q, coefficient, n, k, first_row, first_column, rows_here,
    columns_here, D, closest, parameters, KIND: tl.constexpr, COUNT: tl.constexpr, SAME: tl.constexpr,
    DIAGONAL: tl.constexpr, MODE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """A tile of a block of pairs. parts [B, MOST] float64 is added to; weights [B, rows_here, columns_here]. MODE:
    "direct", "product", or "auto", which goes by the tile."""
    across = tl.cdiv(columns_here, TILE)
    tiles = tl.cdiv(rows_here, TILE) * across
    item, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    in_row = tile // across * TILE + tl.arange(0, TILE)
    in_column = tile % across * TILE + tl.arange(0, TILE)
    here, there = in_row < rows_here, in_column < columns_here
    rows, columns = first_row.to(tl.int64) + in_row, first_column.to(tl.int64) + in_column
    x += item * n * D
    y += item * k * D
    counts = here[:, None] & there[None, :]
    depth = D
    if SAME:  # below the diagonal a tile has nothing to do
        counts = counts & (columns[None, :] >= rows[:, None])
        depth = tl.where(first_column + (tile % across + 1) * TILE <= first_row + tile // across * TILE, 0, D)
    mark = 0
    if MODE == "direct":
        s = _differences(x, y, rows, columns, here, there, depth, TILE)
    else:
        s = _products(x, y, rows, columns, here, there, depth, PRECISION, TILE, DEPTH)
        if KIND != "polynomial":
            norms = tl.load(x_norms + item * n + rows, mask=here, other=0.0)[:, None]
            norms = norms + tl.load(y_norms + item * k + columns, mask=there, other=0.0)[None, :]
            s = norms - 2 * s
            s = tl.where(s < 0, 0.0, s)
            if MODE == "auto":
                near = counts & (s < closest * norms)
                if SAME:
                    near = near & (columns[None, :] != rows[:, None])
                mark = tl.max(tl.max(near.to(tl.int32), 1), 0)
                if mark != 0:
                    s = _differences(x, y, rows, columns, here, there, depth, TILE)
            if SAME:
                s = tl.where(columns[None, :] == rows[:, None], 0.0, s)
    value, slope = value_and_slope(s, parameters, KIND, COUNT)
    own = tl.load(p + item * n + rows, mask=here, other=0.0)
    weight = own[:, None] * tl.load(q + item * k + columns, mask=there, other=0.0)[None, :]
    if SAME:
        share = share_of(rows[:, None], columns[None, :], "right", DIAGONAL)
        value *= share
        slope *= share  # of a point and itself half, at either end
    value = tl.where(counts, weight * value, 0.0)
    scale = tl.load(coefficient + item)
    at = parts + item * MOST + tile
    tl.store(at, tl.load(at) + scale * tl.sum(tl.sum(value, 1).to(tl.float64), 0))
    if GRADIENT:
        turn = tl.where(counts, (weight if KIND == "polynomial" else 2 * weight) * slope, 0.0)
        offsets = in_row[:, None].to(tl.int64) * columns_here + in_column[None, :]
        tl.store(weights + item * rows_here * columns_here + offsets, turn, mask=here[:, None] & there[None, :])
        tl.store(close + item * tiles + tile, mark)


@triton.jit
def _turn(weights, y, at, sums, columns, c, here, there, inside, D, w_column, TILE: tl.constexpr):
    """sums_ic + sum_j w_ij (x_ic - y_jc), one j after another."""
    for j in range(0, there):
        w = tl.load(weights + j * w_column, mask=here, other=0.0)
        b = tl.load(y + (columns + j) * D + c, mask=inside, other=0.0).to(tl.float32)
        sums += w[:, None] * (at - b[None, :])
    return sums


@triton.jit(do_not_specialize=["first_row", "first_column", "rows_here", "columns_here"])
def energy_mmd_turn_kernel(
    gradient, weights, close, x, y, coefficient, n, k, first_row, first_column, rows_here, columns_here, D, w_row,
    w_column, close_row, close_column, PRODUCT: tl.constexpr, MODE: tl.constexpr, WITHIN: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """gradient_i += coefficient sum_j w_ij (x_i - y_j) (PRODUCT: w_ij y_j), of WIDTH coordinates of a tile of points,
    over the columns of a block. WITHIN: weights are 0 left ("right") or right ("left") of the diagonal, or nowhere."""
    chunks = tl.cdiv(D, WIDTH)
    down, across = tl.cdiv(rows_here, TILE), tl.cdiv(columns_here, TILE)
    item = (tl.program_id(0) // (chunks * down)).to(tl.int64)
    tile, chunk = tl.program_id(0) // chunks % down, tl.program_id(0) % chunks
    in_row = tile * TILE + tl.arange(0, TILE)
    here = in_row < rows_here
    c = chunk * WIDTH + tl.arange(0, WIDTH)
    inside = c < D
    held = here[:, None] & inside[None, :]
    rows = item * n + first_row.to(tl.int64) + in_row
    y += item * k * D
    weights += item * rows_here * columns_here + in_row.to(tl.int64) * w_row
    close += item * down * across + tile * close_row
    at = tl.load(x + rows[:, None] * D + c[None, :], mask=held, other=0.0).to(tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    begin = tile if WITHIN == "right" else 0
    end = tile + 1 if WITHIN == "left" else across
    for other in range(begin, end):
        first = tl.cast(other, tl.int64) * TILE
        count = tl.minimum(columns_here - other * TILE, TILE)
        columns = first_column.to(tl.int64) + first
        part = weights + first * w_column
        mark = 0
        if MODE == "direct":
            mark = 1
        elif MODE == "auto":
            mark = tl.load(close + other * close_column)
        if MODE != "product" and mark != 0:
            sums = _turn(part, y, at, sums, columns, c, here, count, inside, D, w_column, TILE)
        elif MODE != "direct":
            j = tl.arange(0, TILE)
            there = j < count
            w = tl.load(part[:, None] + (j * w_column)[None, :], mask=here[:, None] & there[None, :], other=0.0)
            b = tl.load(y + (columns + j)[:, None] * D + c[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            if PRODUCT:
                sums = tl.dot(w, b.to(tl.float32), sums, input_precision=PRECISION)
            else:
                sums += tl.sum(w, 1)[:, None] * at
                sums = tl.dot(-w, b.to(tl.float32), sums, input_precision=PRECISION)
    scale = tl.load(coefficient + item).to(tl.float32)
    to = gradient + rows[:, None] * D + c[None, :]
    tl.store(to, tl.load(to, mask=held, other=0.0) + scale * sums, mask=held)


def meet(x, y, norms, p, q, coefficient, values, same, diagonal, mode, d_x, d_y):
    """The sum [B] float64 of p_i q_j k(x_i, y_j), times the coefficient [B]; its gradients are added to d_x and d_y
    where given."""
    (batch, n, dimension), k = x.shape, y.shape[1]
    wanted = d_x is not None or d_y is not None
    block = BLOCK if wanted else VALUES_BLOCK
    while wanted and block > TILE and batch * min(block, n) * min(block, k) > BLOCK * BLOCK:
        block //= 2
    block = min(block, triton.cdiv(max(n, k), TILE) * TILE)
    most = triton.cdiv(min(block, n), TILE) * triton.cdiv(min(block, k), TILE)
    parts = torch.zeros((batch, most), dtype=torch.float64, device=x.device)
    weights = torch.empty(batch * min(block, n) * min(block, k) if wanted else 0, dtype=torch.float32, device=x.device)
    close = torch.empty(batch * most if wanted else 0, dtype=torch.int32, device=x.device)
    precision = "ieee" if torch.version.hip else "tf32x3"
    common = {
        "MODE": mode,
        "PRECISION": precision,
        "TILE": TILE,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "enable_fp_fusion": True,
    }
    with on_device(x):
        for i in range(0, n, block):
            for j in range(i if same else 0, k, block):
                here, there = min(block, n - i), min(block, k - j)
                down, across = triton.cdiv(here, TILE), triton.cdiv(there, TILE)
                energy_mmd_pairs_kernel[batch * down * across,](
                    parts, weights, close, x, y, *norms, p, q, coefficient, n, k, i, j, here, there, dimension,
                    CLOSEST, **values, SAME=same, DIAGONAL=diagonal, GRADIENT=wanted, DEPTH=32, MOST=most, **common,
                )  # fmt: skip
                within = same and i == j
                for gradient, ends, firsts, strides, side in (
                    (d_x, (x, y, n, k, here, there), (i, j), (there, 1, across, 1), "right"),
                    (d_y, (y, x, k, n, there, here), (j, i), (1, there, 1, across), "left"),
                ):
                    if gradient is None:
                        continue
                    points, others, count, other_count, rows, columns = ends
                    width = min(32, max(16, triton.next_power_of_2(dimension)))
                    grid = batch * triton.cdiv(rows, TILE) * triton.cdiv(dimension, width)
                    energy_mmd_turn_kernel[grid,](
                        gradient, weights, close, points, others, coefficient, count, other_count, *firsts, rows,
                        columns, dimension, *strides, PRODUCT=values["KIND"] == "polynomial",
                        WITHIN=side if within else "no", WIDTH=width, **common,
                    )  # fmt: skip
    return parts.sum(1)
