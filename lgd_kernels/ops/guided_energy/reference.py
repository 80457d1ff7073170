"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.statistics import Statistics
from lgd_kernels.ops.guided_energy.structs import EnergyCall, GuidedEnergy, GuidedEnergyBackward
from lgd_kernels.runtime.arguments import StepScalars
from lgd_kernels.runtime.levels import (
    Levels,
    StepCoefficients,
    arithmetic_dtype,
    omega_at,
    per_sample,
    step_coefficients,
)
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS, normal


def guided_energy(a: EnergyCall) -> Tensor:
    """Compute `mean_jk ||x_s^j - y^k||^beta - lam / 2 mean_{j != l} ||x_s^j - x_s^l||^beta`, each `[B]`."""
    beta, lam, unbiased = a.options
    x_s, _, y, variance = particles(a.forward)
    attraction = powered(squared_distances(x_s, y), beta).mean((1, 2)) + variance  # [B]
    if lam == 0:
        return attraction
    m = x_s.shape[1]
    pairs = m * (m - 1) if unbiased else m * m  # the diagonal adds nothing to the sum
    return attraction - lam / 2 * powered(squared_distances(x_s, x_s), beta).sum((1, 2)) / pairs


def statistics(a: GuidedEnergy) -> Statistics:
    """Compute how distances depend on omega, around the one given: products of x_s - y and of G, `[B, ...]` float64."""
    x_s, slope, y, _ = particles(a)
    m = x_s.shape[1]
    first, second = torch.triu_indices(m, m, 1, device=x_s.device)
    squares, products = [], []
    for j in range(m):  # one particle at a time: [B, k, D] is as large as it gets
        apart = x_s[:, j : j + 1] - y
        squares.append(apart.square().sum(-1))
        products.append((apart * slope[:, j][:, None]).sum(-1))
    apart, turn = x_s[:, first] - x_s[:, second], slope[:, first] - slope[:, second]
    return Statistics(
        torch.stack(squares, 1).double(),
        torch.stack(products, 1).double(),
        slope.square().sum(-1).double(),
        apart.square().sum(-1).double(),
        (apart * turn).sum(-1).double(),
        turn.square().sum(-1).double(),
    )


def guided_energy_backward(b: GuidedEnergyBackward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to x, cond, uncond, noise and the target (to x0, where targets are made from it),
    unrounded, from the weights of the pairs."""
    x_s, _, y, _ = particles(b.forward)
    m, k = x_s.shape[1], y.shape[1]
    first, second = torch.triu_indices(m, m, 1, device=x_s.device)
    towards, between = b.to_targets.to(x_s.dtype), b.to_particles.to(x_s.dtype)
    pulls = [(towards[:, j, :, None] * (x_s[:, j : j + 1] - y)).sum(1) for j in range(m)]  # one particle at a time
    apart = between[..., None] * (x_s[:, first] - x_s[:, second])
    pull = torch.stack(pulls, 1).index_add(1, first, apart).index_add(1, second, -apart)
    d_y = torch.stack([(towards[:, :, i, None] * (y[:, i : i + 1] - x_s)).sum(1) for i in range(k)], 1)
    scalars = b.forward.scalars
    to_x, to_guided, to_noise = (per_sample(one.to(x_s.dtype), x_s) for one in _coefficients(scalars, x_s.dtype))
    w = per_sample(omega_at(scalars.omega.given(), x_s), x_s)
    if b.forward.target.kind != "tensor":
        d_y = (per_sample(Levels(*scalars.levels).signal_s.to(x_s.dtype), x_s) * d_y).sum(1)
    return to_x * pull, to_guided * (1 + w) * pull, -to_guided * w * pull, to_noise * pull, d_y


def particles(a: GuidedEnergy) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Compute the guided particles `[B, m, D]`, their slope d x_s / d omega, the targets `[B, k, D]`, and the variance
    of targets that are integrated out (else 0). All in float32, or float64 where a tensor is."""
    dtype = arithmetic_dtype(*a.data)
    batch, m, elements = *a.x.shape[:2], math.prod(a.x.shape[2:])  # -1 would not do for an empty batch
    x, cond, uncond = (one.reshape(batch, m, elements).to(dtype) for one in (a.x, a.cond, a.uncond))
    to_x, to_guided, to_noise = (per_sample(one.to(dtype), x) for one in _coefficients(a.scalars, dtype))
    w = per_sample(omega_at(a.scalars.omega.given(), x), x)
    slope = to_guided * (cond - uncond)
    x_s = to_x * x + to_guided * cond + w * slope
    noise, seed = a.noise, a.seed.given()
    if noise is None and seed is not None:
        noise = normal((batch * m, *a.x.shape[2:]), seed, STREAM_STEP, a.seed.first_sample * m, x.device, m)
    if noise is not None:
        x_s = x_s + to_noise * noise.reshape(batch, m, elements).to(dtype)
    data, kind, k, target_seed = a.target
    if kind == "tensor":
        return x_s, slope, data.reshape(batch, k, elements).to(dtype), 0.0
    levels, seed = Levels(*a.scalars.levels), target_seed.given()
    signal, noise_s = (per_sample(level.to(dtype), x) for level in (levels.signal_s, levels.noise_s))
    y = signal * data.reshape(batch, 1, elements).to(dtype)
    if seed is None:  # integrated out
        return x_s, slope, y, noise_s[:, 0, 0] ** 2 * y.shape[-1]
    z = normal((batch * k, *data.shape[1:]), seed, STREAM_TARGETS, target_seed.first_sample * k, x.device, k)
    return x_s, slope, y + noise_s * z.reshape(batch, k, elements).to(dtype), 0.0


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute ||x_j - y_k||^2 from differences, `[B, m, k]` of `[B, m, D]` and `[B, k, D]`."""
    return torch.stack([(x[:, j : j + 1] - y).square().sum(-1) for j in range(x.shape[1])], 1)


def powered(squared: Tensor, beta: float) -> Tensor:
    """Compute ||.||^beta from the square; for beta < 2 constant to autograd, however often, where points coincide."""
    if beta == 2:
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).pow(beta / 2), 0 * squared)  # NaN stays NaN


def _coefficients(scalars: StepScalars, dtype: torch.dtype) -> StepCoefficients:
    """Compute the coefficients in the precision of the levels, or in that of the data where it is higher."""
    _, levels, prediction, churn = scalars.given()
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=dtype))
    return step_coefficients(Levels(*(level.to(wide) for level in levels)), prediction, churn)
