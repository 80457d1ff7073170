"""Weights of guidance that are no rule: an omega for the plain formula, and coefficients for `combine`."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.guidance.rules import PerSample
from lgd_kernels.runtime.levels import Levels, step_coefficients


def cfg_plus_plus(levels: Levels, lam: PerSample, churn: PerSample = 0.0) -> Tensor:
    """Compute the omega `[B]` with which plain guidance is CFG++: `lam signal_s / B - 1`, B the step's factor of x0.

    CFG++ renoises with u instead of with the guided prediction. In a DDIM step that is an omega that depends on the
    times; it is 0 at s = t, where no prediction has a weight. Chung et al., arXiv 2406.08070; lam in [0, 1] is theirs.
    """
    factor, stays = step_coefficients(levels, "x0", churn).guided, levels.gap == 0
    return torch.where(stays, 0.0, lam * levels.signal_s / torch.where(stays, 1.0, factor) - 1)


def composable(weights: Tensor) -> Tensor:
    """Return the coefficients `[B, 1 + n]` of `u + sum_i w_i (c_i - u)` for weights `[B, n]`: for

        combine((u, c_1, ..., c_n), composable(weights), columns=(0, (1, 0), ..., (n, 0)))

    Liu et al., arXiv 2206.01714. With n = 1, w = 1 + omega."""
    return torch.cat((torch.ones_like(weights[:, :1]), weights), 1)


def perturbed(omega: Tensor, scale: Tensor) -> Tensor:
    """Return the coefficients `[B, 3]` of `c + omega (c - u) + scale (c - p)`, p a perturbed prediction (PAG, arXiv
    2403.17377; SEG, 2408.00760; SLG): for

        combine((c, u, p), perturbed(omega, scale), columns=(0, (0, 1), (0, 2)))

    diffusers' guidance_scale is 1 + omega; without u (guidance_scale 1) it gives c + (scale - 1)(c - p).
    """
    return torch.stack((torch.ones_like(omega), omega, scale), 1)
