"""A small class-conditional denoiser, trained on the noisy captions, with dropped labels for the null condition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.data import CLASSES, PIXELS
from lgd_kernels.runtime.progress import Track, silent
from lgd_kernels.sampling.schedules import Schedule

NULL = CLASSES  # the index of the null condition
Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, u, c) -> cond, uncond


class Denoiser(nn.Module):
    """MLP from (x_t, t, c) to an estimate of x0: a 3-layer trunk, of width 128 for digits, and a linear head."""

    def __init__(self, width: int = 128, embedding: int = 32, classes: int = CLASSES, dim: int = PIXELS) -> None:
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
        """x [N, D] at unit times u [N] (0 data, 1 noise), labels c [N] -> x0 [N, D]."""
        phase = u[:, None] * self.frequencies  # [N, 4]
        return self.trunk(torch.cat([x, phase.sin(), phase.cos(), self.condition(c)], 1))


def train_denoiser(
    x0: Tensor,
    captions: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    steps: int = 3000,
    batch: int = 256,
    lr: float = 2e-3,
    label_dropout: float = 0.15,
    net: Denoiser | None = None,
    track: Track = silent,
) -> Denoiser:
    """Denoising least squares over uniform unit times, cosine learning rate. Returns the network frozen."""
    net = net or Denoiser()
    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 100) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    for _ in track(range(steps), "denoiser"):
        item = torch.randint(0, len(x0), (batch,), generator=generator)
        u = torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < label_dropout
        c = captions[item].masked_fill(dropped, net.null)
        z = torch.randn(batch, x0.shape[1], generator=generator)
        signal, noise = (level[:, None] for level in schedule.signal_noise(schedule.from_unit(u)))
        error = (net(signal * x0[item] + noise * z, u, c) - x0[item]).square().mean(1)
        loss = (error / (u.square() + 0.05).sqrt()).mean()  # the error falls with u: this evens it out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.requires_grad_(False).eval()
