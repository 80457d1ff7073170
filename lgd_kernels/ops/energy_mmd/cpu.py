"""Launches csrc/energy_mmd/energy_mmd_cpu.cpp: tile by tile from differences, or on blocks of matrix products."""

from __future__ import annotations

import torch

from lgd_kernels import impls
from lgd_kernels.levels import widest
from lgd_kernels.ops.energy_mmd.kernels import CODES, KINDS, factor

SMALL = 64  # dimensions up to which differences are quicker than products
BLOCK = 1024  # rows and columns of a block of products: 4 MiB
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
        loss[item] = _products(*rows, kernel, parameters, lam, unbiased, target_term, closest)


def _products(x, y, p, q, d_x, d_y, kernel, parameters, lam, unbiased, target_term, closest):
    """One problem, in blocks of products; gradients are added to d_x and d_y, which begin at 0."""
    if not KINDS[kernel].of_product:  # distances do not know where the origin is: put it where norms are small
        centre = y.mean(0, dtype=torch.float64).to(y.dtype)
        x, y = x - centre, y - centre
    p, q = (points.new_ones(len(points)) if one is None else one for one, points in ((p, x), (q, y)))
    for gradient in (d_x, d_y):
        if gradient is not None:
            gradient.zero_()
    meets = factor(kernel) / (_total(p) * _total(q))
    loss = meets * _pairs(x, y, p, q, d_x, d_y, kernel, parameters, meets, closest, False)
    for points, weights, gradient, counts in ((x, p, d_x, True), (y, q, d_y, target_term)):
        if not counts or lam == 0:
            continue
        share = -factor(kernel) * lam / (_total(weights) ** 2 - (_total(weights.double().square()) if unbiased else 0))
        loss += share * _pairs(points, points, weights, weights, gradient, gradient, kernel, parameters, share, closest,
                               True)  # fmt: skip
        if not unbiased:
            loss += share / 2 * _itself(points, weights, gradient, kernel, parameters, share / 2)
    return loss


def _pairs(x, y, p, q, d_x, d_y, kernel, parameters, coefficient, closest, same):
    """sum_ij p_i q_j k(x_i, y_j) (`same`: of i < j), and coefficient times its gradients."""
    norms = [None if KINDS[kernel].of_product else (one * one).sum(1) for one in (x, y)]
    total, wanted = 0.0, d_x is not None or d_y is not None
    block = x.new_empty(min(BLOCK, len(x)) * min(BLOCK, len(y)))  # one for all: fresh pages cost more than the epilogue
    for i in range(0, len(x), BLOCK):
        for j in range(i if same else 0, len(y), BLOCK):
            a, b = x[i : i + BLOCK], y[j : j + BLOCK]
            products = torch.mm(a, b.t(), out=block[: len(a) * len(b)].view(len(a), len(b)))
            turns = [torch.zeros_like(one) if wanted else None for one in (a, b)]
            near = [None if one is None else one[at : at + BLOCK] for one, at in zip(norms, (i, j), strict=True)]
            total += impls.extension().energy_mmd_block(
                products, a, b, *near, p[i : i + BLOCK], q[j : j + BLOCK], *turns, CODES[kernel], parameters, closest,
                same and i == j, torch.get_num_threads(),
            )  # fmt: skip
            if d_x is not None:
                d_x[i : i + BLOCK] += coefficient * turns[0].add_(_turn(products, a, b, kernel))
            if d_y is not None:
                d_y[j : j + BLOCK] += coefficient * turns[1].add_(_turn(products.t(), b, a, kernel))
    return total


def _turn(weights, points, others, kernel):
    """sum_j w_ij (x_i - y_j), or sum_j w_ij y_j of products."""
    if KINDS[kernel].of_product:
        return weights @ others
    return torch.addmm(points * weights.sum(1, keepdim=True), weights, others, alpha=-1)


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
