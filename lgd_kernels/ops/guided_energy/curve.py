"""The loss as a function of omega, from the statistics of one pass over the data."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.statistics import Statistics, energy
from lgd_kernels.ops.guided_energy.structs import EnergyDerivative, EnergyOptions
from lgd_kernels.runtime import checks, impls

POINTS = 257  # of the first grid that a minimum is searched on
ROUNDS = 5  # of refining the grid around the best point, by 16 each time
MEMORY = 2**22  # terms of a sum in memory at a time


class EnergyCurve:
    """L(omega) for each of B items; made by `guided_energy_curve`. All results are float64.

    omega is a float, `[B]`, or `[B, K]` for K values of each item; results have the shape of omega (`[B]` for a float).
    They are differentiable in omega. beta, lam and unbiased are those of `guided_energy`.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def __repr__(self) -> str:
        batch, m, k = self.statistics.P0.shape
        return f"EnergyCurve({batch} items, {m} particles, {k} targets)"

    def loss(self, omega: float | Tensor, beta: float = 1.75, lam: float = 1.0, unbiased: bool = True) -> Tensor:
        """Compute L(omega)."""
        return self._evaluate(omega, beta, lam, unbiased, 0)

    def grad(self, omega: float | Tensor, beta: float = 1.75, lam: float = 1.0, unbiased: bool = True) -> Tensor:
        """Compute dL/domega, in closed form."""
        return self._evaluate(omega, beta, lam, unbiased, 1)

    def hessian(self, omega: float | Tensor, beta: float = 1.75, lam: float = 1.0, unbiased: bool = True) -> Tensor:
        """Compute d^2 L / domega^2, in closed form."""
        return self._evaluate(omega, beta, lam, unbiased, 2)

    def minimize(
        self,
        beta: float = 1.75,
        lam: float = 1.0,
        bracket: tuple[float, float] = (0.0, 10.0),
        group: Tensor | None = None,
        unbiased: bool = True,
    ) -> Tensor:
        """Find the omega with the least loss in the bracket: `[B]`, or `[G]` for items summed over G groups.

        group is `[B]` int64, the group of each item. A single item's loss may have several minima, and with lam > 0
        none at all (it may fall without bound as omega grows): hence the bracket. The best of a grid of 257 points,
        and of the points where one particle is nearest to one target, is refined to 1e-6 of the bracket's width. With
        beta = 2 and lam = 0 the minimum has a closed form.

        >>> import torch, lgd_kernels as lgd
        >>> levels = lgd.RectifiedFlow().levels(torch.ones(2), torch.zeros(2))
        >>> cond, uncond = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
        >>> target = torch.tensor([[[2.0]], [[4.0]]])
        >>> curve = lgd.guided_energy_curve(cond, cond, uncond, levels, target)
        >>> curve.minimize(beta=2.0, lam=0.0)
        tensor([1., 3.], dtype=torch.float64)
        >>> curve.minimize(beta=2.0, lam=0.0, group=torch.tensor([0, 0]))
        tensor([2.], dtype=torch.float64)
        """
        numbers = isinstance(bracket, (tuple, list)) and [isinstance(value, (int, float)) for value in bracket]
        if numbers != [True, True]:
            raise TypeError(f"EnergyCurve.minimize: `bracket` is {bracket!r}, expected two numbers (low, high)")
        low, high = map(float, bracket)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"EnergyCurve.minimize: `bracket` is {bracket}, expected (low, high) with low < high")
        at = self.statistics
        batch, m, k = at.P0.shape
        checks.power("EnergyCurve.minimize", beta, lam, unbiased, m)
        if group is not None and not isinstance(group, Tensor):
            raise TypeError(
                f"EnergyCurve.minimize: `group` is a {type(group).__name__}, expected an int64 tensor [B] = [{batch}]"
            )
        if group is not None and (group.shape != (batch,) or group.dtype != torch.int64):
            raise ValueError(
                f"EnergyCurve.minimize: `group` is {group.dtype} of shape {list(group.shape)}, expected int64 "
                f"[B] = [{batch}]"
            )
        if group is not None:
            checks.dense("EnergyCurve.minimize", "group", group)
        groups = batch if group is None else int(group.max()) + 1 if batch else 0

        def pooled(values):  # [B, ...] to [G, ...]
            return (
                values if group is None else values.new_zeros((groups, *values.shape[1:])).index_add(0, group, values)
            )

        if beta == 2 and lam == 0:
            steepness, offset = pooled(k * at.P2.sum(1)), pooled(at.P1.sum((1, 2)))
            flat = steepness == 0
            best = torch.where(flat, low + 0 * offset, -offset / torch.where(flat, 1.0, steepness))
            return best.clamp(low, high)  # NaN stays NaN

        def loss(points):  # [G, K]
            return pooled(self.loss(points if group is None else points[group], beta, lam, unbiased))

        grid = torch.linspace(low, high, POINTS, dtype=torch.float64, device=at.P0.device)
        width = (high - low) / (POINTS - 1)
        candidates = grid.expand(groups, -1)
        if group is None:  # where one particle is nearest to one target, the loss may dip between the points
            nearest = -at.P1 / torch.where(at.P2 > 0, at.P2, 1.0)[:, :, None]
            candidates = torch.cat((candidates, nearest.flatten(1).clamp(low, high).nan_to_num(low)), 1)
        for _ in range(ROUNDS):
            best = candidates.gather(1, loss(candidates).argmin(1, keepdim=True))
            candidates = (best + width * torch.linspace(-1, 1, 33, dtype=grid.dtype, device=grid.device)).clamp(
                low, high
            )
            candidates = torch.cat((best, candidates), 1)  # ties go to the earlier point
            width /= 16
        least, where = loss(candidates).min(1, keepdim=True)
        return torch.where(least.isnan(), least, candidates.gather(1, where))[:, 0]

    def _evaluate(self, omega, beta, lam, unbiased, order) -> Tensor:
        at = self.statistics
        batch, m, k = at.P0.shape
        checks.power("EnergyCurve", beta, lam, unbiased, m)
        try:
            omega = torch.as_tensor(omega, dtype=torch.float64, device=at.P0.device)
        except (TypeError, ValueError, RuntimeError):
            kind = type(omega).__name__
            raise TypeError(f"EnergyCurve: `omega` is a {kind}, expected a float or a tensor [B] or [B, K]") from None
        checks.dense("EnergyCurve", "omega", omega)
        if omega.ndim == 0:
            omega = omega.expand(batch)
        if omega.ndim > 2 or omega.shape[0] != batch:
            raise ValueError(
                f"EnergyCurve: `omega` has shape {list(omega.shape)}, expected a float, [B] or [B, K] with B = {batch}"
            )
        points = omega if omega.ndim == 2 else omega[:, None]
        if points.numel() and self._native(points):
            found = torch.empty_like(points, memory_format=torch.contiguous_format)
            of = EnergyDerivative(m, k, EnergyOptions(beta, lam, unbiased), order)
            threads = torch.get_num_threads()
            impls.extension().energy_curve(found, self._packed, points.contiguous(), of, threads)
            return found.view(omega.shape)
        step = max(1, MEMORY // max(1, batch * m * (k + m)))
        parts = [energy(at, part, beta, lam, unbiased, order) for part in points.split(step, 1)]
        return torch.cat(parts, 1).view(omega.shape)

    @functools.cached_property
    def _packed(self) -> Tensor:
        return self.statistics.pack().contiguous()

    def _native(self, points: Tensor) -> bool:
        """Return whether the C++ loop may run, which no tracer, transform or autograd sees."""
        if points.device.type != "cpu" or impls.extension_error() or impls.transforms_active():
            return False
        return impls.direct(points, *self.statistics) and not (torch.is_grad_enabled() and points.requires_grad)
