"""Launches csrc/energy_mmd/energy_mmd_cpu.cpp: tile by tile from differences, or on blocks of matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.kernels import CODES, KINDS, factor
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import widest
from lgd_kernels.runtime.precision import full_precision

SMALL = 64  # dimensions up to which differences are quicker than products
# Rows and columns of a block of products, 3.5 MiB: of 1024 and D = 2048, whose rows lie 4 and 8 KiB apart, torch's
# product takes a tenth longer.
BLOCK = 960
PART = 2**18  # elements of samples at a time whose squares are added up: 1 MiB
# Pairs closer than that share of ||x||^2 + ||y||^2 get differences where precision is None. A product of float32 is
# about 3e-7 of the norms off, so that a distance it leaves to the product is 2e-5 of itself off at most.
CLOSEST = 1e-2


def forward(loss, d_x, d_y, x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision):
    dtype = widest(x.dtype, y.dtype)
    x, y = (one.to(dtype).contiguous() for one in (x, y))
    x_weights, y_weights = (one if one is None else one.to(dtype).contiguous() for one in (x_weights, y_weights))
    if precision is None:
        precision = "direct" if x.shape[2] <= SMALL or x.shape[1] * y.shape[1] <= 64 * 64 else "auto"
    if precision == "direct":
        impls.extension().energy_mmd(
            loss, d_x, d_y, x, y, x_weights, y_weights, CODES[kernel], parameters, lam, factor(kernel), unbiased,
            target_term, torch.get_num_threads(),
        )  # fmt: skip
        return
    closest = CLOSEST if precision == "auto" else 0.0
    for item in range(x.shape[0]):
        rows = [one if one is None else one[item] for one in (x, y, x_weights, y_weights, d_x, d_y)]
        with full_precision(x.device):
            loss[item] = _products(*rows, kernel, parameters, lam, unbiased, target_term, closest)


class _Side(NamedTuple):
    """A set of samples, and what blocks of it are made of."""

    points: Tensor
    weights: Tensor
    gradient: Tensor | None
    centre: Tensor | None  # what distances are seen from; None: the origin
    norms: Tensor | None  # squared, from there; None: not needed

    def block(self, first: int, kept: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Points, norms and weights of the samples from `first` on; `kept` is where points may be put."""
        points, norms, weights = (
            one if one is None else one[first : first + BLOCK] for one in (self.points, self.norms, self.weights)
        )
        if self.centre is not None:
            points = torch.sub(points, self.centre, out=kept[: points.numel()].view(points.shape))
        return points, norms, weights


def _products(x, y, p, q, d_x, d_y, kernel, parameters, lam, unbiased, target_term, closest):
    """One problem, in blocks of products; gradients are added to d_x and d_y, which begin at 0."""
    of_product = KINDS[kernel].of_product
    centre = None if of_product else _centre(y)
    sides = []
    for points, weights, gradient in ((x, p, d_x), (y, q, d_y)):
        weights = points.new_ones(len(points)) if weights is None else weights
        sides.append(_Side(points, weights, gradient, centre, None if of_product else _norms(points, centre)))
        if gradient is not None:
            gradient.zero_()
    kept, options = _kept(*sides), (kernel, parameters, closest)
    meets = factor(kernel) / (_total(sides[0].weights) * _total(sides[1].weights))
    loss = meets * _pairs(*sides, kept, meets, False, *options)
    for side, counts in zip(sides, (True, target_term), strict=True):
        if not counts or lam == 0:
            continue
        weights = side.weights
        share = -factor(kernel) * lam / (_total(weights) ** 2 - (_total(weights.double().square()) if unbiased else 0))
        loss += share * _pairs(side, side, kept, share, True, *options)
        if not unbiased:
            loss += share / 2 * _itself(side.points, weights, side.gradient, kernel, parameters, share / 2)
    return loss


def _centre(points):
    """The mean, where norms about it are smaller by a quarter or more: distances do not know where the origin is, and
    a product's error is a share of the norms. Otherwise None, which saves taking it from every block."""
    total = sum(part.sum(0, dtype=torch.float64) for part in _parts(points))
    centre = (total / len(points)).to(points.dtype)
    mean_square = sum(_total(part * part) for part in _parts(points)) / len(points)
    return centre if 4 * _total(centre * centre) > mean_square else None


def _norms(points, centre):
    parts = (part if centre is None else part - centre for part in _parts(points))
    return torch.cat([(part * part).sum(1) for part in parts])


def _parts(points):
    """So few rows at a time that what is made of them stays in the cache."""
    return points.split(max(1, PART // points.shape[1]))


def _kept(*sides):
    """Memory for a block: products; points about the centre, of both sides; what close pairs add to their gradients."""
    sizes = [min(BLOCK, len(side.points)) for side in sides]
    like, largest = sides[0].points, max(sizes)
    wide = largest * like.shape[1]
    wanted = any(side.gradient is not None for side in sides)
    return (
        like.new_empty(largest * largest if len(sides[0].points) else 0),
        [like.new_empty(wide if sides[0].centre is not None else 0) for _ in sides],
        [like.new_empty(wide if wanted else 0) for _ in sides],
    )


def _pairs(x, y, kept, coefficient, same, kernel, parameters, closest):
    """sum_ij p_i q_j k(x_i, y_j) (`same`: of i < j), and coefficient times its gradients."""
    total, wanted = 0.0, x.gradient is not None or y.gradient is not None
    for i in range(0, len(x.points), BLOCK):
        a, a_norms, p = x.block(i, kept[1][0])
        for j in range(i if same else 0, len(y.points), BLOCK):
            b, b_norms, q = y.block(j, kept[1][1])
            products = torch.mm(a, b.t(), out=kept[0][: len(a) * len(b)].view(len(a), len(b)))
            turns = [
                room[: one.numel()].view(one.shape).zero_() if wanted else None
                for one, room in zip((a, b), kept[2], strict=True)
            ]
            total += impls.extension().energy_mmd_block(
                products, a, b, a_norms, b_norms, p, q, *turns, CODES[kernel], parameters, closest, same and i == j,
                torch.get_num_threads(),
            )  # fmt: skip
            if x.gradient is not None:
                _turn(turns[0], products, a, b, kernel)
                x.gradient[i : i + BLOCK].add_(turns[0], alpha=coefficient)
            if y.gradient is not None:
                _turn(turns[1], products.t(), b, a, kernel)
                y.gradient[j : j + BLOCK].add_(turns[1], alpha=coefficient)
    return total


def _turn(turn, weights, points, others, kernel):
    """Adds sum_j w_ij (x_i - y_j), or sum_j w_ij y_j of products."""
    if KINDS[kernel].of_product:
        turn.addmm_(weights, others)
    else:
        turn.addcmul_(points, weights.sum(1, keepdim=True)).addmm_(weights, others, alpha=-1)


def _itself(points, weights, gradient, kernel, parameters, coefficient):
    """sum_i p_i^2 k(x_i, x_i), and coefficient times its gradient."""
    function, squares = KINDS[kernel], weights.double().square()
    if not function.of_product:
        return 0.0 if kernel == "energy" else _total(squares)
    function, argument = function(int(parameters[0]), *parameters[1:]), points.double().square().sum(1)
    if gradient is not None:
        gradient += ((2 * coefficient * squares * function.slope(argument))[:, None] * points).to(gradient.dtype)
    return _total(squares * function.value(argument))


def _total(weights):
    return weights.sum(dtype=torch.float64).item()
