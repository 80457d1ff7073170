"""Define formulas of omega(t) with one to three numbers: to set by hand, or to learn from little data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lgd_kernels.omega.common import in_order
from lgd_kernels.omega.floor import above_zero


class Constant(nn.Module):
    """Give every condition and step one weight: plain classifier-free guidance, `w = 1 + omega`.

    Args:
        omega: the weight, learned as `Constant.omega`. Values below 0 count as 0.

    >>> import torch
    >>> Constant(0.5)(None, torch.tensor([0.0, 0.2]), torch.tensor([0.1, 1.0]))
    tensor([0.5000, 0.5000], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = _number("Constant", "omega", omega)

    def forward(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Return omega `[B]` for s and t `[B]`, s <= t; c has no effect."""
        in_order("Constant", s, t)
        return above_zero(self.omega).expand(t.shape)


class Interval(nn.Module):
    """Give one weight on a limited interval of t: `omega` for low < t <= high, 0 outside.

    low and high are **times of the schedule**, as s and t are: `schedule.from_unit(torch.tensor(0.8))` is the time for
    80 % noise. The interval is of t, where a step starts, as in `rules.interval`; t = high is inside.

    Args:
        omega: the weight, learned as `Interval.omega`. Values below 0 count as 0.
        low, high: the ends. They are buffers: the weight jumps there, so they have no gradient;
            `lgd_kernels.learn.fit.fit_interval` searches for them.

    Source: Kynkäänniemi et al., arXiv 2404.07724.

    >>> import torch
    >>> Interval(2.0, 0.2, 0.8)(None, torch.zeros(3), torch.tensor([0.2, 0.8, 0.9])).detach()
    tensor([0., 2., 0.])
    """

    low: Tensor
    high: Tensor

    def __init__(self, omega: float, low: float, high: float) -> None:
        super().__init__()
        low, high = (_float("Interval", name, one) for name, one in (("low", low), ("high", high)))
        if not low <= high:
            raise ValueError(f"Interval: low = {low} and high = {high}, expected low <= high, times of the schedule")
        self.omega = _number("Interval", "omega", omega)
        self.register_buffer("low", torch.tensor(low, dtype=torch.float64))  # a time, compared exactly
        self.register_buffer("high", torch.tensor(high, dtype=torch.float64))

    def forward(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Return omega `[B]` for s and t `[B]`, s <= t; c has no effect."""
        in_order("Interval", s, t)
        inside = (t > self.low.to(t.dtype)) & (t <= self.high.to(t.dtype))
        return torch.where(inside, above_zero(self.omega), torch.zeros_like(self.omega))


class ClampLinear(nn.Module):
    """Give a weight that is linear in t, clamped at 0: `max(0, intercept + slope t)`, t a time of the schedule.

    Wang et al., arXiv 2404.13040, write their clamped linear schedule `w_t = max(c, 2 w (1 - t))`, with w = 1 + omega
    and t from 1 at the noise to 0 at the data. With c = 1, so that the weight is never negative, it is
    `ClampLinear(2 w - 1, -2 w)`. Two free numbers, so that the weight may also fall towards the data, are ours.

    Args:
        intercept, slope: learned as parameters. Where the clamp holds, only gradients that raise the weight pass.

    >>> import torch
    >>> ClampLinear(1.0, -2.0)(None, torch.zeros(3), torch.tensor([0.0, 0.25, 1.0])).detach()
    tensor([1.0000, 0.5000, 0.0000])
    """

    def __init__(self, intercept: float, slope: float) -> None:
        super().__init__()
        self.intercept = _number("ClampLinear", "intercept", intercept)
        self.slope = _number("ClampLinear", "slope", slope)

    def forward(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Return omega `[B]` for s and t `[B]`, s <= t; c has no effect."""
        in_order("ClampLinear", s, t)
        return above_zero(self.intercept + self.slope * t.to(self.slope.dtype))


def _number(form: str, name: str, value: float) -> nn.Parameter:
    number = _float(form, name, value)
    if not math.isfinite(number):
        raise ValueError(f"{form}: {name} is {number}, expected a finite number")
    return nn.Parameter(torch.tensor(number))


def _float(form: str, name: str, value: float) -> float:
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{form}: {name} is a {type(value).__name__}, expected a number")
    return float(value)
