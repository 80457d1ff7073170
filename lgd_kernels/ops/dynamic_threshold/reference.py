"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.dynamic_threshold.structs import DynamicThreshold, position
from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples


def dynamic_threshold(a: DynamicThreshold) -> Tensor:
    """Compute `clip(x0, -s, s) / s` in float32 (float64 where x0 is), rounded once to the dtype of x0."""
    wide = a.x0.to(arithmetic_dtype(a.x0))
    if not wide.numel():
        return a.x0.clone()
    low, high = order_statistics(wide, a.quantile)
    s = per_sample(_quantile(low, high, a.position()[1]).clamp(1, a.max_value), wide)
    over = wide.abs() > s
    kept = torch.where(over, 0.0, wide) / s  # not torch.clamp: an element over s needs no derivative to s that cancels
    return torch.where(over, torch.sign(wide), kept).to(a.x0.dtype).contiguous()


def order_statistics(x0: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return the two elements of |x0|, sorted, that the quantile lies between, `[B]` each; NaN where x0 has one."""
    size = x0.reshape(x0.shape[0], -1).abs()
    rank, weight = position(quantile, size.shape[1])
    low = _statistic(size, rank)
    return low, _statistic(size, rank + 1) if weight > 0 else low


def dynamic_threshold_backward(upstream: Tensor, a: DynamicThreshold, low: Tensor, high: Tensor) -> Tensor:
    """Compute the gradient to x0, in the arithmetic dtype. With `in` the elements of which |x0| <= s:

        d_x0 = in upstream / s + sign(x0) (share(low) (1 - weight) + share(high) weight) d_s
        d_s = -sum over in of upstream x0 / s^2, where the quantile itself is s, neither 1 nor max_value

    share(v) is 1 / n for the n elements with |x0| = v, and 0 for all others.
    """
    dtype = arithmetic_dtype(upstream, a.x0)
    g, x, weight = upstream.to(dtype), a.x0.to(dtype), a.position()[1]
    low, high = low.to(dtype), high.to(dtype)
    size, between = x.abs(), _quantile(low, high, weight)
    s = per_sample(between.clamp(1, a.max_value), x)
    inside = torch.where(size <= s, g / s, 0.0)
    free = (between >= 1) & (between <= a.max_value)
    to_s = torch.where(free, -sum_samples(inside * torch.where(size <= s, x, 0.0) / s), 0.0)
    shares = _share(size, low) * per_sample((1 - weight) * to_s, x) + _share(size, high) * per_sample(weight * to_s, x)
    return inside + torch.sign(x) * shares


def _share(size: Tensor, value: Tensor) -> Tensor:
    """Return 1 / n at the n elements of a sample that have the value, and 0 elsewhere."""
    at = (size == per_sample(value, size)).to(size.dtype)
    return at / per_sample(sum_samples(at).clamp(min=1), size)


def _quantile(low: Tensor, high: Tensor, weight: float) -> Tensor:
    return torch.where(high == low, low, low + weight * (high - low))  # equal infinities, too


def _statistic(size: Tensor, rank: int) -> Tensor:
    """Return the element of this rank in each row. All elements of the same size share its gradient evenly."""
    with torch.no_grad():
        value = size.kthvalue(rank + 1, 1).values
        at = (size == value[:, None]) & value.isfinite()[:, None]
        count = at.sum(1).clamp(min=1)
        missing = size.isnan().any(1)
    own = torch.where(at, size - value[:, None], 0.0).sum(1) / count  # 0, with a gradient
    return torch.where(missing, torch.nan, value + own)
