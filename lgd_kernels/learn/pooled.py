"""Minimise the pooled loss of many items over the values that their omegas are interpolated from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.ops.guided_energy.statistics import Statistics

Curves = EnergyCurve | Sequence[EnergyCurve]
POINTS = 33  # of the grid that a constant is searched on first
ROUNDS = 60  # of the descent, at most; 8 to 15 are usual
EXACT = 1e-6  # of the bracket: a smaller step ends the descent


def joined(curves: Curves) -> EnergyCurve:
    """Return one curve of all items, on the CPU. The curves must have the same numbers of particles and targets.

    >>> import torch, lgd_kernels as lgd
    >>> x = torch.zeros(3, 4, 2)
    >>> curve = lgd.guided_energy_curve(x, x, x, lgd.RectifiedFlow().levels(torch.ones(3), torch.zeros(3)), x)
    >>> joined([curve, curve])
    EnergyCurve(6 items, 4 particles, 4 targets)
    """
    several = [curves] if isinstance(curves, EnergyCurve) else list(curves) if hasattr(curves, "__iter__") else []
    if not several or not all(isinstance(curve, EnergyCurve) for curve in several):
        raise TypeError("`curves` must be an EnergyCurve of guided_energy_curve, or a sequence of them, not empty")
    sizes = {curve.statistics.P0.shape[1:] for curve in several}
    if len(sizes) > 1:
        raise ValueError(f"`curves` have (particles, targets) of {sorted(map(tuple, sizes))}, expected the same in all")
    fields = zip(*(curve.statistics for curve in several), strict=True)
    found = Statistics(*(torch.cat([part.cpu() for part in field]) for field in fields))
    broken = ~found.P0.sum((1, 2)).isfinite()
    if bool(broken.any()):
        raise ValueError(
            f"`curves` hold {int(broken.sum())} of {len(broken)} items that are not finite, first item "
            f"{int(broken.nonzero()[0])}: look at its data, its prediction and its times"
        )
    return EnergyCurve(found)


class Problem(NamedTuple):
    """Sum L_i(sum_k weights[i, k] V[group_i, cells[i, k]]) over the items of each group, V in a bracket."""

    curve: EnergyCurve
    group: Tensor  # [N] int64
    cells: Tensor  # [N, k] int64
    weights: Tensor  # [N, k] float64
    bracket: tuple[float, float]
    options: dict[str, Any]  # of the loss: beta, lam, unbiased

    def where(self, chosen: Tensor) -> Problem:
        """Return the problem of the chosen items."""
        group, cells, weights = (one[chosen] for one in (self.group, self.cells, self.weights))
        return self._replace(curve=only(self.curve, chosen), group=group, cells=cells, weights=weights)

    def together(self) -> Problem:
        """Return the problem of all items in one group."""
        return self._replace(group=torch.zeros_like(self.group))

    def constants(self, groups: int) -> Tensor:
        """Return the best omega of each group on a grid, `[G]`; for a group without items, that of all."""
        grid = torch.linspace(*self.bracket, POINTS, dtype=torch.float64, device="cpu")
        losses = summed(self.curve, grid, self.group, groups, self.options)
        seen = torch.bincount(self.group, minlength=groups) > 0
        return grid[torch.where(seen[:, None], losses, losses.sum(0)).argmin(1)]

    def omega(self, values: Tensor) -> Tensor:
        """Return the omega of each item, `[N]`."""
        return (values[self.group[:, None], self.cells] * self.weights).sum(1)

    def loss(self, values: Tensor) -> Tensor:
        """Return the loss of each group, `[G]`, without springs."""
        return self._sum(self.curve.loss(self.omega(values), **self.options), len(values))

    def descend(
        self, start: Tensor, free: Tensor | None = None, springs: Tensor | None = None, rest: Tensor | float = 0.0
    ) -> Tensor:
        """Return the values `[G, n]`, near `start`, with the least loss plus energy of the springs `[n, n]`.

        The springs are relaxed at `rest`. Values that are not `free` keep their start. Each group is an independent
        problem, and all are solved at once."""
        low, high = self.bracket
        values = start.clone()
        groups, n = values.shape
        bend = self.curve.hessian(self.omega(values), **self.options).mean().clamp(min=0) if len(self.group) else 0.0
        springs = values.new_zeros(n, n) if springs is None else bend * springs
        free = torch.ones(n, dtype=torch.bool, device="cpu") if free is None else free
        damping = values.new_full((groups,), 1e-3)

        def objective(at: Tensor) -> Tensor:
            return self.loss(at) + (((at - rest) @ springs) * (at - rest)).sum(1) / 2

        least = objective(values)
        slope, bends = self._derivatives(values)
        for _ in range(ROUNDS):
            downhill = -(slope + (values - rest) @ springs)
            moves = free & ~(((values <= low) & (downhill < 0)) | ((values >= high) & (downhill > 0)))  # [G, n]
            matrix = bends + springs
            scale = matrix.diagonal(dim1=1, dim2=2).abs() + 1e-12
            matrix = matrix * (moves[:, :, None] & moves[:, None, :])
            diagonal = torch.where(moves, damping[:, None] * scale, scale)  # for a fixed value: step 0
            factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(diagonal))
            step = torch.cholesky_solve((downhill * moves)[..., None], factor)[..., 0]
            trial = (values + torch.where(failed[:, None] > 0, 0.0, step)).clamp(low, high)
            trial = torch.where(free, trial, values)
            found = objective(trial)
            better = (failed == 0) & (found < least)
            moved = ((trial - values).abs() * better[:, None]).amax(1)
            values = torch.where(better[:, None], trial, values)
            least = torch.where(better, found, least)
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-9, 1e9)
            tiny = EXACT * (high - low)
            if bool(((moved < tiny) & (better | (damping > 1e3) | (step.abs().amax(1) < tiny))).all()):
                break
            if bool(better.any()):
                slope, bends = self._derivatives(values)
        return values

    def _derivatives(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope `[G, n]` and second derivative `[G, n, n]` of each group's loss."""
        groups, n = values.shape
        omega = self.omega(values)
        slope = self.curve.grad(omega, **self.options)[:, None] * self.weights
        bend = self.curve.hessian(omega, **self.options)[:, None, None] * (
            self.weights[:, :, None] * self.weights[:, None, :]
        )
        cells = self.group[:, None] * n + self.cells  # [N, 4]
        pairs = cells[:, :, None] * n + self.cells[:, None, :]
        return (
            values.new_zeros(groups * n).index_add(0, cells.flatten(), slope.flatten()).view(groups, n),
            values.new_zeros(groups * n * n).index_add(0, pairs.flatten(), bend.flatten()).view(groups, n, n),
        )

    def _sum(self, losses: Tensor, groups: int) -> Tensor:
        return losses.new_zeros(groups).index_add(0, self.group, losses)


def alone(curve: EnergyCurve, bracket: tuple[float, float], options: dict[str, Any]) -> Problem:
    """Return the problem of one value for all items."""
    zero = torch.zeros(count(curve), dtype=torch.int64, device="cpu")
    return Problem(curve, zero, zero[:, None], torch.ones_like(zero, dtype=torch.float64)[:, None], bracket, options)


def summed(curve: EnergyCurve, grid: Tensor, group: Tensor, groups: int, options: dict[str, Any]) -> Tensor:
    """Return the loss of each group at each omega of the grid, `[G, K]`."""
    losses = curve.loss(grid.expand(count(curve), -1), **options)
    return losses.new_zeros(groups, len(grid)).index_add(0, group, losses)


def only(curve: EnergyCurve, chosen: Tensor) -> EnergyCurve:
    """Return the curve of the chosen items."""
    return EnergyCurve(Statistics(*(field[chosen] for field in curve.statistics)))


def count(curve: EnergyCurve) -> int:
    """Return the number of items."""
    return curve.statistics.P0.shape[0]
