"""Learn omega with a reward, and with other numbers in the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits import judge
from examples.digits.data import CLASSES, PIXELS, Digits, Labelled
from examples.shared import guidance
from examples.shared.measures import energy_per_class
from lgd_kernels.learn import Frozen, Settings, self_consistency_loss, with_reward
from lgd_kernels.learn.reward import Loss, Reward
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime.progress import Track

Sample = Callable[[Tensor, str], Tensor]  # (tables [settings, steps, 10], label) -> [settings, 10, n, 64]


@dataclass(frozen=True)
class Bench:
    """Learn omega on the clean training split, always alike, and sample with it."""

    frozen: Frozen
    data: Digits
    settings: Settings
    steps: int  # of learning
    sampling_steps: int
    sample: Sample
    track: Track

    def learn(self, label: str, loss: Loss = self_consistency_loss, settings: Settings | None = None) -> OmegaNetwork:
        """Return the network that a loss and settings lead to."""
        own = settings or self.settings
        train = (self.data.train.x, self.data.train.c)
        (found,) = guidance.learn_omega(
            self.frozen,
            train,
            own,
            classes=CLASSES,
            loss=loss,
            steps=self.steps,
            every=self.steps,
            track=self.track,
            label=label,
        )
        return found

    def tables(self, omegas: list[OmegaNetwork]) -> Tensor:
        """Return omega along the sampling path, [omegas, steps, 10]."""
        schedule = self.frozen.schedule
        return torch.stack([guidance.path_table(omega, schedule, self.sampling_steps, CLASSES) for omega in omegas])


def train_classifier(train: Labelled, generator: torch.Generator, steps: int = 400) -> nn.Module:
    """Train a small network on clean images to give rewards. Another classifier measures accuracy."""
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
    """Return R(x0, c), the log-probability that the classifier gives the digit asked for."""
    return lambda x0, c: -nn.functional.cross_entropy(classifier(x0), c, reduction="none")


def reward_sweep(
    bench: Bench, gammas: tuple[float, ...], classifier: judge.Classifier, generator: torch.Generator
) -> list[dict[str, float]]:
    """Learn omega with `L + gamma L_R` for each gamma; return reward, energy distance and accuracy of its samples."""
    reward = log_probability(train_classifier(bench.data.train, generator))
    tables = bench.tables([bench.learn(f"gamma {gamma:g}", with_reward(reward, gamma)) for gamma in gammas])
    x = bench.sample(tables, "reward samples")
    c = torch.arange(CLASSES).repeat_interleave(x.shape[2])
    rows = []
    for gamma, table, samples in zip(gammas, tables, x, strict=True):
        figures = judge.measure(samples, bench.data.test, classifier)
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


def ablations(bench: Bench, values: dict[str, tuple[float, ...]]) -> dict[str, list[list[float]]]:
    """Change one number of the loss or of its draws at a time; return {name: [[value, primary figure], ...]}."""

    def learn(name: str, value: float) -> OmegaNetwork:
        if name in ("beta", "lam"):
            return bench.learn(f"{name} {value:g}", partial(self_consistency_loss, **{name: value}))
        changes: dict[str, Any] = {name: value}
        return bench.learn(f"{name} {value:g}", settings=replace(bench.settings, **changes))

    tried = [(name, value) for name, some in values.items() for value in some]
    tables = bench.tables([learn(name, value) for name, value in tried])
    energy = energy_per_class(bench.sample(tables, "ablations"), bench.data.test.by_class()).mean(1)
    found: dict[str, list[list[float]]] = {name: [] for name in values}
    for (name, value), figure in zip(tried, energy, strict=True):
        found[name].append([value, float(figure)])
    return found
