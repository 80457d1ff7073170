"""A stochastic step together with the log density of where it went: what policy gradients on a sampler need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels import checks
from lgd_kernels.levels import Levels, OmegaLookup, arithmetic_dtype, omega_at, step_coefficients
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.ops.guided_step.api import guided_step
from lgd_kernels.ops.moments.api import moments


def step_with_log_prob(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    *,
    x_s: Tensor | None = None,
    prediction: str = "x0",
    churn: float | Tensor = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    reduction: str = "sum",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(x_s, log p(x_s | x, g))`: one guided step with churn, and its log density for each sample.

        x_s = mean + V z,   mean = A x + B g                                    as in `guided_step`
        log p = -||x_s - mean||^2 / (2 V^2) - D/2 ln(2 pi V^2)                  D elements of a sample

    Args:
        x, cond, uncond, omega, levels, prediction, noise, seed, first_sample, impl: as in `guided_step`.
        x_s: where an earlier step went, to be scored; None draws it, from `noise` or `seed`, and detaches it.
        churn: above 0: without noise there is no density.
        reduction: "sum" over the elements of a sample, or their "mean", log p / D.

    Returns x_s, and log p `[B]` in float32 (float64 where a tensor is). It is NaN where V = 0 (s = 0, or a churn of 0
    that cannot be seen). The step is one pass; the score is two more, a combine that writes x_s - mean and its moment.

    Differentiable in x, cond, uncond and omega through the mean, and in a given x_s. Score x_s as it was stored:
    rounded to half it is another point, and V may be no larger than that.

    Raises TypeError or ValueError as `guided_step` does, and for a churn of 0.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.EDM().levels(torch.tensor([2.0]), torch.tensor([1.0]))
    >>> x, c = torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step_with_log_prob(x, c, c, 0.0, levels, noise=torch.zeros(1, 1))[1]  # a normal of variance 3/4, at its mean
    tensor([-0.7751])
    """

    if isinstance(churn, (int, float)) and churn == 0:
        raise ValueError("step_with_log_prob: `churn` is 0, where the step has no density; churn=1.0 is DDPM's")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"step_with_log_prob: `reduction` is {reduction!r}, expected sum or mean")
    if x_s is None:
        with torch.no_grad():
            x_s = guided_step(
                x, cond, uncond, omega, levels, prediction=prediction, churn=churn, noise=noise, seed=seed,
                first_sample=first_sample, impl=impl,
            )  # fmt: skip
    else:
        checks.samples("step_with_log_prob", x=x, cond=cond, uncond=uncond, x_s=x_s)
        checks.omega("step_with_log_prob", omega, "x", x)
        checks.levels("step_with_log_prob", levels, prediction, "x", x)
        checks.churn("step_with_log_prob", churn, "x", x)
    wide = arithmetic_dtype(x_s, x, cond, uncond)
    a, b, v = (one.double() for one in step_coefficients(Levels(*(one.double() for one in levels)), prediction, churn))
    w = omega_at(omega, x.new_empty(0, dtype=wide))
    factors = torch.stack((torch.ones_like(a), -a, -b, -b * w), 1)
    off = combine((x_s.to(wide), x, cond, uncond), factors, columns=(0, 1, 2, (2, 3)), impl=impl)  # x_s - mean
    square = moments((off,), impl=impl).dots[:, 0, 0].double()
    count = math.prod(x.shape[1:])
    variance = torch.where(v > 0, v * v, torch.nan)
    log_prob = -square / (2 * variance) - count / 2 * torch.log(2 * torch.pi * variance)
    return x_s, (log_prob / count if reduction == "mean" else log_prob).to(wide)
