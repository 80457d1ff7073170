"""The value and its gradient as a sum of pieces, each a call of the operator: for samples that lie in several processes
(sharded.py), and for calls that report their progress.

A piece is a coefficient times a sum over pairs, without the divisors of the means, which belong to the whole:

    S_xy = sum_ij p_i q_j k(x_i, y_j)        S_xx = sum_{i != j} p_i p_j k(x_i, x_j) (biased: of all i and j)
    L = S_xy / (P Q)  -  lam/2 (S_xx / pairs_x + S_yy / pairs_y)        P = sum p, pairs_x = P^2 - sum p^2 (biased: P^2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import op
from lgd_kernels.ops.energy_mmd.checks import LEAST_SHARE
from lgd_kernels.ops.energy_mmd.reference import scaled
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd
from lgd_kernels.runtime.levels import widest
from lgd_kernels.runtime.progress import Report

ROWS, WORK = 960, 2**31  # of a piece between two reports: rows, or a multiple while pairs times D + 8 stay below WORK


class Side(NamedTuple):
    """Samples of one set, and where their gradient is added up."""

    points: Tensor  # [B, n, D]
    weights: Tensor | None  # [B, n]
    gradient: Tensor | None = None  # [B, n, D] in the arithmetic dtype

    @property
    def samples(self) -> int:
        return self.points.shape[1]

    def rows(self, first: int, last: int | None = None) -> Side:
        """Return the samples from `first` to `last`."""
        weights, gradient = (None if one is None else one[:, first:last] for one in self[1:])
        return Side(self.points[:, first:last], weights, gradient)

    def total(self) -> Tensor:
        """Compute P, `[B]`."""
        if self.weights is None:
            return self._full(self.samples)
        return self.weights.sum(1, dtype=torch.float64)

    def squares(self) -> Tensor:
        """Compute sum p^2, `[B]`."""
        return self._full(self.samples) if self.weights is None else self.weights.double().square().sum(1)

    def pairs(self, unbiased: bool) -> Tensor:
        """Compute P^2, unbiased without the pairs of a sample with itself, `[B]`."""
        return self.total().square() - (self.squares() if unbiased else 0)

    def _full(self, value: float) -> Tensor:
        return torch.full(self.points.shape[:1], value, dtype=torch.float64, device=self.points.device)


class Piece(NamedTuple):
    """`value` times the sum over the pairs of rows and columns, or, without columns, of rows with one another; and
    `slope` times its gradient."""

    rows: Side
    columns: Side | None
    value: Tensor  # [B] float64
    slope: Tensor

    @property
    def pairs(self) -> int:
        """Return the number of pairs that are computed."""
        return pairs_within(self.rows.samples) if self.columns is None else self.rows.samples * self.columns.samples


def pairs_within(count: int) -> int:
    """Return the number of pairs of `count` samples, each with itself too: they add up, however a set is cut."""
    return count * (count + 1) // 2


@torch.no_grad()
def run(
    pieces: Iterable[Piece], whole: EnergyMmd, impl: str | None, report: Report | None, total: int, loss: Tensor
) -> Tensor:
    """Add the pieces to `loss`, `[B]` in float64, and their gradients to those of their sides. Options are those of the
    `whole`. `report` gets the number of pairs that are done, and the total."""
    done = 0
    if report is not None:
        report(0, total)
        pieces = _all_cut(pieces)
    for piece in pieces:
        loss = loss + _measured(piece, whole, impl)
        if report is not None and piece.pairs:
            done += piece.pairs
            report(done, total)
        del piece  # and with it samples of another process, before more of them come
    return loss


def energy_mmd(a: EnergyMmd, impl: str | None, report: Report | None) -> Tensor:
    """Compute `op.energy_mmd`, differentiable once, in pieces whose progress is reported."""
    a = a.weighted(scaled(a.x_weights), scaled(a.y_weights))
    x = Side(a.x, a.x_weights, zeros_for(a.x, a.dtype))
    y = Side(a.y, a.y_weights, zeros_for(a.y, a.dtype))
    share = 1 / (x.total() * y.total())
    pieces = [Piece(x, y, share, share)]
    for side in (x, y) if a.target_term else (x,):
        if a.lam:
            share = -a.lam / 2 / side.pairs(a.unbiased)
            pieces.append(Piece(side, None, share, share))
    loss = run(pieces, a, impl, report, sum(piece.pairs for piece in pieces), torch.zeros_like(share))
    return attached(a, loss, x.gradient, y.gradient)


def wanted(points: Tensor) -> bool:
    """Return whether this call records a gradient to the points."""
    return torch.is_grad_enabled() and points.requires_grad


def zeros_for(points: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Allocate the gradient to the points, if one is wanted."""
    return torch.zeros_like(points, dtype=dtype).contiguous() if wanted(points) else None


