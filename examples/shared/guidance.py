"""Learn omega, and sample with it.

Times are unit times u in [0, 1] (0 data, 1 noise). A sampling run takes `steps` equal steps from 1 to 0. omega does not
depend on x_t, so the guidance of a run is a table [steps, classes] that is known before the loop.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import lgd_kernels as lgd
from examples.shared.denoiser import Predict
from lgd_kernels.learn import Frozen, Settings, Trainer, self_consistency_loss
from lgd_kernels.learn.reward import Loss
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.runtime.progress import Track, silent
from lgd_kernels.sampling.schedules import Schedule


def learn_omega(
    frozen: Frozen,
    data: tuple[Tensor, Tensor],
    settings: Settings,
    *,
    classes: int,
    loss: Loss = self_consistency_loss,
    steps: int = 900,
    every: int = 150,
    track: Track = silent,
    label: str = "omega",
) -> list[OmegaNetwork]:
    """Learn omega(c, s, t) on clean pairs (x0 [N, D], c [N]); return its running average after each `every` steps."""
    trainer = Trainer(OmegaNetwork(frozen.schedule, classes), frozen, data, settings, loss=loss)
    found: list[Any] = []
    for done in track(range(every, steps + 1, every), label):
        trainer.train(done)
        found.append(copy.deepcopy(trainer.ema))
    return found


@torch.no_grad()
def sample(
    predict: Predict, z: Tensor, c: Tensor, table: Tensor, schedule: Schedule, setting: Tensor | None = None
) -> Tensor:
    """Return samples from noise z [N, D] for labels c [N]: one guided step (churn 0) for each row of the table.

    Args:
        table: guidance [steps, classes]; or [settings, steps, classes], with `setting` [N], the setting of each sample.
            A step takes a weight for each sample, so a whole grid of settings is one batch.
    """
    if setting is None:
        table, setting = table[None], torch.zeros_like(c)
    steps = table.shape[1]
    u = torch.linspace(1, 0, steps + 1)
    x = z
    for i in range(steps):
        omega = table[setting, i, c]  # [N]
        u_t = torch.full((len(x),), float(u[i]))
        cond, uncond = predict(x, u_t, c)
        levels = schedule.levels(schedule.from_unit(u_t), schedule.from_unit(torch.full_like(u_t, float(u[i + 1]))))
        x = lgd.guided_step(x, cond, uncond, omega, levels, prediction="x0", churn=0.0)
    return x


def sample_classes(
    predict: Predict,
    tables: Tensor,
    per_class: int,
    dim: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    chunk: int = 4,
    track: Track = silent,
    label: str = "sampling",
) -> Tensor:
    """Return samples [settings, classes, per_class, D] for tables [settings, steps, classes].

    Every setting starts from the same noise, so settings differ by their guidance alone. A batch holds `chunk` settings
    and fits the cache.
    """
    classes = tables.shape[2]
    z = torch.randn(classes * per_class, dim, generator=generator)
    c = torch.arange(classes).repeat_interleave(per_class)
    batches = []
    for part in track(tables.split(chunk), label):
        setting = torch.arange(len(part)).repeat_interleave(len(z))
        x = sample(predict, z.repeat(len(part), 1), c.repeat(len(part)), part, schedule, setting)
        batches.append(x.view(len(part), classes, per_class, dim))
    return torch.cat(batches)


@torch.no_grad()
def path_table(omega: OmegaNetwork | OmegaTable, schedule: Schedule, steps: int, classes: int) -> Tensor:
    """Return omega [steps, classes] along the sampling path."""
    u = torch.linspace(1, 0, steps + 1)
    return omega_grid(omega, schedule, u[1:], u[:-1], classes)


@torch.no_grad()
def omega_square(omega: OmegaNetwork | OmegaTable, schedule: Schedule, points: int, classes: int) -> Tensor:
    """Return omega [points (s), points (t), classes] on an even grid of unit times."""
    u = torch.linspace(0, 1, points)
    u_s, u_t = torch.meshgrid(u, u, indexing="ij")
    return omega_grid(omega, schedule, u_s, u_t, classes)


@torch.no_grad()
def omega_grid(omega: OmegaNetwork | OmegaTable, schedule: Schedule, u_s: Tensor, u_t: Tensor, classes: int) -> Tensor:
    """Return omega [..., classes] at unit times u_s, u_t of one shape; where s would be after t, omega at s = t."""
    u_s = torch.minimum(u_s, u_t)
    s, t = (schedule.from_unit(u).flatten().repeat_interleave(classes) for u in (u_s, u_t))
    c = torch.arange(classes).repeat(u_s.numel())
    return omega(c, s, t).view(*u_s.shape, classes)
