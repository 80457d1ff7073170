"""Take a stochastic step with its log density, for policy gradients on a sampler."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lgd_kernels.ops.combine.api import Combined, combine
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.columns import Column
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup, Prediction, omega_at, step_coefficients


def step_with_log_prob(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    *,
    x_s: Tensor | None = None,
    prediction: Prediction = "x0",
    churn: float | Tensor = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    reduction: Literal["sum", "mean"] = "sum",
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(x_s, log p(x_s | x, g))`: one guided step with churn, and its log density for each sample.

        x_s = mean + V z,   mean = A x + B g                                    as in `guided_step`
        log p = -||x_s - mean||^2 / (2 V^2) - D/2 ln(2 pi V^2)                  D elements of a sample

    Args:
        x, cond, uncond, omega, levels, prediction, noise, seed, first_sample, impl: as in `guided_step`.
        x_s: the result of an earlier step, to be scored; None draws x_s, from `noise` or `seed`, and detaches it.
        churn: above 0: without noise there is no density.
        reduction: "sum" over the elements of a sample, or their "mean", log p / D.

    Returns x_s in the dtype of x, and log p `[B]` in float64 for every dtype: at the log p of a latent video (-6e5)
    neighbouring float32 numbers are 0.06 apart, and a ratio `exp(new - old)` needs 1e-3. Mean and residual are formed
    in float64 for each element and summed in float64, so the difference of two scores of 10^7 elements is accurate to
    1e-4. log p is NaN where V = 0 (s = 0, or a churn of 0 that is not readable without a device sync).

    A score is one pass: it reads x_s, x, cond and uncond, writes nothing, and takes a dozen float64 operations for
    each element. A step that draws takes two passes: the step, and the score of x_s as stored. So scoring a stored x_s
    again with the same weights and the same implementation gives the same number: a ratio of exactly 1.

    Differentiable in x, cond, uncond and omega through the mean, and in a given x_s. On the CPU the residual of a
    gradient is formed in float64 too, which takes memory for the residual and for a copy of x_s. Score x_s as it was
    stored: rounding to half changes x_s, perhaps by as much as V.

    Raises TypeError or ValueError as `guided_step` does, and for a churn of 0.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.EDM().levels(torch.tensor([2.0]), torch.tensor([1.0]))
    >>> x, c = torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step_with_log_prob(x, c, c, 0.0, levels, noise=torch.zeros(1, 1))[1]  # a normal of variance 3/4, at its mean
    tensor([-0.7751], dtype=torch.float64)
    """

    if isinstance(churn, (int, float)) and churn == 0:
        raise ValueError("step_with_log_prob: `churn` is 0, where the step has no density; churn=1.0 is DDPM's")
    if not isinstance(reduction, str) or reduction not in ("sum", "mean"):
        raise ValueError(f"step_with_log_prob: `reduction` is {reduction!r}, expected sum or mean")
    if impl is not None:
        impls.named("step_with_log_prob", impl)
    given = {} if x_s is None else {"x_s": x_s}
    checks.samples("step_with_log_prob", x=x, cond=cond, uncond=uncond, noise=noise, **given)
    checks.omega("step_with_log_prob", omega, "x", x)
    checks.levels("step_with_log_prob", levels, prediction, "x", x)
    checks.churn("step_with_log_prob", churn, "x", x)
    a, b, v = (one.double() for one in step_coefficients(Levels(*(one.double() for one in levels)), prediction, churn))
    bw = b * omega_at(omega, a)
    if x_s is None:
        checks.noise("step_with_log_prob", churn, noise, seed)
        if seed is not None:
            checks.seed("step_with_log_prob", seed, first_sample, x.shape[0], x)
        with torch.no_grad():
            x_s = _drawn((x, cond, uncond), (a, b, bw), v, noise, impl, seed=seed, first_sample=first_sample)
        x_s = x_s.detach()  # also from forward mode, which no_grad does not turn off
    factors = torch.stack((torch.ones_like(a), -a, -b, -bw), 1)  # x_s - mean
    columns: tuple[Column, ...] = 0, 1, 2, (2, 3)
    found = combine((x_s, x, cond, uncond), factors, columns=columns, moments=True, written=0, wide=True, impl=impl)
    assert isinstance(found, Combined)
    count = math.prod(x.shape[1:])
    variance = torch.where(v > 0, v * v, torch.nan)
    log_prob = -found.dots[:, 0, 0] / (2 * variance) - count / 2 * torch.log(2 * torch.pi * variance)
    return x_s, log_prob / count if reduction == "mean" else log_prob


def _drawn(
    tensors: tuple[Tensor, Tensor, Tensor],
    factors: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    noise: Tensor | None,
    impl: Impl | None,
    **drawn: Any,
) -> Tensor:
    """Draw x_s as `guided_step` does: `factors` of x, cond and guidance, and `scale` of the noise."""
    columns: tuple[Column, ...] = 0, 1, (1, 2)
    if noise is None:
        found = combine(tensors, torch.stack(factors, 1), columns=columns, noise_scale=scale, impl=impl, **drawn)
    else:
        found = combine((*tensors, noise), torch.stack((*factors, scale), 1), columns=(*columns, 3), impl=impl)
    assert isinstance(found, Tensor)
    return found
