"""Data and models for `python -m lgd_kernels learn`: those of the study. docs/learning.md has the command and what it
prints."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.mixture.plane import CLASSES, pinwheel
from examples.mixture.seed import undecided
from examples.shared.denoiser import Denoiser, train_denoiser
from lgd_kernels.sampling.schedules import RectifiedFlow


def pairs(seed: str) -> tuple[Tensor, Tensor]:
    """Return 4096 points [N, 2] and their labels [N]."""
    generator = torch.Generator().manual_seed(int(seed))
    c = torch.randint(0, CLASSES, (4096,), generator=generator)
    return pinwheel().sample(c, generator), c


def trained(steps: str) -> Denoiser:
    """Return the network of the study after so many steps on `pairs("0")`."""
    torch.manual_seed(0)  # initial weights
    generator = torch.Generator().manual_seed(4)
    return train_denoiser(undecided(64), *pairs("0"), RectifiedFlow(), generator, steps=int(steps), batch=128)
