"""Many dimensions: tiles of a product, or of differences, in two kernels. The first turns a tile of pairs into its part
of the sum and, where gradients are wanted, into the weights w_ij of x_i - y_j. The second multiplies the weights of a
block of pairs with the points, for either side. Both compute a tile that holds a close pair from differences: the first
decides, and stores a mark for the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.energy_mmd.triton_values import Meeting, Values, share_of, value_and_slope
from lgd_kernels.runtime.triton_launch import cdiv, launch, power_of_2

TILE = 32  # points; with 64, a thread would hold more numbers than there are registers on sm_80 and sm_120
DEPTH = 32  # coordinates of a step of a product
WARPS, STAGES = 8, 2
BLOCK, VALUES_BLOCK = 4096, 32768  # points of a block of pairs with weights, 64 MiB, and without
CLOSEST = 1e-2  # of ||x||^2 + ||y||^2: as on the CPU


@triton.jit
def _differences(x, y, rows, columns, here, there, D, TILE: tl.constexpr):
    """Compute ||x_i - y_j||^2 of a tile."""
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
    outputs,
    x,
    y,
    norms,
    p,
    q,
    coefficient,
    n,
    k,
    first_row,
    first_column,
    rows_here,
    columns_here,
    D,
    closest,
    parameters,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    SAME: tl.constexpr,
    DIAGONAL: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    MOST: tl.constexpr,
):
    """Compute a tile of a block of pairs. `outputs` are parts [B, MOST] float64, which is added to, and, if gradients
    are wanted, weights [B, rows_here, columns_here] and marks of close pairs [B, tiles]. MODE: "direct", "product", or
    "auto", which depends on the tile."""
    parts, weights, close = outputs
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
    if SAME:  # tiles below the diagonal compute nothing
        counts = counts & (columns[None, :] >= rows[:, None])
        depth = tl.where(first_column + (tile % across + 1) * TILE <= first_row + tile // across * TILE, 0, D)
    mark = 0
    if MODE == "direct":
        s = _differences(x, y, rows, columns, here, there, depth, TILE)
    else:
        s = _products(x, y, rows, columns, here, there, depth, PRECISION, TILE, DEPTH)
        if KIND != "polynomial":
            squares = tl.load(norms[0] + item * n + rows, mask=here, other=0.0)[:, None]
            squares = squares + tl.load(norms[1] + item * k + columns, mask=there, other=0.0)[None, :]
            s = squares - 2 * s
            s = tl.where(s < 0, 0.0, s)
            if MODE == "auto":
                near = counts & (s < closest * squares)
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
    if weights is not None:
        turn = tl.where(counts, (weight if KIND == "polynomial" else 2 * weight) * slope, 0.0)
        offsets = in_row[:, None].to(tl.int64) * columns_here + in_column[None, :]
        tl.store(weights + item * rows_here * columns_here + offsets, turn, mask=here[:, None] & there[None, :])
        tl.store(close + item * tiles + tile, mark)


@triton.jit
def _turn(weights, y, at, sums, columns, c, here, there, inside, D, w_column, TILE: tl.constexpr):
    """Return sums_ic + sum_j w_ij (x_ic - y_jc), one j after another."""
    for j in range(0, there):
        w = tl.load(weights + j * w_column, mask=here, other=0.0)
        b = tl.load(y + (columns + j) * D + c, mask=inside, other=0.0).to(tl.float32)
        sums += w[:, None] * (at - b[None, :])
    return sums


@triton.jit(do_not_specialize=["first_row", "first_column", "rows_here", "columns_here"])
def energy_mmd_turn_kernel(
    gradient,
    weights,
    close,
    x,
    y,
    coefficient,
    n,
    k,
    first_row,
    first_column,
    rows_here,
    columns_here,
    D,
    w_row,
    w_column,
    close_row,
    close_column,
    PRODUCT: tl.constexpr,
    WITHIN: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add coefficient sum_j w_ij (x_i - y_j) (PRODUCT: w_ij y_j) to gradient_i, for WIDTH coordinates of a tile of
    points, over the columns of a block. WITHIN: weights are 0 left ("right") or right ("left") of the diagonal, or
    nowhere."""
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


class _Block(NamedTuple):
    """A block of pairs: the first row and column, their numbers, and the tiles down and across."""

    i: int
    j: int
    rows: int
    columns: int

    @property
    def down(self) -> int:
        return cdiv(self.rows, TILE)

    @property
    def across(self) -> int:
        return cdiv(self.columns, TILE)


def meet(of: Meeting, values: Values, mode: str) -> Tensor:
    """Return the sum of p_i q_j k(x_i, y_j), [B] float64, times the coefficient. Its gradients are added to those of
    the sets."""
    x, y = of.x, of.y
    (batch, n, _), k = x.points.shape, y.points.shape[1]
    wanted = x.gradient is not None or y.gradient is not None
    block = BLOCK if wanted else VALUES_BLOCK
    while wanted and block > TILE and batch * min(block, n) * min(block, k) > BLOCK * BLOCK:
        block //= 2
    block = min(block, cdiv(max(n, k), TILE) * TILE)
    most = cdiv(min(block, n), TILE) * cdiv(min(block, k), TILE)
    device = x.points.device
    parts, weights, close = torch.zeros((batch, most), dtype=torch.float64, device=device), None, None
    if wanted:
        weights = torch.empty(batch * min(block, n) * min(block, k), dtype=torch.float32, device=device)
        close = torch.empty(batch * most, dtype=torch.int32, device=device)
    for i in range(0, n, block):
        for j in range(i if of.same else 0, k, block):
            at = _Block(i, j, min(block, n - i), min(block, k - j))
            _launch_pairs((parts, weights, close), of, values, mode, at)
            for transposed in (False, True):
                if (y if transposed else x).gradient is not None:
                    _launch_turn((weights, close), of, values, mode, at, transposed)
    return parts.sum(1)


def _launch_pairs(outputs: tuple, of: Meeting, values: Values, mode: str, at: _Block) -> None:
    x, y = of.x, of.y
    batch, n, dimension = x.points.shape
    launch(
        energy_mmd_pairs_kernel,
        (batch * at.down * at.across,),
        outputs,
        x.points,
        y.points,
        (x.norms, y.norms),
        x.weights,
        y.weights,
        of.coefficient,
        n,
        y.points.shape[1],
        *at,
        dimension,
        CLOSEST,
        *values,
        of.same,
        of.diagonal,
        mode,
        _precision(),
        TILE,
        DEPTH,
        outputs[0].shape[1],
        like=x.points,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def _launch_turn(pairs: tuple, of: Meeting, values: Values, mode: str, at: _Block, transposed: bool) -> None:
    """Launch the second kernel for x, or, transposed, for y."""
    x, y, side = (of.y, of.x, "left") if transposed else (of.x, of.y, "right")
    strides = (1, at.columns, 1, at.across) if transposed else (at.columns, 1, at.across, 1)
    within = side if of.same and at.i == at.j else "no"
    if transposed:
        at = _Block(at.j, at.i, at.columns, at.rows)
    batch, n, dimension = x.points.shape
    width = min(32, max(16, power_of_2(dimension)))
    launch(
        energy_mmd_turn_kernel,
        (batch * at.down * cdiv(dimension, width),),
        x.gradient,
        *pairs,
        x.points,
        y.points,
        of.coefficient,
        n,
        y.points.shape[1],
        *at,
        dimension,
        *strides,
        values.KIND == "polynomial",
        within,
        mode,
        _precision(),
        TILE,
        width,
        like=x.points,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def _precision() -> str:
    return "ieee" if torch.version.hip else "tf32x3"
