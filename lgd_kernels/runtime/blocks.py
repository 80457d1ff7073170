"""Form the matrix of all pairs of points block by block, so that it is never stored as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lgd_kernels.runtime.precision import full_precision
from lgd_kernels.runtime.progress import Report

BLOCK = 1024  # rows and columns: 4 MiB of float32
SMALL = 16  # dimensions up to which differences are formed at once
CLOSEST = 1e-2  # of ||x||^2 + ||y||^2: squares below it are computed from differences
GATHERED = 2**24  # elements of differences of close pairs at a time


def upper_blocks(
    points: Tensor, of_product: bool = False, report: Report | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, block) of the matrix of ||x_i - x_j||^2 (`of_product`: <x_i, x_j>) for points [N, D].

    Blocks lie on and above the diagonal and come row after row. Those on the diagonal are whole; their own diagonal is
    0 where they hold distances. The caller may overwrite a block. The dtype is that of `points`, float32 or float64.
    `report(done, total)` is called before the first block and after each block, with numbers of pairs.

    Up to D = 16 squares are taken of differences. Beyond, they are ||x||^2 + ||y||^2 - 2 <x, y> of centred points, and
    squares of close pairs are computed again from differences (docs/numerics.md: the product form is off by 3e-7 of the
    norms).

    >>> import torch
    >>> [(rows, columns, block)] = upper_blocks(torch.tensor([[0.0], [3.0]]))
    >>> block
    tensor([[0., 9.],
            [9., 0.]])
    """
    products = of_product or points.shape[1] > SMALL
    if products and not of_product:
        centred = points - points.mean(0, dtype=torch.float64).to(points.dtype)
        norms = centred.square().sum(1)
    starts = range(0, len(points), BLOCK)
    done, total = 0, (len(points) ** 2 + sum(len(points[first : first + BLOCK]) ** 2 for first in starts)) // 2
    if report is not None:
        report(0, total)
    for rows in (slice(first, first + BLOCK) for first in starts):
        for columns in (slice(first, first + BLOCK) for first in starts if first >= rows.start):
            a, b = points[rows], points[columns]
            with full_precision(points.device):
                if of_product:
                    block = a @ b.t()
                elif products:
                    sums = norms[rows, None] + norms[columns]
                    squares = torch.addmm(sums, centred[rows], centred[columns].t(), alpha=-2)
                    block = _mended(squares, sums, a, b, rows == columns)
                else:
                    block = _differences(a, b)
            yield rows, columns, block
            done += len(a) * len(b)
            if report is not None:
                report(done, total)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _mended(squares: Tensor, sums: Tensor, a: Tensor, b: Tensor, same: bool) -> Tensor:
    """Replace the squares of close pairs by those of differences of the points before centring, which rounds."""
    close = squares < sums.mul_(CLOSEST)
    if same:
        close.fill_diagonal_(False)
        squares.fill_diagonal_(0)
    i, j = close.nonzero(as_tuple=True)
    if 4 * len(i) > close.numel():
        return _differences(a, b)
    length = max(1, GATHERED // a.shape[1])
    for some_i, some_j in zip(i.split(length), j.split(length), strict=True):
        squares[some_i, some_j] = (a[some_i] - b[some_j]).square_().sum(1)
    return squares
