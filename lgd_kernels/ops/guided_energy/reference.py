"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.statistics import Statistics
from lgd_kernels.ops.guided_energy.targets import Expected, Renoise
from lgd_kernels.runtime.levels import (
    Levels,
    OmegaLookup,
    arithmetic_dtype,
    omega_at,
    per_sample,
    step_coefficients,
)
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS, normal


def guided_energy(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    prediction: str = "x0",
    churn: float | Tensor = 0.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    beta: float = 1.75,
    lam: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """`mean_jk ||x_s^j - y^k||^beta - lam / 2 mean_{j != l} ||x_s^j - x_s^l||^beta`, each `[B]`."""
    x_s, _, y, variance = particles(
        x, cond, uncond, omega, levels, target, prediction, churn, noise, seed, first_sample
    )
    attraction = powered(squared_distances(x_s, y), beta).mean((1, 2)) + variance  # [B]
    if lam == 0:
        return attraction
    m = x.shape[1]
    pairs = m * (m - 1) if unbiased else m * m  # the diagonal adds nothing to the sum
    return attraction - lam / 2 * powered(squared_distances(x_s, x_s), beta).sum((1, 2)) / pairs


def statistics(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
) -> Statistics:
    """How distances depend on omega, around the one given: products of x_s - y and of G, `[B, ...]` in float64."""
    x_s, slope, y, _ = particles(x, cond, uncond, omega, levels, target, prediction, churn, noise, seed, first_sample)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    found = [[], []]
    for j in range(x.shape[1]):  # one particle at a time: [B, k, D] is as large as it gets
        apart, along = x_s[:, j : j + 1] - y, slope[:, j]
        found[0].append(apart.square().sum(-1))
        found[1].append((apart * along[:, None]).sum(-1))
    apart, turn = x_s[:, first] - x_s[:, second], slope[:, first] - slope[:, second]
    return Statistics(
        *(torch.stack(products, 1).double() for products in found),
        slope.square().sum(-1).double(),
        apart.square().sum(-1).double(),
        (apart * turn).sum(-1).double(),
        turn.square().sum(-1).double(),
    )


def guided_energy_backward(
    to_targets: Tensor,
    to_particles: Tensor,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, cond, uncond, noise and the target (to x0, where targets are made from it), unrounded, from the
    weights of the pairs."""
    x_s, _, y, _ = particles(x, cond, uncond, omega, levels, target, prediction, churn, noise, seed, first_sample)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    towards, between = to_targets.to(x_s.dtype), to_particles.to(x_s.dtype)
    pull = torch.stack([  # from differences, one particle at a time
        (towards[:, j, :, None] * (x_s[:, j : j + 1] - y)).sum(1) for j in range(x.shape[1])
    ], 1)  # fmt: skip
    apart = between[..., None] * (x_s[:, first] - x_s[:, second])
    pull = pull.index_add(1, first, apart).index_add(1, second, -apart)
    d_y = torch.stack([
        (towards[:, :, k, None] * (y[:, k : k + 1] - x_s)).sum(1) for k in range(y.shape[1])
    ], 1)  # fmt: skip
    a, b, v = (per_sample(k.to(x_s.dtype), x_s) for k in _coefficients(levels, prediction, churn, x_s))
    w = per_sample(omega_at(omega, x_s), x_s)
    if isinstance(target, (Renoise, Expected)):
        d_y = (per_sample(levels.signal_s.to(x_s.dtype), x_s) * d_y).sum(1)
    return a * pull, b * (1 + w) * pull, -b * w * pull, v * pull, d_y


def particles(
    x, cond, uncond, omega, levels, target, prediction, churn, noise, seed, first_sample
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Guided particles `[B, m, D]`, their slope d x_s / d omega, the targets `[B, k, D]`, and the variance of targets
    that are integrated out (else 0). All in float32, or float64 where a tensor is."""
    data = target.x0 if isinstance(target, (Renoise, Expected)) else target
    dtype = arithmetic_dtype(x, cond, uncond, noise, data)
    batch, m, elements = *x.shape[:2], math.prod(x.shape[2:])  # -1 would not do for an empty batch
    if seed is not None and noise is None and not (isinstance(churn, (int, float)) and churn == 0):
        first = first_sample * m
        noise = normal((batch * m, *x.shape[2:]), seed, STREAM_STEP, first, x.device, m).view(x.shape)
    x, cond, uncond, noise = (
        None if one is None else one.reshape(batch, m, elements).to(dtype) for one in (x, cond, uncond, noise)
    )
    a, b, v = (per_sample(k.to(dtype), x) for k in _coefficients(levels, prediction, churn, x))
    w = per_sample(omega_at(omega, x), x)
    slope = b * (cond - uncond)
    x_s = a * x + b * cond + w * slope
    if noise is not None:
        x_s = x_s + v * noise
    if not isinstance(target, (Renoise, Expected)):
        return x_s, slope, target.reshape(batch, target.shape[1], elements).to(dtype), 0.0
    signal, noise_s = (per_sample(level.to(dtype), x) for level in (levels.signal_s, levels.noise_s))
    y = signal * data.reshape(batch, 1, elements).to(dtype)
    if isinstance(target, Expected):
        return x_s, slope, y, noise_s[:, 0, 0] ** 2 * y.shape[-1]
    shape, first = (batch * target.particles, *data.shape[1:]), first_sample * target.particles
    z = normal(shape, target.seed, STREAM_TARGETS, first, x.device, target.particles)
    return x_s, slope, y + noise_s * z.view(batch, target.particles, elements).to(dtype), 0.0


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_j - y_k||^2 from differences, `[B, m, k]` of `[B, m, D]` and `[B, k, D]`."""
    return torch.stack([(x[:, j : j + 1] - y).square().sum(-1) for j in range(x.shape[1])], 1)


def powered(squared: Tensor, beta: float) -> Tensor:
    """||.||^beta from the square; for beta < 2 constant to autograd, however often, where two points coincide."""
    if beta == 2:
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).pow(beta / 2), 0 * squared)  # NaN stays NaN


def _coefficients(levels: Levels, prediction: str, churn: float | Tensor, like: Tensor):
    """In the levels' own precision, or that of `like` where it is higher."""
    wide = arithmetic_dtype(levels.gap, like)
    return step_coefficients(Levels(*(level.to(wide) for level in levels)), prediction, churn)
