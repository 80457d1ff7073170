"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.runtime.levels import (
    Levels,
    OmegaLookup,
    arithmetic_dtype,
    omega_at,
    per_sample,
    step_coefficients,
    sum_samples,
)
from lgd_kernels.runtime.philox import STREAM_STEP, normal


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
) -> Tensor:
    """`a x + b (cond + omega (cond - uncond)) + v z` in float32 (float64 where a tensor is), rounded once."""
    dtype = arithmetic_dtype(x, cond, uncond, noise)
    x_t, c, u = x.to(dtype), cond.to(dtype), uncond.to(dtype)
    w = per_sample(omega_at(omega, x_t), x_t)
    a, b, v = (per_sample(k.to(dtype), x_t) for k in _coefficients(levels, prediction, churn, dtype))
    x_s = a * x_t + b * (c + w * (c - u))
    if seed is not None and noise is None and not (isinstance(churn, (int, float)) and churn == 0):
        noise = normal(x.shape, seed, STREAM_STEP, first_sample, x.device)
    if noise is not None:
        x_s = x_s + v * noise.to(dtype)
    return x_s.to(x.dtype).contiguous()


def guided_step_backward(
    upstream: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    prediction: str,
    churn: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to x, cond, uncond, noise and, where cond and uncond are given, omega `[B]`, unrounded."""
    dtype = arithmetic_dtype(upstream, cond, uncond)
    d = upstream.to(dtype)
    w = per_sample(omega_at(omega, d), d)
    a, b, v = (per_sample(k.to(dtype), d) for k in _coefficients(levels, prediction, churn, dtype))
    d_omega = None
    if cond is not None:
        d_omega = sum_samples(b * d * (cond.to(dtype) - uncond.to(dtype)))
    return a * d, b * (1 + w) * d, -b * w * d, v * d, d_omega


def _coefficients(levels, prediction, churn, dtype):
    """In the levels' own precision, or the data's where that is higher."""
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=dtype))
    return step_coefficients(Levels(*(level.to(wide) for level in levels)), prediction, churn)
