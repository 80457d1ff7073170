"""The value and its gradient as a sum of pieces, each a call of the operator: for samples that lie in several processes
(sharded.py), and for calls that say how far they are.

A piece is a coefficient times a sum over pairs, without the means' divisors, which belong to the whole:

    S_xy = sum_ij p_i q_j k(x_i, y_j)        S_xx = sum_{i != j} p_i p_j k(x_i, x_j) (biased: of all i and j)
    L = S_xy / (P Q)  -  lam/2 (S_xx / pairs_x + S_yy / pairs_y)        P = sum p, pairs_x = P^2 - sum p^2 (biased: P^2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import op
from lgd_kernels.ops.energy_mmd.checks import LEAST_SHARE
from lgd_kernels.ops.energy_mmd.reference import scaled
from lgd_kernels.runtime.levels import widest
from lgd_kernels.runtime.progress import Report

ALONE = 2.0**60  # of lam: beside it the term between two sets is no longer seen
ROWS, WORK = 960, 2**31  # of a piece between two reports: rows, or a multiple, as far as pairs times D + 8 stay below


class Side(NamedTuple):
    """Samples of one set, and where their gradient is added up."""

    points: Tensor  # [B, n, D]
    weights: Tensor | None  # [B, n]
    gradient: Tensor | None = None  # [B, n, D] in the arithmetic dtype

    @property
    def count(self) -> int:
        return self.points.shape[1]

    def __getitem__(self, rows: slice) -> Side:
        return Side(*(one if one is None else one[:, rows] for one in (self.points, self.weights, self.gradient)))

    def total(self) -> Tensor:
        """P, `[B]`."""
        if self.weights is None:
            return self._full(self.count)
        return self.weights.sum(1, dtype=torch.float64)

    def squares(self) -> Tensor:
        """sum p^2, `[B]`."""
        return self._full(self.count) if self.weights is None else self.weights.double().square().sum(1)

    def pairs(self, unbiased: bool) -> Tensor:
        """P^2, unbiased without the pairs of a sample with itself, `[B]`."""
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
        """How many are looked at."""
        return pairs_within(self.rows.count) if self.columns is None else self.rows.count * self.columns.count


def pairs_within(count: int) -> int:
    """Of so many samples, each with itself too: they add up, however a set is cut."""
    return count * (count + 1) // 2


class Form(NamedTuple):
    """What all pieces of a call have in common."""

    kernel: str
    parameters: list[float]
    unbiased: bool
    precision: str | None
    impl: str | None


@torch.no_grad()
def run(pieces: Iterable[Piece], form: Form, report: Report | None, total: int, loss: Tensor) -> Tensor:
    """The sum of the pieces and of `loss`, `[B]` in float64; gradients are added where they belong. `report` hears of
    the total of pairs, and of those that are done."""
    done = 0
    if report is not None:
        report(0, total)
        pieces = _all_cut(pieces)
    for piece in pieces:
        loss = loss + _measured(piece, form)
        if report is not None and piece.pairs:
            done += piece.pairs
            report(done, total)
        del piece  # and with it samples of another process, before more of them come
    return loss


def energy_mmd(x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision, impl, report):
    """As `op.energy_mmd`, differentiable once, in pieces that `report` hears of."""
    form = Form(kernel, parameters, unbiased, precision, impl)
    x_weights, y_weights = scaled(x_weights), scaled(y_weights)
    sides = [Side(x, x_weights, room_for(x, y, wanted(x))), Side(y, y_weights, room_for(y, x, wanted(y)))]
    share = 1 / (sides[0].total() * sides[1].total())
    pieces = [Piece(*sides, share, share)]
    for side in sides if target_term else sides[:1]:
        if lam:
            share = -lam / 2 / side.pairs(unbiased)
            pieces.append(Piece(side, None, share, share))
    loss = run(pieces, form, report, sum(piece.pairs for piece in pieces), torch.zeros_like(share))
    return attached(x, y, loss, sides[0].gradient, sides[1].gradient)


def wanted(points: Tensor) -> bool:
    return torch.is_grad_enabled() and points.requires_grad


def room_for(points: Tensor, other: Tensor, want: bool) -> Tensor | None:
    return torch.zeros_like(points, dtype=widest(points.dtype, other.dtype)).contiguous() if want else None


def attached(x: Tensor, y: Tensor, loss: Tensor, d_x: Tensor | None, d_y: Tensor | None) -> Tensor:
    """The loss, rounded, with the gradients that are known."""
    loss = loss.to(widest(x.dtype, y.dtype))
    return loss if d_x is None and d_y is None else _Attached.apply(x, y, loss, d_x, d_y)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, loss, d_x, d_y):
        ctx.save_for_backward(d_x, d_y)
        ctx.dtypes = x.dtype, y.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
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
    """The same in fewer rows at a time. Pairs of a set come as those within some rows, and of these with the rest."""
    rows, columns, value, slope = piece
    across = (rows if columns is None else columns).count * len(value)
    length = ROWS * max(1, WORK // max(1, ROWS * across * (rows.points.shape[2] + 8)))
    for first in range(0, rows.count, length):
        some, rest = rows[first : first + length], rows[first + length :]
        yield Piece(some, columns, value, slope)
        if columns is None and rest.count:
            yield Piece(some, rest, 2 * value, 2 * slope)


def _measured(piece: Piece, form: Form) -> Tensor:
    rows, columns, value, slope = piece
    none = torch.zeros_like(value)
    if not rows.count or (columns is not None and not columns.count):
        return none
    if columns is None:
        return _within(piece, form) if rows.count > 1 or not form.unbiased else none
    scale = rows.total() * columns.total()
    found, *grads = op.unrounded(
        rows.points, columns.points, *(_positive(side.weights, scale) for side in (rows, columns)), form.kernel,
        form.parameters, 0.0, False, False, form.precision, [side.gradient is not None for side in (rows, columns)],
        form.impl,
    )  # fmt: skip
    for side, grad in zip((rows, columns), grads, strict=True):
        _add(side, grad, slope * scale)
    return torch.where(scale > 0, value * scale * found, none)


def _within(piece: Piece, form: Form) -> Tensor:
    """By the operator's own walk over half of the pairs, which leaves out a sample with itself: nothing is subtracted.
    It comes beside a term between two sets, which a large lam makes nothing of: that of the rows and their mean."""
    rows, _, value, slope = piece
    scale = rows.pairs(form.unbiased)
    # what is lost to rounding in P^2 - sum p^2 is not a pair
    scale = torch.where(scale > LEAST_SHARE * rows.total().square(), scale, 0.0)
    copies = 1 if rows.count <= 64 else 64 * 64 // rows.count + 1  # few pairs would be taken for a small problem
    mean = rows.points.mean(1, keepdim=True, dtype=widest(rows.points.dtype)).to(rows.points.dtype)
    found, grad, _ = op.unrounded(
        rows.points, mean.expand(-1, copies, -1), _positive(rows.weights, scale), None, form.kernel, form.parameters,
        ALONE, form.unbiased, False, form.precision, [rows.gradient is not None, False], form.impl,
    )  # fmt: skip
    scale = -2 / ALONE * scale
    _add(rows, grad, slope * scale)
    return torch.where(scale < 0, value * scale * found, 0.0)


def _positive(weights: Tensor | None, scale: Tensor) -> Tensor | None:
    """1 in problems that a piece has no weight in, whose means would be 0 / 0; what comes of them counts 0 times."""
    return weights if weights is None else torch.where(scale[:, None] > 0, weights, torch.ones_like(weights))


def _add(side: Side, grad: Tensor | None, coefficient: Tensor) -> None:
    if grad is not None:
        side.gradient.add_(grad.mul_(coefficient[:, None, None].to(grad.dtype)))
