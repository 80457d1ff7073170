"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward
from lgd_kernels.runtime.arguments import StepScalars
from lgd_kernels.runtime.levels import (
    Levels,
    StepCoefficients,
    arithmetic_dtype,
    omega_at,
    per_sample,
    step_coefficients,
    sum_samples,
)
from lgd_kernels.runtime.philox import STREAM_STEP, normal


def guided_step(a: GuidedStep) -> Tensor:
    """Compute `a x + b (cond + omega (cond - uncond)) + v z` in float32 (float64 where a tensor is), rounded once."""
    dtype = arithmetic_dtype(a.x, a.cond, a.uncond, a.noise)
    x, c, u = a.x.to(dtype), a.cond.to(dtype), a.uncond.to(dtype)
    w = per_sample(omega_at(a.scalars.omega.given(), x), x)
    to_x, to_guided, to_noise = (per_sample(k.to(dtype), x) for k in _coefficients(a.scalars, dtype))
    x_s = to_x * x + to_guided * (c + w * (c - u))
    noise, seed = a.noise, a.seed.given()
    if noise is None and seed is not None:
        noise = normal(x.shape, seed, STREAM_STEP, a.seed.first_sample, x.device)
    if noise is not None:
        x_s = x_s + to_noise * noise.to(dtype)
    return x_s.to(a.x.dtype).contiguous()


def guided_step_backward(b: GuidedStepBackward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients to x, cond, uncond, noise and, if cond and uncond are given, omega `[B]`, unrounded."""
    dtype = arithmetic_dtype(b.upstream, b.cond, b.uncond)
    d = b.upstream.to(dtype)
    w = per_sample(omega_at(b.scalars.omega.given(), d), d)
    to_x, to_guided, to_noise = (per_sample(k.to(dtype), d) for k in _coefficients(b.scalars, dtype))
    d_omega = None
    if b.cond is not None and b.uncond is not None:
        d_omega = sum_samples(to_guided * d * (b.cond.to(dtype) - b.uncond.to(dtype)))
    return to_x * d, to_guided * (1 + w) * d, -to_guided * w * d, to_noise * d, d_omega


def _coefficients(scalars: StepScalars, dtype: torch.dtype) -> StepCoefficients:
    """Compute the coefficients in the precision of the levels, or in that of the data where it is higher."""
    _, levels, prediction, churn = scalars.given()
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=dtype))
    return step_coefficients(Levels(*(level.to(wide) for level in levels)), prediction, churn)
