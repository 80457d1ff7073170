"""Take a stochastic step with its log density, for policy gradients on a sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import (
    Levels,
    OmegaLookup,
    Prediction,
    StepCoefficients,
    coefficients_of_h,
    step_coefficients,
)
from lgd_kernels.sampling import density

OP = "step_with_log_prob"
_ROUNDING = 1e-6  # by which h may leave [0, 1]: cos(pi / 2) in float32 is -4e-8


def step_with_log_prob(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    omega: float | Tensor | OmegaLookup | None = None,
    levels: Levels | None = None,
    *,
    x_s: Tensor | None = None,
    prediction: Prediction | None = None,
    churn: float | Tensor | None = None,
    h: float | Tensor | None = None,
    coefficients: Sequence[float | Tensor] | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    reduction: Literal["sum", "mean"] = "sum",
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(x_s, log p(x_s | x, g))`: one step with noise, and its log density for each sample.

        x_s = mean + V z,   mean = A x + B g,   g = cond + omega (cond - uncond)
        log p = -||x_s - mean||^2 / (2 V^2) - D/2 ln(2 pi V^2)                  D elements of a sample

    A, B and V come from one of three sources: `levels` with `churn`, as in `guided_step`; `levels` with `h`; or
    `coefficients`. h is the share of the noise in x that stays,

        x_s = (noise_s / noise_t) h x + (signal_s - signal_t (noise_s / noise_t) h) x0 + noise_s sqrt(1 - h^2) z

    which is `1 - churn^2 q` (docs/math.md, "the step"), also where no churn reaches it: h below 1 - q adds
    more noise than churn 1. Flow-CPS is `h = cos(eta pi / 2)`.

    Args:
        x, cond, omega, levels, noise, seed, first_sample, impl: as in `guided_step`.
        uncond: None if cond is guided already; then omega is None too.
        x_s: the result of an earlier step, to be scored; None draws x_s, from `noise` or `seed`, and detaches it.
        prediction: as in `guided_step`; None is "x0". Not with `coefficients`.
        churn: in (0, 1]: without noise there is no density. None is 1 unless `h` or `coefficients` is given.
        h: in [0, 1), a float or `[B]`, up to a rounding error of 1e-6.
        coefficients: (A, B, V), each a float or `[B]`, V 0 or more; for the steps of other samplers, with any noise.
        reduction: "sum" over the elements of a sample, or their "mean", log p / D.

    Returns x_s in the dtype of x, and log p `[B]` in float64 for every dtype: at the log p of a latent video (-6e5)
    neighbouring float32 numbers are 0.06 apart, and a ratio `exp(new - old)` needs 1e-3. Mean and residual are formed
    in float64 for each element and summed in float64, so the difference of two scores of 10^7 elements is accurate to
    1e-4. Where V = 0 (s = 0), log p of a drawn x_s is 0 and has no gradient, so that such a step adds nothing to that
    of a run; log p of a given x_s is NaN there.

    A score is one pass: it reads x_s, x, cond and uncond, writes nothing, and takes a dozen float64 operations for
    each element. A step that draws takes two passes: the step, and the score of x_s as stored. So scoring a stored x_s
    again with the same weights and the same implementation gives the same number, a ratio of exactly 1: in every dtype,
    with and without gradients, and for a sample alone and in any batch ("cpu", "triton").

    Differentiable in x, cond, uncond, omega and `coefficients`, and in a given x_s. The gradient to tensors is one pass
    more, in float64 too, which reads what the score reads; that to omega or `coefficients` is another, which writes
    nothing. Score x_s as it was stored: rounding to half changes x_s, perhaps by as much as V.

    Raises TypeError or ValueError as `guided_step` does, for a churn of 0, an h of 1, and for two sources of A, B, V.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.EDM().levels(torch.tensor([2.0]), torch.tensor([1.0]))
    >>> x, c = torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step_with_log_prob(x, c, c, 0.0, levels, noise=torch.zeros(1, 1))[1]  # a normal of variance 3/4, at its mean
    tensor([-0.7751], dtype=torch.float64)
    >>> step_with_log_prob(x, c, coefficients=(0.5, 0.5, 1.0), x_s=torch.ones(1, 1))[1]  # a standard normal, at 1
    tensor([-1.4189], dtype=torch.float64)
    """

    if isinstance(churn, (int, float)) and churn == 0:
        raise ValueError(f"{OP}: `churn` is 0, where the step has no density; churn=1.0 is DDPM's")
    if isinstance(h, (int, float)) and h == 1:
        raise ValueError(f"{OP}: `h` is 1, where the step has no density; h=0.9 adds noise")
    if not isinstance(reduction, str) or reduction not in ("sum", "mean"):
        raise ValueError(f"{OP}: `reduction` is {reduction!r}, expected sum or mean")
    if impl is not None:
        impls.named(OP, impl)
    given = {"uncond": uncond} if uncond is not None else {}
    checks.samples(OP, x=x, cond=cond, **given, noise=noise, **({} if x_s is None else {"x_s": x_s}))
    density.check_weight(OP, uncond, omega, "x", x)
    found = _coefficients(x, levels, prediction, churn, h, coefficients)
    drawn = x_s is None
    if drawn:
        if coefficients is not None:
            checks.noise(OP, coefficients[2], noise, seed, "coefficients[2]")
        elif h is not None:
            checks.noise(OP, h, noise, seed, "h", off=1)
        else:
            checks.noise(OP, 1.0 if churn is None else churn, noise, seed)
        if seed is not None:
            checks.seed(OP, seed, first_sample, x.shape[0], x)
        x_s = density.draw(x, cond, uncond, omega, found, noise, seed, first_sample, impl)
    assert x_s is not None
    squares = density.residual(x_s, x, cond, uncond, omega, found, impl)
    count = math.prod(x.shape[1:])
    log_prob = density.log_normal(squares, found.noise, count, drawn)
    return x_s, log_prob / count if reduction == "mean" else log_prob


