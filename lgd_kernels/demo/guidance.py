"""Learning omega, sampling with it, and the hand-made guidance it is compared with.

Times are unit times u in [0, 1] (0 data, 1 noise); a sampling run takes `steps` equal steps from 1 to 0. Guidance for
a run is a table [steps, classes], known before the loop, since omega does not depend on x_t.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels.demo.denoiser import Predict
from lgd_kernels.learn.objective import sample_times
from lgd_kernels.levels import Levels
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.progress import Track, silent
from lgd_kernels.schedules import Schedule


class Batch(NamedTuple):
    """What a step of learning needs to know of B items, but for their omega."""

    c: Tensor  # [B]
    s: Tensor  # [B]
    t: Tensor  # [B]
    levels: Levels
    x0: Tensor  # [B, D]
    x_t: Tensor  # [B, m, D], like the predictions
    cond: Tensor
    uncond: Tensor
    seed: Tensor  # [], of the noise that the loss draws: in the step and in the targets


@torch.no_grad()
def draw_batch(
    predict: Predict,
    x0: Tensor,
    c: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    delta: float = 0.1,
    s_min: float = 0.02,
    particles: int = 4,
    batch: int = 256,
) -> Batch:
    """Items and times at random, noised to t and predicted from there. The denoiser is frozen and omega does not see
    x_t, so nothing here needs a graph."""
    item = torch.randint(0, len(x0), (batch,), generator=generator)
    u_s, u_t = sample_times(batch, delta, s_min=s_min, generator=generator)
    s, t = schedule.from_unit(u_s), schedule.from_unit(u_t)
    levels = schedule.levels(t, s)
    z = torch.randn(batch, particles, x0.shape[1], generator=generator)
    x_t = levels.signal_t[:, None, None] * x0[item][:, None] + levels.noise_t[:, None, None] * z  # [B, m, D]
    cond, uncond = predict(x_t.flatten(0, 1), u_t.repeat_interleave(particles), c[item].repeat_interleave(particles))
    seed = torch.randint(2**63 - 1, (), generator=generator)
    return Batch(c[item], s, t, levels, x0[item], x_t, cond.view_as(x_t), uncond.view_as(x_t), seed)


def loss_of(batch: Batch, omega: Tensor, beta: float = 1.75, lam: float = 1.0, churn: float = 1.0) -> Tensor:
    """The self-consistency loss of each item, with as many targets as particles. The kernel draws the step's noise and
    the targets, from one seed and two streams: independent of each other, and of the noise in x_t."""
    targets = lgd.Renoise(batch.x0, batch.x_t.shape[1], batch.seed)
    return lgd.guided_energy(
        batch.x_t, batch.cond, batch.uncond, omega, batch.levels, targets, prediction="x0", churn=churn,
        seed=batch.seed, beta=beta, lam=lam,
    )  # fmt: skip


def learn_omega(
    predict: Predict,
    x0: Tensor,
    c: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    classes: int = 10,
    delta: float = 0.1,
    s_min: float = 0.02,
    beta: float = 1.75,
    lam: float = 1.0,
    particles: int = 4,
    churn: float = 1.0,
    steps: int = 900,
    every: int = 150,
    batch: int = 256,
    lr: float = 1e-3,
    track: Track = silent,
) -> list[OmegaNetwork]:
    """Learn omega(c, s, t) on clean pairs (x0 [N, D], c [N]) and return a checkpoint for each `every` steps."""
    net = OmegaNetwork(schedule, classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=True)
    checkpoints = []
    for i in track(range(steps), "omega"):
        drawn = draw_batch(
            predict, x0, c, schedule, generator, delta=delta, s_min=s_min, particles=particles, batch=batch
        )
        loss = loss_of(drawn, net(drawn.c, drawn.s, drawn.t), beta, lam, churn).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % every == 0:
            checkpoints.append(copy.deepcopy(net).requires_grad_(False))
    return checkpoints


@torch.no_grad()
def sample(
    predict: Predict, z: Tensor, c: Tensor, table: Tensor, schedule: Schedule, setting: Tensor | None = None
) -> Tensor:
    """Samples from noise z [N, D] for labels c [N], one guided step (churn 0) per row of the table.

    Args:
        table: guidance [steps, classes], or [settings, steps, classes] with `setting` [N] saying which one a sample
            takes: a whole grid of settings is one batch, since the step takes a weight per sample.
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
    """[settings, classes, per_class, D] samples for tables [settings, steps, classes].

    Every setting starts from the same noise, so that settings differ by their guidance and not by luck. A batch holds
    `chunk` settings: it fits the cache.
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
def learned_table(net: OmegaNetwork, schedule: Schedule, steps: int) -> Tensor:
    """omega [steps, classes] along the sampling path."""
    u = torch.linspace(1, 0, steps + 1)
    return omega_grid(net, schedule, u[1:], u[:-1])


@torch.no_grad()
def omega_grid(net: OmegaNetwork, schedule: Schedule, u_s: Tensor, u_t: Tensor) -> Tensor:
    """omega [..., classes] at unit times u_s, u_t of any one shape."""
    s, t = (schedule.from_unit(u).flatten().repeat_interleave(net.classes) for u in (u_s, u_t))
    c = torch.arange(net.classes).repeat(u_s.numel())
    return net(c, s, t).view(*u_s.shape, net.classes)


def interval_table(omega: float, low: float, high: float, steps: int, classes: int = 10) -> Tensor:
    """A limited interval: omega in the steps whose middle lies in [low, high], 0 elsewhere. [steps, classes]."""
    middle = 1 - (torch.arange(steps) + 0.5) / steps
    return (omega * ((middle >= low) & (middle <= high)))[:, None].expand(-1, classes)
