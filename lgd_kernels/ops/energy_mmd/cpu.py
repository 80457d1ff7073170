"""Launch csrc/energy_mmd/energy_mmd_cpu.cpp: tile by tile from differences, or on blocks of matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.kernels import KINDS
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd, MmdKernel, ProductBlock
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.precision import full_precision

SMALL = 64  # dimensions up to which differences are faster than products
# Rows and columns of a block of products, 3.5 MiB. With 1024 and D = 2048, rows lie 4 and 8 KiB apart, and torch's
# product takes a tenth longer.
BLOCK = 960
PART = 2**18  # elements of samples at a time whose squares are added up: 1 MiB
# Pairs closer than that share of ||x||^2 + ||y||^2 are taken from differences if precision is None. The error of a
# float32 product is about 3e-7 of the norms, so a distance from a product has an error of at most 2e-5 of itself.
CLOSEST = 1e-2


def forward(outputs: tuple[Tensor, Tensor | None, Tensor | None], a: EnergyMmd) -> None:
    a, precision = a.converted(), a.precision
    if precision is None:
        pairs = a.x.shape[1] * (a.y if a.between else a.x).shape[1]
        precision = "direct" if a.x.shape[2] <= SMALL or pairs <= 64 * 64 else "auto"
    if precision == "direct":
        impls.extension().energy_mmd(outputs, a, torch.get_num_threads())
        return
    closest = CLOSEST if precision == "auto" else 0.0
    x, y, p, q = a[:4]
    for item, loss in enumerate(outputs[0]):
        problem = a._replace(
            x=x[item].contiguous(),
            y=y[item].contiguous(),
            x_weights=None if p is None else p[item].contiguous(),
            y_weights=None if q is None else q[item].contiguous(),
        )
        gradients = [None if one is None else one[item] for one in outputs[1:]]
        with full_precision(x.device):
            loss.fill_(_products(problem, gradients, closest))


class _Side(NamedTuple):
    """A set of samples, and the origin of its products."""

    points: Tensor  # [n, D]
    weights: Tensor  # [n]
    gradient: Tensor | None
    centre: Tensor | None  # the origin of distances; None: 0
    norms: Tensor | None  # squared, about the centre; None: not needed

    def block(self, first: int, kept: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return points, norms and weights of the samples from `first` on. Centred points are stored in `kept`."""
        end = first + BLOCK
        points, norms = self.points[first:end], None if self.norms is None else self.norms[first:end]
        if self.centre is not None:
            points = torch.sub(points, self.centre, out=kept[: points.numel()].view(points.shape))
        return points, norms, self.weights[first:end]


class _Kept(NamedTuple):
    """Memory for a block."""

    products: Tensor
    centred: list[Tensor]  # points of both sides about the centre
    turns: list[Tensor]  # what the block adds to the gradients of both sides

    @staticmethod
    def of(sides: list[_Side]) -> _Kept:
        like, largest = sides[0].points, max(min(BLOCK, len(side.points)) for side in sides)
        wide = largest * like.shape[1]
        wanted = any(side.gradient is not None for side in sides)
        return _Kept(
            like.new_empty(largest * largest if len(like) else 0),
            [like.new_empty(wide if sides[0].centre is not None else 0) for _ in sides],
            [like.new_empty(wide if wanted else 0) for _ in sides],
        )


def _products(a: EnergyMmd, gradients: list[Tensor | None], closest: float) -> float:
    """Compute one problem, x [n, D], in blocks of products; gradients are added to `gradients`, from 0 on."""
    kernel = a.kernel
    centre = None if kernel.of_product else _centre(a.y)
    sides = []
    for points, weights, gradient in zip((a.x, a.y), (a.x_weights, a.y_weights), gradients, strict=True):
        weights = points.new_ones(len(points)) if weights is None else weights
        norms = None if kernel.of_product else _norms(points, centre)
        sides.append(_Side(points, weights, gradient, centre, norms))
        if gradient is not None:
            gradient.zero_()
    kept, loss = _Kept.of(sides), 0.0
    x, y = sides
    if a.between:
        share = kernel.factor / (_total(x.weights) * _total(y.weights))
        loss += share * _pairs(x, y, kept, share, kernel, closest)
    for side, counts in zip(sides, (True, a.target_term), strict=True):
        if not counts or a.lam == 0:
            continue
        squares = _total(side.weights.double().square()) if a.unbiased else 0
        share = -kernel.factor * a.lam / (_total(side.weights) ** 2 - squares)
        loss += share * _pairs(side, side, kept, share, kernel, closest)
        if not a.unbiased:
            loss += share / 2 * _itself(side, share / 2, kernel)
    return loss


