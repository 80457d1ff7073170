"""The specification: plain PyTorch, differentiable any number of times; rows in blocks, all sums in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.kernels import Kernel, factor, join_kernel
from lgd_kernels.runtime.levels import arithmetic_dtype

LARGEST = 2**24  # elements of a block of differences


def energy_mmd(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    kernel: str,
    parameters: list[float],
    lam: float,
    unbiased: bool,
    target_term: bool,
) -> Tensor:
    """x [B, n, D], y [B, k, D], weights [B, n] and [B, k] -> [B]."""
    dtype = arithmetic_dtype(x, y)
    x, y, p, q = x.to(dtype), y.to(dtype), _shares(x, x_weights), _shares(y, y_weights)
    function = join_kernel(kernel, parameters)
    total = _mean(function, x, y, p, q, 1.0)
    if lam:
        total = total - lam / 2 * _within(function, x, p, unbiased)
        if target_term:
            total = total - lam / 2 * _within(function, y, q, unbiased)
    return (factor(kernel) * total).to(dtype)


def energy_mmd_gradients(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    kernel: str,
    parameters: list[float],
    lam: float,
    unbiased: bool,
    target_term: bool,
) -> tuple[Tensor, Tensor]:
    """d loss / d x and d loss / d y, in the arithmetic dtype."""
    dtype = arithmetic_dtype(x, y)
    x, y, p, q = x.to(dtype), y.to(dtype), _shares(x, x_weights), _shares(y, y_weights)
    function = join_kernel(kernel, parameters)
    d_x, d_y = _pull(function, x, y, p, q), _pull(function, y, x, q, p)
    if lam:  # a pair of one set counts once at either end
        d_x = d_x - lam / _pairs(p, unbiased)[:, None, None] * _pull(function, x, x, p, p, not unbiased)
        if target_term:
            d_y = d_y - lam / _pairs(q, unbiased)[:, None, None] * _pull(function, y, y, q, q, not unbiased)
    return (factor(kernel) * d_x).to(dtype), (factor(kernel) * d_y).to(dtype)


def scaled(weights: Tensor | None, largest: Tensor | None = None) -> Tensor | None:
    """Weights [B, n] in float64, divided by a power of two, so that the largest ([B], of this part or of all) lies in
    [1, 2): no sum, square or product of two overflows, and ordinary weights give the same bits as before. NaN where a
    weight is negative or NaN, and for a set whose largest weight is 0 or infinite."""
    if weights is None:
        return None
    weights = weights.double()
    largest = (weights.amax(1) if largest is None else largest)[:, None]
    return torch.where(weights >= 0, weights, math.nan) / (largest / (2 * torch.frexp(largest).mantissa))


def _shares(points: Tensor, weights: Tensor | None) -> Tensor:
    """[B, n] in float64, with sum 1."""
    if weights is None:
        return torch.full(points.shape[:2], 1 / points.shape[1], dtype=torch.float64, device=points.device)
    weights = scaled(weights)
    return weights / weights.sum(1, keepdim=True)


def _pairs(p: Tensor, unbiased: bool) -> Tensor:
    """The share of the pairs that count: those of different points, or all."""
    return 1 - p.square().sum(1) if unbiased else torch.ones_like(p[:, 0])


def _arguments(function: Kernel, rows: Tensor, y: Tensor) -> Tensor:
    """What a kernel is a function of, for all pairs: [B, rows, k]."""
    if function.of_product:
        return (rows[:, :, None] * y[:, None]).sum(-1)
    return (rows[:, :, None] - y[:, None]).square().sum(-1)


def _blocks(x: Tensor, y: Tensor):
    """(first row, rows) of x, few enough for a block of differences."""
    length = max(1, LARGEST // max(1, x.shape[0] * y.shape[1] * y.shape[2]))
    for first in range(0, x.shape[1], length):
        yield first, x[:, first : first + length]


def _mean(function: Kernel, x: Tensor, y: Tensor, p: Tensor, q: Tensor, without: float) -> Tensor:
    """sum_ij p_i q_j k(x_i, y_j); `without` 0 leaves out i = j."""
    total = torch.zeros_like(p[:, 0])
    for first, rows in _blocks(x, y):
        values = function.value(_arguments(function, rows, y)).double()
        pairs = p[:, first : first + rows.shape[1], None] * q[:, None]
        if not without:
            pairs = pairs.masked_fill(_same(first, rows, y), 0.0)
        total = total + (pairs * values).sum((1, 2))
    return total


def _within(function: Kernel, x: Tensor, p: Tensor, unbiased: bool) -> Tensor:
    return _mean(function, x, x, p, p, 0.0 if unbiased else 1.0) / _pairs(p, unbiased)


def _pull(function: Kernel, x: Tensor, y: Tensor, p: Tensor, q: Tensor, itself: bool = True) -> Tensor:
    """d/dx_i of sum_j p_i q_j k(x_i, y_j), y held; `itself` False leaves out i = j."""
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
    """i = j, [rows, k]"""
    i = torch.arange(first, first + rows.shape[1], device=y.device)
    return i[:, None] == torch.arange(y.shape[1], device=y.device)
