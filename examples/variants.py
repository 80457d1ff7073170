"""Other omegas: baked from the network, fitted without one, with a reward; and how the loss's numbers matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples import guidance, measures
from examples.data import CLASSES, PIXELS, Labelled
from lgd_kernels.learn import Frozen, Settings, curve, sample_s, self_consistency_loss, with_reward
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_table
from lgd_kernels.learn.reward import Reward
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.runtime.progress import Track, silent

Sample = Callable[[Tensor, str], Tensor]  # (tables [settings, steps, 10], label) -> [settings, 10, n, 64]


def knots(count: int) -> tuple[Tensor, Tensor]:
    """Of a table over the unit times."""
    return torch.linspace(0, 1 - 1 / count, count), torch.linspace(1 / count, 1, count)


def baked(omega: OmegaNetwork, count: int = 21) -> tuple[OmegaTable, float]:
    """The network as a table, and the largest error of that."""
    return omega.bake(*knots(count))


class Fitted(NamedTuple):
    """A table, the seconds of the pass over the denoiser ("predicted") and of what follows it ("fitted"), and the loss
    curves it was made from, with the conditions and times of each."""

    table: OmegaTable
    seconds: dict[str, float]
    curves: list[EnergyCurve]
    c: Tensor
    s: Tensor
    t: Tensor


def fitted(
    frozen: Frozen,
    data: tuple[Tensor, Tensor],
    settings: Settings,
    items: int = 20480,
    count: int = 8,
    classes: int = CLASSES,
    steps: int = 2,
) -> Fitted:
    """The table with the least loss over many items, no network: one pass over the denoiser, then Newton's method.

    Each item is seen in some steps from its t, since a prediction serves all. The times are those of rectified flow.
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


def train_classifier(train: Labelled, generator: torch.Generator, steps: int = 400) -> nn.Module:
    """A small network on clean images, to give rewards: not the machine that measures accuracy."""
    net = nn.Sequential(nn.Linear(PIXELS, 64), nn.SiLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1, fused=True)
    for _ in range(steps):
        item = torch.randint(0, len(train.x), (128,), generator=generator)
        noisy = train.x[item] + 0.2 * torch.randn(128, PIXELS, generator=generator)
        loss = nn.functional.cross_entropy(net(noisy), train.c[item])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False).eval()


def log_probability(classifier: nn.Module) -> Reward:
    """R(x0, c): the log-probability that the classifier gives the digit asked for."""
    return lambda x0, c: -nn.functional.cross_entropy(classifier(x0), c, reduction="none")


def reward_sweep(
    frozen: Frozen,
    train: Labelled,
    real: Labelled,
    settings: Settings,
    gammas: tuple[float, ...],
    steps: int,
    sample: Sample,
    judge,
    generator: torch.Generator,
    *,
    sampling_steps: int,
    track: Track = silent,
) -> list[dict]:
    """omega learned with `L + gamma L_R` for each gamma: reward, energy distance and accuracy of its samples."""
    reward = log_probability(train_classifier(train, generator))
    found = [
        guidance.learn_omega(
            frozen, train, settings, loss=with_reward(reward, gamma), steps=steps, every=steps, track=track,
            label=f"gamma {gamma:g}",
        )[0] for gamma in gammas
    ]  # fmt: skip
    tables = torch.stack([guidance.learned_table(omega, frozen.schedule, sampling_steps) for omega in found])
    x = sample(tables, "reward samples")
    c = torch.arange(CLASSES).repeat_interleave(x.shape[2])
    rows = []
    for gamma, table, samples in zip(gammas, tables, x, strict=True):
        figures = measures.measure(samples, real, judge)
        rows.append(
            {
                "gamma": gamma,
                "reward": float(reward(samples.flatten(0, 1), c).mean()),
                "omega": float(table.mean()),
                "energy": figures["energy"],
                "accuracy": figures["accuracy"],
            }
        )
    return rows


def ablations(
    frozen: Frozen,
    data: tuple[Tensor, Tensor],
    real: Labelled,
    settings: Settings,
    values: dict[str, tuple[float, ...]],
    steps: int,
    sample: Sample,
    *,
    sampling_steps: int,
    track: Track = silent,
) -> dict[str, list[list[float]]]:
    """The primary figure as one number of the loss or of its draws is changed: {name: [[value, energy], ...]}."""
    omegas, of = [], []
    for name, tried in values.items():
        for value in tried:
            loss = self_consistency_loss
            changed = settings
            if name in ("beta", "lam"):
                loss = partial(self_consistency_loss, **{name: value})
            else:
                changed = replace(settings, **{name: value})
            omegas += guidance.learn_omega(
                frozen, data, changed, loss=loss, steps=steps, every=steps, track=track, label=f"{name} {value:g}"
            )
            of.append((name, value))
    tables = torch.stack([guidance.learned_table(omega, frozen.schedule, sampling_steps) for omega in omegas])
    energy = measures.energy_per_class(sample(tables, "ablations"), real).mean(1)
    found: dict[str, list[list[float]]] = {name: [] for name in values}
    for (name, value), figure in zip(of, energy, strict=True):
        found[name].append([value, float(figure)])
    return found
