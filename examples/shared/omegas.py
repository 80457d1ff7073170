"""Make tables of omega: baked from a network, or fitted to the loss without one."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.learn import Frozen, Settings, curve, sample_s
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_table
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.ops.guided_energy.curve import EnergyCurve


def knots(count: int) -> tuple[Tensor, Tensor]:
    """Return the knots of a table over the unit times, `count` for s and for t."""
    return torch.linspace(0, 1 - 1 / count, count), torch.linspace(1 / count, 1, count)


def baked(omega: OmegaNetwork, count: int = 21) -> tuple[OmegaTable, float]:
    """Return the network as a table, and the largest error of the table."""
    return omega.bake(*knots(count))


class Fitted(NamedTuple):
    """Hold a fitted table, and the loss curves that it was fitted to with the condition and the times of each."""

    table: OmegaTable
    seconds: dict[str, float]  # "predicted": the pass over the denoiser; "fitted": what follows it
    curves: list[EnergyCurve]
    c: Tensor
    s: Tensor
    t: Tensor


def fitted(
    frozen: Frozen,
    data: tuple[Tensor, Tensor],
    settings: Settings,
    items: int,
    *,
    count: int,
    classes: int,
    steps: int = 2,
) -> Fitted:
    """Fit the table with the least loss over many items: one pass over the denoiser, then Newton's method.

    Each item is used for `steps` steps from its t, since one prediction serves all of them. Times are those of
    rectified flow.
    """
    started = time.perf_counter()
    particles = Batches(frozen, data, settings, torch.device("cpu")).of(data, items, settings.seed)
    predicted = time.perf_counter()
    schedule, generator = frozen.schedule, torch.Generator().manual_seed(settings.seed)
    curves, times = [], [particles.s]
    for step in range(steps):
        if step:
            times.append(sample_s(particles.t, settings.delta, settings.zeta, settings.s_min, generator))
        levels = schedule.levels(particles.t, times[-1])
        curves.append(curve(particles._replace(s=times[-1], levels=levels, seed=particles.seed + step)))
    c, s, t = particles.c.repeat(steps), torch.cat(times), particles.t.repeat(steps)
    table = fit_table(curves, c, s, t, *knots(count), conditions=classes, smooth=10.0 * steps, shared=steps)
    ended = time.perf_counter()
    return Fitted(table, {"predicted": predicted - started, "fitted": ended - predicted}, curves, c, s, t)
