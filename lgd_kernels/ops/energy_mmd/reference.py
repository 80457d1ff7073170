"""The specification: plain PyTorch, differentiable any number of times; rows in blocks, all sums in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.kernels import Kernel, join_kernel
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd
from lgd_kernels.runtime.levels import arithmetic_dtype

LARGEST = 2**24  # elements of a block of differences


def energy_mmd(a: EnergyMmd) -> Tensor:
    """Compute the loss `[B]`."""
    dtype = arithmetic_dtype(a.x, a.y)
    x, y, p, q = a.x.to(dtype), a.y.to(dtype), _shares(a.x, a.x_weights), _shares(a.y, a.y_weights)
    function = join_kernel(*a.kernel)
    total = _mean(function, x, y, p, q) if a.between else torch.zeros_like(p[:, 0])
    if a.lam:
        total = total - a.lam / 2 * _within(function, x, p, a.unbiased)
        if a.target_term:
            total = total - a.lam / 2 * _within(function, y, q, a.unbiased)
    return (a.kernel.factor * total).to(dtype)


def energy_mmd_gradients(a: EnergyMmd) -> tuple[Tensor | None, Tensor | None]:
    """Compute d loss / d x and d loss / d y, in the arithmetic dtype; None for one that is not wanted."""
    dtype = arithmetic_dtype(a.x, a.y)
    x, y, p, q = a.x.to(dtype), a.y.to(dtype), _shares(a.x, a.x_weights), _shares(a.y, a.y_weights)
    function = join_kernel(*a.kernel)

    def gradient(points: Tensor, others: Tensor, own: Tensor, their: Tensor, counts: bool) -> Tensor:
        total = _pull(function, points, others, own, their) if a.between else torch.zeros_like(points, dtype=own.dtype)
        if a.lam and counts:  # a pair of one set counts once at either end
            pull = _pull(function, points, points, own, own, not a.unbiased)
            total = total - a.lam / _pairs(own, a.unbiased)[:, None, None] * pull
        return (a.kernel.factor * total).to(dtype)

    return (
        gradient(x, y, p, q, True) if a.wanted[0] else None,
        gradient(y, x, q, p, a.target_term) if a.wanted[1] else None,
    )


def scaled(weights: Tensor | None, largest: Tensor | None = None) -> Tensor | None:
    """Divide weights [B, n] by a power of two, in float64, so that the largest ([B], of this part or of all) lies in
    [1, 2). Then no sum, square or product of two overflows, and ordinary weights give the same bits. NaN where a weight
    is negative or NaN, and for a set whose largest weight is 0 or infinite."""
    if weights is None:
        return None
    weights = weights.double()
    largest = (weights.amax(1) if largest is None else largest)[:, None]
    return torch.where(weights >= 0, weights, math.nan) / (largest / (2 * torch.frexp(largest).mantissa))


def _shares(points: Tensor, weights: Tensor | None) -> Tensor:
    """Return weights [B, n] in float64, with sum 1."""
    own = scaled(weights)
    if own is None:
        return torch.full(points.shape[:2], 1 / points.shape[1], dtype=torch.float64, device=points.device)
    return own / own.sum(1, keepdim=True)


def _pairs(p: Tensor, unbiased: bool) -> Tensor:
    """Return the share, in weight, of the pairs that count: those of different points, or all."""
    return 1 - p.square().sum(1) if unbiased else torch.ones_like(p[:, 0])


def _arguments(function: Kernel, rows: Tensor, y: Tensor) -> Tensor:
    """Compute the argument of the MMD kernel for all pairs, [B, rows, k]."""
    if function.of_product:
        return (rows[:, :, None] * y[:, None]).sum(-1)
    return (rows[:, :, None] - y[:, None]).square().sum(-1)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows) of x, few enough for a block of differences."""
    length = max(1, LARGEST // max(1, x.shape[0] * y.shape[1] * y.shape[2]))
    for first in range(0, x.shape[1], length):
        yield first, x[:, first : first + length]


def _mean(function: Kernel, x: Tensor, y: Tensor, p: Tensor, q: Tensor, itself: bool = True) -> Tensor:
    """Compute sum_ij p_i q_j k(x_i, y_j); `itself` False leaves out i = j."""
    total = torch.zeros_like(p[:, 0])
    for first, rows in _blocks(x, y):
        values = function.value(_arguments(function, rows, y)).double()
        pairs = p[:, first : first + rows.shape[1], None] * q[:, None]
        if not itself:
            pairs = pairs.masked_fill(_same(first, rows, y), 0.0)
        total = total + (pairs * values).sum((1, 2))
    return total


def _within(function: Kernel, x: Tensor, p: Tensor, unbiased: bool) -> Tensor:
    return _mean(function, x, x, p, p, not unbiased) / _pairs(p, unbiased)


def _pull(function: Kernel, x: Tensor, y: Tensor, p: Tensor, q: Tensor, itself: bool = True) -> Tensor:
    """Compute d/dx_i of sum_j p_i q_j k(x_i, y_j) with y constant; `itself` False leaves out i = j."""
    found = []
    for first, rows in _blocks(x, y):
        weights = function.slope(_arguments(function, rows, y)).double()
        weights = weights * p[:, first : first + rows.shape[1], None] * q[:, None]
        if not itself:
            weights = weights.masked_fill(_same(first, rows, y), 0.0)
        if function.of_product:
            found.append(weights @ y.double())
        else:
            found.append((2 * weights[..., None] * (rows[:, :, None] - y[:, None])).sum(2))
    return torch.cat(found, 1)


def _same(first: int, rows: Tensor, y: Tensor) -> Tensor:
    """Return where i = j, [rows, k]."""
    i = torch.arange(first, first + rows.shape[1], device=y.device)
    return i[:, None] == torch.arange(y.shape[1], device=y.device)
