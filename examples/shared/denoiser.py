"""Define a small class-conditional denoiser, and train it with dropped labels for the null condition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lgd_kernels.runtime.progress import Track, silent
from lgd_kernels.sampling.schedules import Schedule

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, u, c) -> cond, uncond


class Denoiser(nn.Module):
    """Estimate x0 from (x_t, t, c) with an MLP: a trunk of three layers and a linear head."""

    frequencies: Tensor

    def __init__(self, classes: int, dim: int, width: int = 128, embedding: int = 32) -> None:
        super().__init__()
        self.null = classes  # the index of the null condition
        self.condition = nn.Embedding(classes + 1, embedding)
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(4))
        layers: list[nn.Module] = []
        inputs = dim + 8 + embedding
        for _ in range(3):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
            inputs = width
        self.trunk = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, u: Tensor, c: Tensor) -> Tensor:
        """Return x0 [N, D] for x [N, D] at unit times u [N] (0 data, 1 noise) with labels c [N]."""
        phase = u[:, None] * self.frequencies  # [N, 4]
        return self.trunk(torch.cat([x, phase.sin(), phase.cos(), self.condition(c)], 1))


def train_denoiser(
    net: Denoiser,
    x0: Tensor,
    labels: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    steps: int = 3000,
    batch: int = 256,
    lr: float = 2e-3,
    label_dropout: float = 0.15,
    track: Track = silent,
) -> Denoiser:
    """Train the network on data x0 [N, D] with labels [N], and return it frozen.

    The loss is the squared error of x0 over uniform unit times; the learning rate falls as a cosine.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 100) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    for _ in track(range(steps), "denoiser"):
        item = torch.randint(0, len(x0), (batch,), generator=generator)
        u = torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < label_dropout
        c = labels[item].masked_fill(dropped, net.null)
        z = torch.randn(batch, x0.shape[1], generator=generator)
        signal, noise = (level[:, None] for level in schedule.signal_noise(schedule.from_unit(u)))
        error = (net(signal * x0[item] + noise * z, u, c) - x0[item]).square().mean(1)
        loss = (error / (u.square() + 0.05).sqrt()).mean()  # the error grows with u: the weight levels it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.requires_grad_(False).eval()
