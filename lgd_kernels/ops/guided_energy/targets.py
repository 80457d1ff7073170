"""Targets that are no tensor but follow from the data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lgd_kernels.runtime.shown import brief, kind


class Renoise(NamedTuple):
    """Targets `signal_s x0 + noise_s z`, k of them for each item, made in the kernel and never stored.

    x0 is `[B, ...]`. The noise is `philox_normal((B * particles, ...), seed, stream=2)`, and for a seed `[B]` of each
    item's own `philox_normal((particles, ...), seed[b], stream=2)`. The step's noise is another stream, so one seed
    serves both.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.Renoise(torch.zeros(2, 3), particles=4, seed=7).particles
    4
    """

    x0: Tensor
    particles: int
    seed: int | Tensor

    def __repr__(self) -> str:
        return f"Renoise(x0 {list(self.x0.shape)} {kind(self.x0)}, particles={self.particles}, seed={brief(self.seed)})"


class Expected(NamedTuple):
    """Targets integrated out, for beta = 2 and lam = 0: E ||x_s - y||^2 = ||x_s - signal_s x0||^2 + noise_s^2 D.

    x0 is `[B, ...]`, D its number of elements.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.Expected(torch.zeros(2, 3)).x0.shape
    torch.Size([2, 3])
    """

    x0: Tensor

    def __repr__(self) -> str:
        return f"Expected(x0 {list(self.x0.shape)} {kind(self.x0)})"