def attached(a: EnergyMmd, loss: Tensor, d_x: Tensor | None, d_y: Tensor | None) -> Tensor:
    """Return the loss, rounded, with the gradients that are known."""
    loss = loss.to(a.dtype)
    return loss if d_x is None and d_y is None else _Attached.apply(a.x, a.y, loss, d_x, d_y)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, loss, d_x, d_y):
        ctx.save_for_backward(d_x, d_y)
        ctx.dtypes = x.dtype, y.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("energy_mmd: with `group` or `progress` a gradient has no gradient; create_graph=False")
        slopes = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = (one if one is None else (upstream[:, None, None] * one).to(dtype) for one, dtype in slopes)
        return *grads, None, None, None


def _all_cut(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        yield from _cut(piece)
        del piece


def _cut(piece: Piece) -> Iterator[Piece]:
    """Cut a piece into fewer rows at a time. Pairs of a set come as pairs within some rows, and of these with the
    rest."""
    rows, columns, value, slope = piece
    across = (rows if columns is None else columns).samples * len(value)
    length = ROWS * max(1, WORK // max(1, ROWS * across * (rows.points.shape[2] + 8)))
    for first in range(0, rows.samples, length):
        some, rest = rows.rows(first, first + length), rows.rows(first + length)
        yield Piece(some, columns, value, slope)
        if columns is None and rest.samples:
            yield Piece(some, rest, 2 * value, 2 * slope)


def _measured(piece: Piece, whole: EnergyMmd, impl: str | None) -> Tensor:
    rows, columns, value, slope = piece
    none = torch.zeros_like(value)
    if columns is None:
        return _within(piece, whole, impl) if rows.samples > int(whole.unbiased) else none
    if not rows.samples or not columns.samples:
        return none
    scale = rows.total() * columns.total()
    call = whole._replace(
        x=rows.points,
        y=columns.points,
        x_weights=_positive(rows.weights, scale),
        y_weights=_positive(columns.weights, scale),
        lam=0.0,
        between=True,
        wanted=[side.gradient is not None for side in (rows, columns)],
    )
    found, *grads = op.unrounded(call, impl)
    for side, grad in zip((rows, columns), grads, strict=True):
        _add(side, grad, slope * scale)
    return torch.where(scale > 0, value * scale * found, none)


def _within(piece: Piece, whole: EnergyMmd, impl: str | None) -> Tensor:
    """Compute a piece without columns by the operator's term within x, which visits half of the pairs and leaves out a
    sample with itself: nothing is subtracted."""
    rows, _, value, slope = piece
    scale = rows.pairs(whole.unbiased)
    # what is lost to rounding in P^2 - sum p^2 is not a pair
    scale = torch.where(scale > LEAST_SHARE * rows.total().square(), scale, 0.0)
    call = whole._replace(
        x=rows.points,
        y=rows.points.mean(1, keepdim=True, dtype=widest(rows.points.dtype)).to(rows.points.dtype),
        x_weights=_positive(rows.weights, scale),
        y_weights=None,
        lam=1.0,
        between=False,
        target_term=False,
        wanted=[rows.gradient is not None, False],
    )
    found, grad, _ = op.unrounded(call, impl)
    scale = -2 * scale
    _add(rows, grad, slope * scale)
    return torch.where(scale < 0, value * scale * found, 0.0)


def _positive(weights: Tensor | None, scale: Tensor) -> Tensor | None:
    """Replace weights by 1 in problems that a piece has no weight in, whose means would be 0 / 0 and count 0 times."""
    return weights if weights is None else torch.where(scale[:, None] > 0, weights, torch.ones_like(weights))


def _add(side: Side, grad: Tensor | None, coefficient: Tensor) -> None:
    if side.gradient is not None and grad is not None:
        side.gradient.add_(grad.mul_(coefficient[:, None, None].to(grad.dtype)))
