"""Which share of a training step the loss takes: in eager PyTorch, and in one pass."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from lgd_kernels.demo.data import CLASSES
from lgd_kernels.learn import Frozen, Particles, Settings, Trainer, particle_energy, self_consistency_loss
from lgd_kernels.levels import per_sample, step_coefficients
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.progress import Track, silent

WARM_UP = 5


def eager_loss(particles: Particles, omega: Tensor, beta: float = 1.75, lam: float = 1.0, churn: float = 1.0) -> Tensor:
    """`self_consistency_loss` as one writes it in PyTorch: noise, targets and guided particles are tensors."""
    p, z = particles, torch.randn(2, *particles.x_t.shape)  # of the step and of the targets
    signal, noise, a, b, v, w = (
        per_sample(one, p.x_t)
        for one in (p.levels.signal_s, p.levels.noise_s, *step_coefficients(p.levels, p.prediction, churn), omega)
    )
    x_s = a * p.x_t + b * (p.cond + w * (p.cond - p.uncond)) + v * z[0]
    return particle_energy(x_s, signal * p.x0[:, None] + noise * z[1], beta, lam)


def loss_share(
    frozen: Frozen, data: tuple[Tensor, Tensor], *, cache: int = 0, rounds: int = 60, track: Track = silent
) -> dict[str, float]:
    """Train a network, one update with each form of the loss in turn, and time both.

    An update is a batch with its predictions (from a cache of so many items, where there is one), omega, the loss, its
    gradient, clipping, AdamW and the average. The loss is drawing the noise, the guided step, the energy, and the
    gradient down to omega. Medians over the rounds:

        eager, one_pass      the loss's share of an update
        loss_ratio           time of the loss in eager PyTorch / in one pass
        step_ratio           the same of whole updates
    """
    forms = {"eager": eager_loss, "one_pass": self_consistency_loss}
    trainer = Trainer(OmegaNetwork(frozen.schedule, CLASSES), frozen, data, Settings(cache=cache))
    taken = 0.0  # by the loss in an update

    def timed(loss):
        def measured(particles: Particles, omega: Tensor) -> Tensor:
            nonlocal taken
            leaf = omega.detach().requires_grad_()
            started = time.perf_counter()
            each = loss(particles, leaf)
            (slope,) = torch.autograd.grad(each.sum(), leaf)
            taken = time.perf_counter() - started
            return each.detach() + slope * (omega - leaf.detach())

        return measured

    losing, stepping = ({name: [] for name in forms} for _ in range(2))
    for i in track(range(WARM_UP + rounds), "share of the loss"):
        for name in sorted(forms, reverse=i % 2 == 1):
            trainer.loss = timed(forms[name])
            started = time.perf_counter()
            trainer.update()
            ended = time.perf_counter()
            if i >= WARM_UP:
                losing[name].append(taken)
                stepping[name].append(ended - started)

    def middle(above: list[float], below: list[float]) -> float:
        return median(a / b for a, b in zip(above, below, strict=True))

    return {
        **{name: middle(losing[name], stepping[name]) for name in forms},
        "loss_ratio": middle(losing["eager"], losing["one_pass"]),
        "step_ratio": middle(stepping["eager"], stepping["one_pass"]),
    }