def _centre(points: Tensor) -> Tensor | None:
    """Return the mean where norms about it are smaller by a quarter or more, and None elsewhere, which saves taking it
    from every block. Distances do not depend on the origin, and the error of a product is a share of the norms."""
    total = points.new_zeros(points.shape[1], dtype=torch.float64)
    for part in _parts(points):
        total += part.sum(0, dtype=torch.float64)
    centre = (total / len(points)).to(points.dtype)
    mean_square = sum(_total(part * part) for part in _parts(points)) / len(points)
    return centre if 4 * _total(centre * centre) > mean_square else None


def _norms(points: Tensor, centre: Tensor | None) -> Tensor:
    parts = (part if centre is None else part - centre for part in _parts(points))
    return torch.cat([(part * part).sum(1) for part in parts])


def _parts(points: Tensor) -> tuple[Tensor, ...]:
    """Return so few rows at a time that what is computed from them stays in the cache."""
    return points.split(max(1, PART // points.shape[1]))


def _pairs(x: _Side, y: _Side, kept: _Kept, coefficient: float, kernel: MmdKernel, closest: float) -> float:
    """Compute sum_ij p_i q_j k(x_i, y_j) (within a set: of i < j), and add coefficient times its gradients."""
    total, wanted, same = 0.0, x.gradient is not None or y.gradient is not None, x is y
    for i in range(0, len(x.points), BLOCK):
        a, a_norms, p = x.block(i, kept.centred[0])
        for j in range(i if same else 0, len(y.points), BLOCK):
            b, b_norms, q = y.block(j, kept.centred[1])
            products = torch.mm(a, b.t(), out=kept.products[: len(a) * len(b)].view(len(a), len(b)))
            turns = [
                memory[: one.numel()].view(one.shape).zero_() if wanted else None
                for one, memory in zip((a, b), kept.turns, strict=True)
            ]
            block = ProductBlock(products, a, b, a_norms, b_norms, p, q, kernel, closest, same and i == j)
            total += impls.extension().energy_mmd_block(turns, block, torch.get_num_threads())
            ends = (x, turns[0], products, a, b, i), (y, turns[1], products.t(), b, a, j)
            for side, turn, weights, points, others, first in ends:
                if side.gradient is not None and turn is not None:
                    _turn(turn, weights, points, others, kernel)
                    side.gradient[first : first + BLOCK].add_(turn, alpha=coefficient)
    return total


def _turn(turn: Tensor, weights: Tensor, points: Tensor, others: Tensor, kernel: MmdKernel) -> None:
    """Add sum_j w_ij (x_i - y_j), or sum_j w_ij y_j for kernels of products."""
    if kernel.of_product:
        turn.addmm_(weights, others)
    else:
        turn.addcmul_(points, weights.sum(1, keepdim=True)).addmm_(weights, others, alpha=-1)


def _itself(side: _Side, coefficient: float, kernel: MmdKernel) -> float:
    """Compute sum_i p_i^2 k(x_i, x_i), and add coefficient times its gradient."""
    squares = side.weights.double().square()
    if not kernel.of_product:
        return 0.0 if kernel.name == "energy" else _total(squares)
    degree, *rest = kernel.parameters
    function, argument = KINDS[kernel.name](int(degree), *rest), side.points.double().square().sum(1)
    if side.gradient is not None:
        slopes = (2 * coefficient * squares * function.slope(argument))[:, None]
        side.gradient.add_((slopes * side.points).to(side.gradient.dtype))
    return _total(squares * function.value(argument))


def _total(weights: Tensor) -> float:
    return weights.sum(dtype=torch.float64).item()
