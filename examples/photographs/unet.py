"""Define a small class-conditional U-Net for images of 32 x 32, which works on squares of 4 x 4 pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING = 64
SQUARE = 4


class Block(nn.Module):
    """Apply two convolutions with a skip; time and class scale and shift the values between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)])
        self.modulation = nn.Linear(EMBEDDING, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Return x [N, outputs, H, W] for an embedding of time and class [N, 64]."""
        scale, shift = self.modulation(known)[:, :, None, None].chunk(2, 1)
        hidden = self.first(functional.silu(self.norms[0](x)))
        return self.skip(x) + self.second(functional.silu(self.norms[1](hidden) * (1 + scale) + shift))


class UNet(nn.Module):
    """Predict the flow z - x0, shaped like x. The last label means none."""

    frequencies: Tensor

    def __init__(self, labels: int, width: int = 48) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(8))
        self.time = nn.Sequential(nn.Linear(16, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label = nn.Embedding(labels, EMBEDDING)
        pixels = 3 * SQUARE * SQUARE
        self.enter, self.leave = nn.Conv2d(pixels, width, 3, padding=1), nn.Conv2d(width, pixels, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width), Block(width, 2 * width)])
        self.middle = Block(2 * width, 2 * width)
        self.up = nn.ModuleList([Block(4 * width, 2 * width), Block(3 * width, width)])
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Return the flow for x [N, 3, 32, 32] at unit times t [N] with labels c [N]."""
        phase = t[:, None] * self.frequencies
        known = functional.silu(self.time(torch.cat((phase.sin(), phase.cos()), 1)) + self.label(c))
        hidden = self.enter(functional.pixel_unshuffle(x, SQUARE))  # 8 x 8
        kept = []
        for block in self.down:
            hidden = block(hidden, known)
            kept.append(hidden)
            hidden = functional.avg_pool2d(hidden, 2)  # 4 and 2
        hidden = self.middle(hidden, known)
        for block in self.up:
            hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = block(torch.cat((hidden, kept.pop()), 1), known)
        return functional.pixel_shuffle(self.leave(hidden), SQUARE)
