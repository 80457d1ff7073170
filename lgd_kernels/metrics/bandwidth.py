"""Compute the median heuristic without storing the matrix of distances."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.runtime import blocks
from lgd_kernels.runtime import progress as reports
from lgd_kernels.runtime.levels import widest

LOW = 15  # low bits of a float32, counted in the second pass; the first pass counts the 16 above them


@torch.no_grad()
def median_bandwidth(x: Tensor, y: Tensor | None = None, *, progress: bool | reports.Report | None = None) -> float:
    """Return the median distance between two samples, a usual bandwidth: `Gaussian(median_bandwidth(x, y))`.

    The median is over the pairs i < j of x and y pooled (of x alone, if y is None). Of an even number of pairs it is
    the lower of the two in the middle, as in `torch.median`. Others define the square of the bandwidth as half the
    median of the squares: divide by sqrt(2).

    Args:
        x, y: `[n, ...]` and `[k, ...]`, float32, bfloat16, float16 or float64.
        progress: True for a bar, or a function of (done, total), numbers of pairs; each pair counts twice.

    Returns a float: what sorting all squared distances, rounded to float32, would give. Two passes compute the squares
    in blocks (runtime/blocks.py) and count them, by their upper bits and then by the lower bits of those that share the
    median's upper bits. Memory does not grow with the pairs. The result is 0, not a bandwidth, where half of the pairs
    coincide.

    Raises TypeError or ValueError for a wrong shape, dtype or device, fewer than two samples, NaN or infinity, and
    ValueError where the median of the squares overflows float32.

    Source: Gretton et al., JMLR 13 (2012).

    >>> import torch, lgd_kernels as lgd
    >>> lgd.median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]]))  # of 1, 2, 3
    2.0
    """
    with checks.said_by("median_bandwidth"):
        checks.samples(x, x if y is None else y, False)
    wide = widest(*(one.dtype for one in ((x,) if y is None else (x, y))))
    points = torch.cat([one.reshape(len(one), -1).to(wide) for one in ((x,) if y is None else (x, y))])
    count = len(points) * (len(points) - 1) // 2
    if not count:
        raise ValueError("median_bandwidth: `x` holds one sample, expected two or more in all")
    checks.finite("median_bandwidth", waits=True, x=x, y=y)
    rank = (count - 1) // 2
    report = reports.report("median_bandwidth", progress)
    first, second = (report and partial(_half, report, turn) for turn in (0, 1))
    upper, below = _at(rank, (keys >> LOW for keys in _keys(points, first)), 2 ** (31 - LOW), points.device)
    lows = (keys[keys >> LOW == upper] & (2**LOW - 1) for keys in _keys(points, second))
    lower, _ = _at(rank - below, lows, 2**LOW, points.device)
    square = torch.tensor((upper << LOW) + lower, dtype=torch.int32, device="cpu").view(torch.float32).item()
    if square == math.inf:
        raise ValueError("median_bandwidth: the median of the squares overflows float32; scale the samples down")
    return square**0.5


def _half(report: reports.Report, turn: int, done: int, total: int) -> None:
    """Report the progress of one of two passes."""
    report(done + turn * total, 2 * total)


def _keys(points: Tensor, report: reports.Report | None) -> Iterator[Tensor]:
    """Yield blocks of squares as integers of the same order: the bits of a float32 that is not negative."""
    for rows, columns, squares in blocks.upper_blocks(points, report=report):
        if rows == columns:
            i = torch.arange(len(squares), device=squares.device)
            squares = squares[i[:, None] < i]
        yield squares.float().flatten().view(torch.int32)


def _at(rank: int, parts: Iterable[Tensor], size: int, device: torch.device) -> tuple[int, int]:
    """Return (the number of that rank, how many are less) of integers in [0, size)."""
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    for part in parts:
        counts += torch.bincount(part, minlength=size)
    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, rank, right=True))
    return found, int(ends[found] - counts[found])
