"""Launches the Triton kernels: of points in registers (triton_points.py), or of tiles (triton_tiles.py), by dimension.

With n = k = 16384 and D = 2048, value and gradients take 3.3e12 multiply-adds in products and read weights of 64 MiB
three times; with D = 2 nothing but the points is read or written.
"""

from __future__ import annotations

import torch

from lgd_kernels.ops.energy_mmd import triton_points, triton_tiles
from lgd_kernels.ops.energy_mmd.kernels import KINDS, factor
from lgd_kernels.ops.energy_mmd.triton_points import energy_mmd_points_kernel  # noqa: F401
from lgd_kernels.ops.energy_mmd.triton_tiles import energy_mmd_pairs_kernel, energy_mmd_turn_kernel  # noqa: F401
from lgd_kernels.ops.energy_mmd.triton_values import value_arguments

FEW = 16  # dimensions up to which a thread holds a point and its gradient


def forward(loss, d_x, d_y, x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision):
    values = value_arguments(kernel, parameters)
    x, y = x.contiguous(), y.contiguous()
    p, q = (_weights(points, given) for points, given in ((x, x_weights), (y, y_weights)))
    meetings = [(0, 1, False, factor(kernel) / (_total(p) * _total(q)))]
    for of in (0, 1) if target_term else (0,):
        if lam:
            weights = (p, q)[of].double()
            pairs = weights.sum(1) ** 2 - (weights.square().sum(1) if unbiased else 0)
            meetings.append((of, of, True, -factor(kernel) * lam / pairs))
    sets = (x, p, d_x), (y, q, d_y)
    loss.zero_()
    if x.shape[2] <= FEW:
        totals = [None, None]
        for of, other, same, coefficient in meetings:
            for a, b in ((of, other),) if same else ((of, other), (other, of)):
                (points, weights, gradient), (others, other_weights, _) = sets[a], sets[b]
                value, wanted = (a, b) == (of, other), gradient is not None
                if value or wanted:
                    total, turn = triton_points.meet(points, others, weights, other_weights, coefficient, values, same,
                                                     not unbiased, value, wanted)  # fmt: skip
                    if value:
                        loss += total
                    if wanted:
                        totals[a] = turn if totals[a] is None else totals[a] + turn
        for gradient, total in zip((d_x, d_y), totals, strict=True):
            if gradient is not None:
                gradient.copy_(total)
        return
    mode = "product" if KINDS[kernel].of_product else precision or "auto"
    if mode != "direct":
        x, y = x.float(), y.float()
        if not KINDS[kernel].of_product:  # distances do not know where the origin is: put it where norms are small
            centre = y.mean(1, keepdim=True, dtype=torch.float64).float()
            x, y = x - centre, y - centre
    norms = [(one * one).sum(2) if mode != "direct" else p for one in (x, y)]
    sets = (x, p, d_x, norms[0]), (y, q, d_y, norms[1])
    for gradient in (d_x, d_y):
        if gradient is not None:
            gradient.zero_()
    for of, other, same, coefficient in meetings:
        (points, weights, gradient, squares), (others, other_weights, other_gradient, other_squares) = (
            sets[of], sets[other]
        )  # fmt: skip
        loss += triton_tiles.meet(points, others, (squares, other_squares), weights, other_weights, coefficient, values,
                                  same, not unbiased, mode, gradient, other_gradient)  # fmt: skip


def _weights(points, given):
    if given is None:
        return torch.ones(points.shape[:2], dtype=torch.float32, device=points.device)
    return given.float().contiguous()


def _total(weights):
    return weights.sum(1, dtype=torch.float64)
