"""Data and a model for `python -m lgd_kernels learn`: those of the study. docs/learning.md has the command and what it
prints."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.digits.data import CLASSES, PIXELS, Digits, load_digits
from examples.shared.denoiser import Denoiser, train_denoiser
from lgd_kernels.sampling.schedules import RectifiedFlow


def _digits() -> Digits:
    return load_digits("rising", "any", torch.Generator().manual_seed(0))


def images(split: str) -> tuple[Tensor, Tensor]:
    """Return the images [N, 64] and true labels [N] of "train", "validation" or "test"."""
    found = getattr(_digits(), split)
    return found.x, found.c


def trained(steps: str) -> Denoiser:
    """Return the denoiser of seed 0 after so many steps on wrong labels: 3000 in the study, some seconds."""
    torch.manual_seed(0)  # initial weights
    data = _digits()
    generator = torch.Generator().manual_seed(1)
    net = Denoiser(CLASSES, PIXELS)
    return train_denoiser(net, data.train.x, data.captions, RectifiedFlow(), generator, steps=int(steps))
