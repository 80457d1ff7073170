"""Compute A, B and V of the steps in rl.py, for `step_with_log_prob(coefficients=...)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.runtime.levels import Levels, StepCoefficients, x0_coefficients


def sde_coefficients(t: Tensor, s: Tensor, noise_level: float, second: Tensor) -> tuple[StepCoefficients, Tensor]:
    """Compute A, B and V of Flow-GRPO's "sde", and its s_t, from sigmas `[B]` in float64; `second` is that of the
    schedule after 1.

    >>> import torch
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> sde_coefficients(0.5 * one, 0 * one, 0.7, one)[0].guided  # -(1 + 0.49 / 2) / 2
    tensor([-0.6225], dtype=torch.float64)
    """
    rate = noise_level**2 / (1 - torch.where(t == 1, second, t))  # s_t^2 / t
    dt = s - t
    spread = torch.sqrt(rate * t)
    coefficients = StepCoefficients(1 + rate / 2 * dt, (1 + rate / 2 * (1 - t)) * dt, spread * torch.sqrt(-dt))
    return coefficients, spread


def cps_coefficients(t: Tensor, s: Tensor, noise_level: float) -> StepCoefficients:
    """Compute A, B and V of Flow-CPS from sigmas `[B]` in float64; `step_with_log_prob(h=cos(noise_level pi / 2))`.

    >>> import torch
    >>> t, s = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    >>> cps_coefficients(t, s, 1.0).noise  # all noise is new
    tensor([0.5000], dtype=torch.float64)
    """
    kept = s * math.cos(noise_level * math.pi / 2)
    return StepCoefficients(1 - s + kept, kept * (1 - t) - (1 - s) * t, s * math.sin(noise_level * math.pi / 2))


def ddim_coefficients(a_t: Tensor, a_s: Tensor, eta: float, prediction: str) -> StepCoefficients:
    """Compute A, B and V of DDPO's step from alphas_cumprod `[B]` in float64.

    >>> import torch
    >>> a_t, a_s = torch.tensor([[0.36], [0.64]], dtype=torch.float64)
    >>> ddim_coefficients(a_t, a_s, 0.0, "eps").x  # 0.8 / 0.6
    tensor([1.3333], dtype=torch.float64)
    """
    signal, noise = torch.sqrt(a_t), torch.sqrt(1 - a_t)
    std = eta * torch.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    to_eps = torch.sqrt((1 - a_s - std * std).clamp(min=0))
    x0_of_x, x0_of_p = x0_coefficients(Levels(signal, noise, signal, noise, 0 * signal), prediction)
    to_x0 = torch.sqrt(a_s) - to_eps * signal / noise  # eps = (x - signal x0) / noise
    return StepCoefficients(to_x0 * x0_of_x + to_eps / noise, to_x0 * x0_of_p, std)
