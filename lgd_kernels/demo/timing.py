"""Which share of a training step the loss takes: as a formula in PyTorch, and in one pass."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels.demo.data import CLASSES
from lgd_kernels.demo.denoiser import Predict
from lgd_kernels.demo.guidance import Batch, draw_batch, loss_of
from lgd_kernels.learn.objective import particle_energy
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.progress import Track, silent
from lgd_kernels.schedules import Schedule

WARM_UP = 5


def loss_as_formula(
    batch: Batch, omega: Tensor, z: Tensor, beta: float = 1.75, lam: float = 1.0, churn: float = 1.0
) -> Tensor:
    """`guidance.loss_of`, with tensors for targets and guided particles; noise z [2, B, m, D] of the step and of the
    targets."""
    signal_s, noise_s = (level[:, None, None] for level in (batch.levels.signal_s, batch.levels.noise_s))
    targets = signal_s * batch.x0[:, None] + noise_s * z[1]
    x_s = lgd.guided_step(
        batch.x_t, batch.cond, batch.uncond, omega, batch.levels, prediction="x0", churn=churn, noise=z[0]
    )
    return particle_energy(x_s, targets, beta, lam)


def loss_share(
    predict: Predict,
    x0: Tensor,
    c: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    rounds: int = 60,
    track: Track = silent,
) -> dict[str, float]:
    """Train a network, one step with each form of the loss in turn, and time both.

    A step is a batch with its predictions, omega, the loss, and the update. The loss is drawing the noise, the guided
    step, the energy, and the gradient down to omega. Medians over the rounds:

        formula, one_pass    the loss's share of a step
        loss_ratio           time of the loss as a formula / in one pass
        step_ratio           the same of whole steps
    """
    losses = {
        "formula": lambda batch, omega: loss_as_formula(
            batch, omega, torch.randn(2, *batch.x_t.shape, generator=generator)
        ),
        "one_pass": loss_of,
    }
    net = OmegaNetwork(schedule, CLASSES)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    losing, stepping = ({name: [] for name in losses} for _ in range(2))
    for i in track(range(WARM_UP + rounds), "share of the loss"):
        for name in sorted(losses, reverse=i % 2 == 1):
            started = time.perf_counter()
            batch = draw_batch(predict, x0, c, schedule, generator)
            omega = net(batch.c, batch.s, batch.t)
            before = time.perf_counter()
            (slope,) = torch.autograd.grad(losses[name](batch, omega).mean(), omega)
            after = time.perf_counter()
            optimizer.zero_grad()
            omega.backward(slope)
            optimizer.step()
            ended = time.perf_counter()
            if i >= WARM_UP:
                losing[name].append(after - before)
                stepping[name].append(ended - started)

    def middle(above: list[float], below: list[float]) -> float:
        return median(a / b for a, b in zip(above, below, strict=True))

    return {
        **{name: middle(losing[name], stepping[name]) for name in losses},
        "loss_ratio": middle(losing["formula"], losing["one_pass"]),
        "step_ratio": middle(stepping["formula"], stepping["one_pass"]),
    }
