"""A stochastic step together with the log density of where it went: what policy gradients on a sampler need."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lgd_kernels import checks, impls
from lgd_kernels.arguments import requires_grad
from lgd_kernels.impls import Impl
from lgd_kernels.levels import Levels, OmegaLookup, Prediction, arithmetic_dtype, omega_at, step_coefficients
from lgd_kernels.ops.combine.api import combine


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
    """`(x_s, log p(x_s | x, g))`: one guided step with churn, and its log density for each sample.

        x_s = mean + V z,   mean = A x + B g                                    as in `guided_step`
        log p = -||x_s - mean||^2 / (2 V^2) - D/2 ln(2 pi V^2)                  D elements of a sample

    Args:
        x, cond, uncond, omega, levels, prediction, noise, seed, first_sample, impl: as in `guided_step`.
        x_s: where an earlier step went, to be scored; None draws it, from `noise` or `seed`, and detaches it.
        churn: above 0: without noise there is no density.
        reduction: "sum" over the elements of a sample, or their "mean", log p / D.

    Returns x_s, and log p `[B]` in float32 (float64 where a tensor is). It is NaN where V = 0 (s = 0, or a churn of 0
    that cannot be seen). One pass: the score of a given x_s, which writes nothing; and a step that draws, asked for no
    gradient, whose score is that of its noise. Two, a step and its score, where x is stored as half or a gradient is
    asked for.

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
    given = {} if x_s is None else {"x_s": x_s}
    checks.samples("step_with_log_prob", x=x, cond=cond, uncond=uncond, noise=noise, **given)
    checks.omega("step_with_log_prob", omega, "x", x)
    checks.levels("step_with_log_prob", levels, prediction, "x", x)
    checks.churn("step_with_log_prob", churn, "x", x)
    wide = arithmetic_dtype(x_s, x, cond, uncond, noise)
    a, b, v = (one.double() for one in step_coefficients(Levels(*(one.double() for one in levels)), prediction, churn))
    w = omega_at(omega, x.new_empty(0, dtype=wide))
    square = None
    if x_s is None:
        checks.noise("step_with_log_prob", churn, noise, seed)
        if seed is not None:
            checks.seed("step_with_log_prob", seed, first_sample, x.shape[0], x)
        asked = impls.transforms_active() or (torch.is_grad_enabled() and requires_grad(x, cond, uncond, w))
        with torch.no_grad():
            x_s, square = _drawn(x, cond, uncond, (a, b, b * w, v), noise, seed, first_sample, impl)
        x_s = x_s.detach()  # also from forward mode, which no_grad leaves
        square = square * v * v if x.dtype == wide and not asked else None
    if square is None:
        factors = torch.stack((torch.ones_like(a), -a, -b, -b * w), 1)  # x_s - mean
        columns = 0, 1, 2, (2, 3)
        found = combine((x_s, x, cond, uncond), factors, columns=columns, moments=True, written=0, impl=impl)
        square = found.dots[:, 0, 0].double()
    count = math.prod(x.shape[1:])
    variance = torch.where(v > 0, v * v, torch.nan)
    log_prob = -square / (2 * variance) - count / 2 * torch.log(2 * torch.pi * variance)
    return x_s, (log_prob / count if reduction == "mean" else log_prob).to(wide)


def _drawn(x, cond, uncond, coefficients, noise, seed, first_sample, impl):
    """x_s, and ||z||^2 of what was drawn: a second output, which is not written."""
    *factors, v = coefficients
    none, one = torch.zeros_like(v), torch.ones_like(v)
    tensors, columns, options = [x, cond, uncond], [0, 1, (1, 2)], {}
    rows = [factors, [none] * 3]
    if noise is not None:
        tensors, columns, rows = [*tensors, noise], [*columns, 3], [[*factors, v], [*rows[1], one]]
    else:
        options = {"noise_scale": torch.stack((v, one), 1), "seed": seed, "first_sample": first_sample}
    stacked = torch.stack([torch.stack(row, 1) for row in rows], 1)
    found = combine(tensors, stacked, columns=columns, moments=True, written=1, impl=impl, **options)
    return found.outputs[0], found.dots[:, 1, 1].double()
