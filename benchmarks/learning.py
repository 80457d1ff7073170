"""Measure a training step of omega: `python -m benchmarks.learning`.

The command prints which share of a step the loss takes, in eager PyTorch and in one pass, with predictions in each step
and from a cache; and what each part of a cached step takes. The workload has the sizes of the digits example.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import lgd_kernels as lgd
from lgd_kernels.learn import Frozen, Particles, Settings, Trainer, particle_energy, self_consistency_loss
from lgd_kernels.learn.reward import Loss
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime.levels import per_sample, step_coefficients
from lgd_kernels.runtime.progress import Track, silent

WARM_UP = 5
CLASSES, PIXELS, ITEMS = 10, 64, 1000
CACHE = 2048


def eager_loss(particles: Particles, omega: Tensor, beta: float = 1.75, lam: float = 1.0, churn: float = 1.0) -> Tensor:
    """Compute `self_consistency_loss` in eager PyTorch: noise, targets and guided particles are tensors."""
    p, z = particles, torch.randn(2, *particles.x_t.shape)  # of the step and of the targets
    signal, noise, a, b, v, w = (
        per_sample(one, p.x_t)
        for one in (p.levels.signal_s, p.levels.noise_s, *step_coefficients(p.levels, p.prediction, churn), omega)
    )
    x_s = a * p.x_t + b * (p.cond + w * (p.cond - p.uncond)) + v * z[0]
    return particle_energy(x_s, signal * p.x0[:, None] + noise * z[1], beta, lam)


class Clock:
    """Time a loss inside an update: its forward pass, and its part of the backward pass down to omega."""

    def __init__(self) -> None:
        self.taken = self.began = 0.0

    def timed(self, loss: Loss) -> Loss:
        """Return the loss, which sets `taken` during an update."""

        def measured(particles: Particles, omega: Tensor) -> Tensor:
            started = time.perf_counter()
            each = loss(particles, omega)
            self.taken = time.perf_counter() - started
            each.register_hook(self._arrived)
            omega.register_hook(self._left)
            return each

        return measured

    def _arrived(self, _: Tensor) -> None:
        self.began = time.perf_counter()

    def _left(self, _: Tensor) -> None:
        self.taken += time.perf_counter() - self.began


def loss_share(
    frozen: Frozen,
    data: tuple[Tensor, Tensor],
    classes: int,
    *,
    cache: int = 0,
    rounds: int = 60,
    track: Track = silent,
) -> dict[str, float]:
    """Train a network with each form of the loss in turn, and time both.

    An update is a batch with its predictions (with `cache` above 0, from a cache of so many items), omega, the loss,
    its gradient, clipping, AdamW and the average. The loss is drawing the noise, the guided step, the energy, and the
    gradient from there down to omega, as part of the update's one backward pass. Returns medians over the rounds:

        eager, one_pass      the loss's share of an update
        loss_ratio           time of the loss in eager PyTorch / in one pass
        step_ratio           the same of whole updates
    """
    forms: dict[str, Loss] = {"eager": eager_loss, "one_pass": self_consistency_loss}
    trainer = Trainer(OmegaNetwork(frozen.schedule, classes), frozen, data, Settings(cache=cache))
    clock = Clock()
    losing: dict[str, list[float]] = {name: [] for name in forms}
    stepping: dict[str, list[float]] = {name: [] for name in forms}
    for i in track(range(WARM_UP + rounds), "share of the loss"):
        for name in sorted(forms, reverse=i % 2 == 1):
            trainer.loss = clock.timed(forms[name])
            started = time.perf_counter()
            trainer.update()
            ended = time.perf_counter()
            if i >= WARM_UP:
                losing[name].append(clock.taken)
                stepping[name].append(ended - started)

    def middle(above: list[float], below: list[float]) -> float:
        return median(a / b for a, b in zip(above, below, strict=True))

    return {
        **{name: middle(losing[name], stepping[name]) for name in forms},
        "loss_ratio": middle(losing["eager"], losing["one_pass"]),
        "step_ratio": middle(stepping["eager"], stepping["one_pass"]),
    }


def parts(frozen: Frozen, data: tuple[Tensor, Tensor], classes: int, *, rounds: int = 200) -> dict[str, float]:
    """Return medians, in milliseconds, of the parts of `Trainer.update` with a cache and the loss in one pass."""
    trainer = Trainer(OmegaNetwork(frozen.schedule, classes), frozen, data, Settings(cache=CACHE))
    taken: dict[str, list[float]] = {}
    for i in range(WARM_UP + rounds):
        at = time.perf_counter()

        def mark(name: str, i: int = i) -> None:
            nonlocal at
            now = time.perf_counter()
            if i >= WARM_UP:
                taken.setdefault(name, []).append(1e3 * (now - at))
            at = now

        particles = trainer.batches.next()
        mark("batch from the cache")
        omega = trainer.omega(particles.c, particles.s, particles.t)
        mark("network, forward")
        leaf = omega.detach().requires_grad_()
        each = self_consistency_loss(particles, leaf)
        (slope,) = torch.autograd.grad(each.mean(), leaf)
        mark("loss and its gradient to omega")
        trainer.optimizer.zero_grad()
        omega.backward(slope)
        mark("network, backward")
        nn.utils.clip_grad_norm_(trainer.weights, trainer.settings.clip or math.inf)
        mark("clipping")
        trainer.optimizer.step()
        mark("AdamW")
        trainer.average()
        trainer.step += 1
        mark("average")
    return {name: median(times) for name, times in taken.items()}


def denoiser() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return an untrained denoiser of the size of the digits example's; a step takes as long with any weights."""
    label = nn.Embedding(CLASSES + 1, 32)
    frequencies = math.pi / 2 * 2.0 ** torch.arange(4)
    sizes = (PIXELS + 8 + 32, 128, 128, 128)
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
    trunk = nn.Sequential(*layers, nn.Linear(128, PIXELS)).requires_grad_(False)

    def predict(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        phase = t[:, None] * frequencies
        return trunk(torch.cat([x, phase.sin(), phase.cos(), label(c)], 1))

    return predict


def main(argv: list[str]) -> int:
    """Run the command. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    frozen = Frozen(denoiser(), lgd.RectifiedFlow(), null=CLASSES)
    data = 2 * torch.rand(ITEMS, PIXELS) - 1, torch.arange(ITEMS) % CLASSES
    for name, cache in (("predictions in each step", 0), ("cached predictions", CACHE)):
        found = loss_share(frozen, data, CLASSES, cache=cache, rounds=args.rounds)
        print(
            f"{name}: the loss takes {100 * found['eager']:.1f} % of a step in eager PyTorch, "
            f"{100 * found['one_pass']:.1f} % in one pass; loss {found['loss_ratio']:.2f} times, step "
            f"{found['step_ratio']:.2f} times as fast"
        )
    found = parts(frozen, data, CLASSES, rounds=args.rounds)
    for name, milliseconds in found.items():
        print(f"  {name:32} {milliseconds:6.3f} ms  {100 * milliseconds / sum(found.values()):5.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
