"""Convert DDIM's eta to churn."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.runtime.shown import brief


def churn_from_eta(eta: float | Tensor, levels: Levels) -> Tensor:
    """Compute the churn with which a step adds the noise of DDIM's eta, as diffusers defines it.

        r     = (signal_t / signal_s) (noise_s / noise_t),  h = sqrt(1 - eta^2 (1 - r^2))
        churn = eta sqrt((1 + r) / (1 + h))                 # churn^2 = (1 - h) / (1 - r), without its cancellation

    The step then adds `eta noise_s sqrt(1 - r^2) z`, sigma(eta) of DDIM. At eta = 1 it is the step of the ancestral
    Euler sampler. Between 0 and 1, eta and churn differ.

    Args:
        eta: in [0, 1], a float or `[B]` of any float dtype.
        levels: `schedule.levels(t, s)`; every sample may have its own times.

    Returns churn `[B]`, in the dtype of the levels: exactly 0 where eta is 0 and exactly 1 where eta is 1. With churn
    as a tensor, `guided_step` requires `noise` or `seed`, even if all of churn is 0.

    The ops take churn as a constant: no gradient flows to eta. Raises TypeError or ValueError, naming the argument; an
    eta outside [0, 1] that is not readable without a device sync gives NaN in the step.

    Source: arXiv 2010.02502, Eq. 16; the conversion is ours.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.25]))
    >>> lgd.churn_from_eta(0.5, levels)
    tensor([0.4209, 0.3660])
    """
    gap = getattr(levels, "gap", None)
    if isinstance(levels, Levels) and (not isinstance(gap, Tensor) or gap.ndim != 1):
        raise ValueError(
            f"churn_from_eta: `levels.gap` is {brief(gap)}, expected a tensor [B]; schedule.levels(t, s) makes levels"
        )
    checks.levels("churn_from_eta", levels, "x0", "levels.gap", gap)
    checks.unit("churn_from_eta", "eta", eta, "levels.gap", gap)
    eta = eta.to(gap.dtype) if isinstance(eta, Tensor) else eta
    stays = gap == 0  # 0/0 at s = t = 0 and at s = t = 1
    r = 1 - gap / torch.where(stays, 1, levels.signal_s * levels.noise_t)
    h = torch.sqrt((1 - eta) * (1 + eta) + (eta * r) ** 2)  # is r to the last bit at eta = 1
    return eta * torch.sqrt((1 + r) / (1 + h))
