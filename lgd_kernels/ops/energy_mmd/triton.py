"""Launch the Triton kernels: of points in registers (triton_points.py), or of tiles (triton_tiles.py), by dimension.

With n = k = 16384 and D = 2048, value and gradients take 3.3e12 multiply-adds in products and read weights of 64 MiB
three times. With D = 2 the kernels read and write only the points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import triton_points, triton_tiles
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd
from lgd_kernels.ops.energy_mmd.triton_points import energy_mmd_points_kernel  # noqa: F401
from lgd_kernels.ops.energy_mmd.triton_tiles import energy_mmd_pairs_kernel, energy_mmd_turn_kernel  # noqa: F401
from lgd_kernels.ops.energy_mmd.triton_values import Meeting, Points, Values

FEW = 16  # dimensions up to which a thread holds a point and its gradient


def forward(outputs: tuple[Tensor, Tensor | None, Tensor | None], a: EnergyMmd) -> None:
    loss, d_x, d_y = outputs
    x, y = (one.contiguous() for one in (a.x, a.y))
    p, q = (_weights(points, given) for points, given in ((x, a.x_weights), (y, a.y_weights)))
    loss.zero_()
    if x.shape[2] <= FEW:
        _few_dimensions(loss, a, Points(x, p, d_x), Points(y, q, d_y))
    else:
        _many_dimensions(loss, a, Points(x, p, d_x), Points(y, q, d_y))


def _few_dimensions(loss: Tensor, a: EnergyMmd, x: Points, y: Points) -> None:
    values = Values.of(a.kernel)
    totals: dict[bool, Tensor] = {}  # gradients, of x if the key is true
    for of in _meetings(a, x, y):
        for turned in (of,) if of.same else (of, of._replace(x=of.y, y=of.x)):
            value, wanted = turned is of, turned.x.gradient is not None
            if value or wanted:
                total, turn = triton_points.meet(turned, values, value, wanted)
                if total is not None:
                    loss += total
                if turn is not None:
                    before = totals.get(turned.x is x)
                    totals[turned.x is x] = turn if before is None else before + turn
    for side in (x, y):
        if side.gradient is not None:
            total = totals.get(side is x)
            side.gradient.zero_() if total is None else side.gradient.copy_(total)


def _many_dimensions(loss: Tensor, a: EnergyMmd, x: Points, y: Points) -> None:
    mode = "product" if a.kernel.of_product else a.precision or "auto"
    if mode != "direct":
        points = [x.points.float(), y.points.float()]
        if not a.kernel.of_product:  # distances do not depend on the origin: move it to where norms are small
            centre = points[1].mean(1, keepdim=True, dtype=torch.float64).float()
            points = [one - centre for one in points]
        norms = [None if a.kernel.of_product else (one * one).sum(2) for one in points]
        x, y = (
            side._replace(points=one, norms=squares) for side, one, squares in zip((x, y), points, norms, strict=True)
        )
    for side in (x, y):
        if side.gradient is not None:
            side.gradient.zero_()
    values = Values.of(a.kernel)
    for of in _meetings(a, x, y):
        loss += triton_tiles.meet(of, values, mode)


def _meetings(a: EnergyMmd, x: Points, y: Points) -> list[Meeting]:
    """Return the pairs of every term that counts, with the coefficient of the term."""
    meetings, factor = [], a.kernel.factor
    if a.between:
        meetings.append(Meeting(x, y, factor / (_total(x.weights) * _total(y.weights))))
    for side in ((x, y) if a.target_term else (x,)) if a.lam else ():
        weights = side.weights.double()
        pairs = weights.sum(1) ** 2 - (weights.square().sum(1) if a.unbiased else 0)
        meetings.append(Meeting(side, side, -factor * a.lam / pairs, not a.unbiased))
    return meetings


def _weights(points: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        return torch.ones(points.shape[:2], dtype=torch.float32, device=points.device)
    return given.float().contiguous()


def _total(weights: Tensor) -> Tensor:
    return weights.sum(1, dtype=torch.float64)