def _coefficients(
    x: Tensor,
    levels: Levels | None,
    prediction: Prediction | None,
    churn: float | Tensor | None,
    h: float | Tensor | None,
    coefficients: Sequence[float | Tensor] | None,
) -> StepCoefficients:
    """Check the one source of A, B and V that was given, and compute them in float64, each `[B]`."""
    if coefficients is not None:
        for name, one in (("levels", levels), ("prediction", prediction), ("churn", churn), ("h", h)):
            if one is not None:
                raise ValueError(f"{OP}: `{name}` and `coefficients` were both given, expected one of them")
        return density.given(OP, coefficients, x)
    if levels is None:
        raise TypeError(f"{OP}: `levels` is None, expected a schedule's levels(t, s), or coefficients=(A, B, V)")
    prediction = "x0" if prediction is None else prediction
    checks.levels(OP, levels, prediction, "x", x)
    wide = Levels(*(one.double() for one in levels))
    if h is None:
        churn = 1.0 if churn is None else churn
        checks.churn(OP, churn, "x", x)
        return StepCoefficients(*(one.double() for one in step_coefficients(wide, prediction, churn)))
    if churn is not None:
        raise ValueError(f"{OP}: `churn` and `h` were both given, expected one of them; h is 1 - churn^2 q")
    if isinstance(h, Tensor) and h.requires_grad:
        raise ValueError(f"{OP}: `h` requires grad, but no gradient flows to h; pass h.detach()")
    checks.per_sample(OP, "h", h, "x", x)
    if isinstance(h, Tensor):
        h = torch.where((h < 0) & (h >= -_ROUNDING), 0.0, torch.where((h > 1) & (h <= 1 + _ROUNDING), 1.0, h.double()))
    elif not torch.compiler.is_compiling():
        h = min(max(h, 0.0), 1.0) if -_ROUNDING <= h <= 1 + _ROUNDING else h
    checks.unit(OP, "h", h, "x", x)
    return coefficients_of_h(wide, prediction, h)
