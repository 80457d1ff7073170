"""Convert the sigmas of a ComfyUI sampler to times of a schedule.

In ComfyUI x = (1 - sigma) x0 + sigma z for a flow model, and x = x0 + sigma z, up to a factor, for any other. So sigma
is the ratio of noise to signal, except in a flow model, where it is the time of `RectifiedFlow` itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule, VPCosine, VPLinear

FLOWS = ("CONST", "COSMOS_RFLOW")  # ComfyUI's classes of a flow; with the second, x is divided by 1 - t
MOST = 1e4  # stands for the infinite ratio of a table that ends without signal; ComfyUI has 4519 there


def times(schedule: Schedule, sigma: Tensor, sampling: Any = None) -> Tensor:
    """Return the times of a schedule at sigmas `[B]` of a model with this `model_sampling`, in the dtype of sigma.

        EDM             sigma
        RectifiedFlow   sigma; sigma / (1 + sigma) for a COSMOS_RFLOW model
        VPCosine        atan(sigma) 2 / pi
        VPLinear        where the integral of beta is log(1 + sigma^2)
        Discrete        int64: the step whose log(noise / signal) is the nearest to log(sigma), -1 for sigma = 0

    Never a device sync. Times beyond the schedule's last count as the last.

    >>> import torch, lgd_kernels as lgd
    >>> times(lgd.VPCosine(), torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.5000])
    >>> times(lgd.Discrete(torch.tensor([0.9, 0.5, 0.1])), torch.tensor([0.0, 0.3, 1.1, 3.0]))
    tensor([-1,  0,  1,  2])
    """
    if isinstance(schedule, EDM):
        return sigma
    if isinstance(schedule, RectifiedFlow):
        return (sigma / (1 + sigma) if "COSMOS_RFLOW" in _names(sampling) else sigma).clamp(0, 1)
    if isinstance(schedule, VPCosine):
        return torch.atan(sigma) * (2 / math.pi)
    if isinstance(schedule, VPLinear):
        return _linear(schedule, torch.log1p(sigma * sigma)).clamp(0, 1)
    if isinstance(schedule, Discrete):
        nearest = (_logs(schedule, sigma.device) - sigma.clamp(min=1e-30).log().unsqueeze(-1)).abs().argmin(-1)
        return torch.where(sigma > 0, nearest, -1)
    raise TypeError(f"LearnedGuidance: `schedule` is a {type(schedule).__name__}, expected one of lgd_kernels")


def check_family(schedule: Schedule, sampling: Any) -> None:
    """Raise ValueError for a flow's schedule on another model, and the other way round; nothing for a model of which
    ComfyUI's classes do not tell what it is."""
    names = _names(sampling)
    flow = bool(names.intersection(FLOWS))
    if (flow or "EPS" in names) and flow != isinstance(schedule, RectifiedFlow):
        made = ", ".join(base.__name__ for base in type(sampling).__bases__)
        kind = "a flow model" if flow else "no flow model"
        raise ValueError(
            f"LearnedGuidance: omega's times are those of {schedule}, but this is {kind} ({made}); choose a file that "
            f"was learned for {'RectifiedFlow()' if flow else 'EDM, VPLinear, VPCosine or Discrete'}"
        )


def _names(sampling: Any) -> set[str]:
    """Return the names of the classes of a model_sampling; ComfyUI makes its class from two of its own."""
    return {one.__name__ for one in type(sampling).__mro__}


@functools.lru_cache(maxsize=8)
def _logs(schedule: Discrete, device: torch.device) -> Tensor:
    """Compute log(noise / signal) of each step, `[N]`, rounded as ComfyUI rounds it: half way between two steps, where
    its schedulers "normal" and "sgm_uniform" place sigmas, both then choose the same step."""
    alphas = schedule.alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt().clamp(max=MOST).log().float().to(device)


def _linear(schedule: VPLinear, integral: Tensor) -> Tensor:
    """Return t at which the integral of beta from 0 to t has this value, without cancellation near 0."""
    low, high = schedule.beta_min, schedule.beta_max
    if not schedule.scaled:  # low t + (high - low) t^2 / 2
        return 2 * integral / (low + torch.sqrt(low**2 + 2 * (high - low) * integral))
    low, rise = math.sqrt(low), math.sqrt(high) - math.sqrt(low)  # ((low + rise t)^3 - low^3) / (3 rise)
    reached = (low**3 + 3 * rise * integral) ** (1 / 3)
    return 3 * integral / (reached**2 + reached * low + low**2)
