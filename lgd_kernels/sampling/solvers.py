"""Plan runs of solvers as tables of coefficients, computed once; each step is one combine.

Every function takes a schedule and the times of a run, `[N + 1]` from the noise to the data, and returns a `StepPlan`:
for each call of the network, the factors that make the next sample, and the history that the solver keeps, from the
sample, the guided prediction and the history. Coefficients are computed in float64 if the times are float64 (for the
integer times of `Discrete`, in its dtype: `Discrete(..., dtype=torch.float64)`). Times `[N + 1, B]` give every sample
of a batch its own run.

A step between two equal times changes neither the sample nor the history, so the steps after it are the same as without
it. (`consistency` adds fresh noise there, and `edm_euler` and `edm_heun` churn, as in every step.) A single time makes
a plan without calls. TypeError and ValueError name the plan and the argument; values are checked on the CPU, never with
a device sync.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import Levels, Prediction, step_coefficients, x0_coefficients
from lgd_kernels.runtime.shown import readable
from lgd_kernels.sampling import plan_checks
from lgd_kernels.sampling import plan_tables as tables
from lgd_kernels.sampling.schedules import EDM, Schedule
from lgd_kernels.sampling.step_plan import StepPlan

__all__ = [
    "StepPlan",
    "adams_bashforth",
    "consistency",
    "deis",
    "dpm_solver_2m",
    "edm_euler",
    "edm_heun",
    "one_step",
    "unipc",
]


def one_step(
    schedule: Schedule,
    times: Tensor,
    *,
    to: Tensor | None = None,
    prediction: Prediction = "x0",
    churn: float | Tensor = 0.0,
) -> StepPlan:
    """Plan the step of `guided_step` at every time: DDIM (churn 0), DDPM (churn 1), Euler for rectified flow and EDM,
    ancestral Euler for EDM (churn 1); any eta with `churn_from_eta`, which gives churn `[N]`, or `[N, B]` as the times.

    With `to` `[N]`, step i goes from `times[i]` to `to[i]`, and times are `[N]` too, in any order.

    Source: arXiv 2510.00815, Eq. 2; 2010.02502.
    """
    if to is None:
        levels = _levels("one_step", schedule, times, prediction)
    else:
        plan_checks.ends("one_step", times, to)
        levels = plan_checks.levels("one_step", schedule, times, to, prediction)
    plan_checks.churn("one_step", churn, levels.gap)
    a, b, v = step_coefficients(levels, prediction, churn)
    at, ends = (times[:-1], times[1:]) if to is None else (times, to)
    return _plan("one_step", prediction, at, ends, tables.output(a, b, z=v))


def consistency(schedule: Schedule, times: Tensor, *, prediction: Prediction = "x0") -> StepPlan:
    """Plan the step of consistency models and LCM: `x_s = signal_s x0(x, g) + noise_s z`, which keeps nothing of x
    (h = 0). Source: arXiv 2303.01469, Algorithm 1; 2310.04378."""
    levels = _levels("consistency", schedule, times, prediction)
    alpha, beta = x0_coefficients(levels, prediction)
    table = tables.output(levels.signal_s * alpha, levels.signal_s * beta, z=levels.noise_s)
    return _plan("consistency", prediction, times[:-1], times[1:], table)


def edm_euler(sigmas: Tensor, *, prediction: Prediction = "x0", after: bool = True, **churning: float) -> StepPlan:
    """Plan Euler steps with added noise, for sigmas `[N + 1]` that end at 0: up to sigma_hat = sigma (1 + gamma), then
    down.

    Args:
        after: whether the network is called after the noise was added, at sigma_hat, as in the paper; or before, at
            sigma, on the sample without this noise, as in diffusers. (diffusers then converts v at sigma, where this
            plan uses sigma_hat: with churn, the two agree for eps only.)
        churning: s_churn, s_tmin, s_tmax, s_noise: gamma = min(s_churn / N, sqrt(2) - 1) for s_tmin <= sigma <= s_tmax.

    Source: Karras et al., arXiv 2206.00364, Algorithm 2, without its correction.
    """
    checks.flag("edm_euler", "after", after)
    raised, added = tables.raised("edm_euler", sigmas, prediction, **churning)
    a, b, _ = step_coefficients(EDM().levels(raised, sigmas[1:]), prediction, 0.0)
    if not after:
        return _plan("edm_euler", prediction, sigmas[:-1], sigmas[1:], tables.output(a, b, z=a * added))
    table = tables.output(a, b, z=tables.late(added))
    return _plan("edm_euler", prediction, raised, sigmas[1:], table, start=tables.first_noise(added))


def edm_heun(sigmas: Tensor, *, prediction: Prediction = "x0", **churning: float) -> StepPlan:
    """Plan Heun's method, for sigmas `[N + 1]`: 2 N - 1 calls if they end at 0, else 2 N. `churning` as in `edm_euler`.

        d = (x - x0(x)) / sigma_hat;   x' = x + (s - sigma_hat) d;   x <- x + (s - sigma_hat) (d + d') / 2

    The first call of a step keeps x + (s - sigma_hat) d / 2; the second call adds the rest.

    Source: Karras et al., arXiv 2206.00364, Algorithm 2.
    """
    raised, added = tables.raised("edm_heun", sigmas, prediction, **churning)
    t, s, h = raised, sigmas[1:], sigmas[1:] - raised
    x, g = tables.slope(t, prediction)
    first = torch.cat((tables.output(1 + h * x, h * g), tables.output(1 + h / 2 * x, h / 2 * g)), -2)
    ends, none = s == 0, torch.zeros_like(h)
    x, g = (torch.where(ends, none, h / 2 * one) for one in tables.slope(s, prediction))
    x, kept = torch.where(ends, 1.0, x), torch.where(ends, none, 1.0)  # where it ends, the sample stays
    second = torch.cat((tables.output(x, g, kept=kept, z=tables.late(added)), tables.output(none, none)), -2)
    calls = torch.stack((torch.ones_like(ends), ~ends), 1).flatten(0, 1)
    calls = calls.any(-1) if calls.ndim == 2 else calls
    times, table = torch.stack((t, s), 1).flatten(0, 1), torch.stack((first, second), 1).flatten(0, 1)
    after = torch.stack((s, torch.cat((s[1:], torch.zeros_like(s[:1])))), 1).flatten(0, 1)  # below the last sigma: 0
    return _plan("edm_heun", prediction, times[calls], after[calls], table[calls], start=tables.first_noise(added))


def adams_bashforth(sigmas: Tensor, *, prediction: Prediction = "x0", order: int = 2) -> StepPlan:
    """Plan a multistep method in sigma, with one call a step: the slope d is a polynomial of sigma through its values
    in the last `order` calls, 1 to 4, and is integrated exactly. Of order 2,

        x <- x + h ((1 + h / (2 h')) d - h / (2 h') d'),   h' and d' of the step before

    The first steps are of order 1, 2, ... The solver keeps d. k-diffusion and diffusers call it LMS, of order 4 unless
    given, with numerical integrals.
    """
    plan_checks.sigmas("adams_bashforth", sigmas, prediction)
    plan_checks.order("adams_bashforth", order, 4)
    h = sigmas[1:] - sigmas[:-1]
    made = tables.slope(sigmas[:-1], prediction)
    x, g = 1 + h * made[0], h * made[1]
    if order == 1:
        return _plan("adams_bashforth", prediction, sigmas[:-1], sigmas[1:], tables.output(x, g))
    moments = torch.stack([h / (p + 1) for p in range(order)], -1)
    table, stays = _multistep(sigmas, order, moments, x, g, made)
    return _plan("adams_bashforth", prediction, sigmas[:-1], sigmas[1:], table, stays=stays)


def deis(schedule: Schedule, times: Tensor, *, prediction: Prediction = "x0", order: int = 2) -> StepPlan:
    """Plan DEIS: the noise eps is a polynomial of ln(rho), rho = noise / signal, through its values in the last `order`
    calls, 1 to 3, and is integrated exactly over rho.

        x_s / signal_s = x_t / signal_t + integral of the polynomial from rho_t to rho_s

    The first steps are of order 1, 2, ... A step from signal 0 or to s = 0, where ln(rho) is infinite, is of order 1,
    the step of `one_step`. The solver keeps eps. Source: Zhang and Chen, arXiv 2204.13902, rho AB, in ln(rho) as
    diffusers' DEISMultistepScheduler.
    """
    levels = _levels("deis", schedule, times, prediction)
    plan_checks.order("deis", order, 3)
    x, g, _ = step_coefficients(levels, prediction, 0.0)
    if order == 1:
        return _plan("deis", prediction, times[:-1], times[1:], tables.output(x, g))
    signal = torch.cat((levels.signal_t, levels.signal_s[-1:]))
    noise = torch.cat((levels.noise_t, levels.noise_s[-1:]))
    alpha, beta = x0_coefficients(levels, prediction)
    sharp = torch.where(levels.noise_t == 0, 1.0, levels.noise_t)
    made = (1 - levels.signal_t * alpha) / sharp, -levels.signal_t * beta / sharp
    at = torch.log(noise) - torch.log(signal)
    h = torch.where(levels.gap == 0, 0.0, at[1:] - at[:-1])
    moments = tables.growing(h, order) * (levels.signal_s * noise[:-1] / signal[:-1]).unsqueeze(-1)
    table, stays = _multistep(at, order, moments, x, g, made)
    return _plan("deis", prediction, times[:-1], times[1:], table, stays=stays)


def dpm_solver_2m(
    schedule: Schedule,
    times: Tensor,
    *,
    prediction: Prediction = "x0",
    stochastic: bool = False,
    first_order: Tensor | None = None,
) -> StepPlan:
    """Plan DPM-Solver++ 2M or its SDE (midpoint) form: the step of `one_step`, churn 0 or 1, from an extrapolated x0.

        x0' = x0 + (x0 - x0 before) / (2 r),   r = h before / h,   h = ln(signal_s / noise_s) - ln(signal_t / noise_t)

    The first step, a step to s = 0, where h is infinite, and steps where `first_order` `[N]` is True are of first
    order. The solver keeps x0. Source: Lu et al., arXiv 2211.01095.
    """
    checks.flag("dpm_solver_2m", "stochastic", stochastic)
    levels = _levels("dpm_solver_2m", schedule, times, prediction)
    plan_checks.first_order("dpm_solver_2m", first_order, levels.gap)
    a, b, v = step_coefficients(levels, "x0", float(stochastic))
    steps = tables.ratios(levels, first_order)
    share = steps.ratio / 2
    alpha, beta = x0_coefficients(levels, prediction)
    ahead = b * (1 + share)
    table = tables.output(a + ahead * alpha, ahead * beta, kept=-b * share, z=v)
    table = torch.cat((table, tables.remembered(alpha, beta, steps.stays)), -2)
    return _plan("dpm_solver_2m", prediction, times[:-1], times[1:], table)


def unipc(
    schedule: Schedule,
    times: Tensor,
    *,
    prediction: Prediction = "x0",
    variant: Literal["bh1", "bh2"] = "bh2",
    first_order: Tensor | None = None,
) -> StepPlan:
    """Plan UniPC of order 2 in x0: the corrector is part of the next step, so a step is one combine.

    Call i computes x0_i at the x_i that the step before predicted. With h of a step and h' of the step before, in
    ln(signal / noise), r = h / h', E = 1 - e^-h, B = E ("bh2") or h ("bh1"), and a, b the factors of `one_step`,

        corrected = x_i + signal_s B ((f - p) (x0_i - x0_{i-1}) + (p - 1/2) r (x0_{i-1} - x0_{i-2}))
        x_{i+1}   = a corrected + b x0_i + signal_s B r / 2 (x0_i - x0_{i-1})

    with signal_s, B, f, p and r of the step before in the first line, of this step in the second;

        f = (1 - E / h) / B,   p = r / (1 + r) (f - (1 - 2 (1 - E / h) / h) / B)

    The first step, a step to s = 0, and steps where `first_order` `[N]` is True are of first order (r = 0,
    f - p = 1/2). Where h is infinite "bh1" is not defined, and the step is not corrected. The solver keeps x0_i and
    x0_{i-1}.

    With the corrector a run converges with order 3. Source: Zhao et al., arXiv 2302.04867; the predictor's p is 1/2,
    as in diffusers' UniPCMultistepScheduler of solver_order 2.
    """
    if not isinstance(variant, str) or variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: `variant` is {variant!r}, expected bh1 or bh2")
    levels = _levels("unipc", schedule, times, prediction)
    plan_checks.first_order("unipc", first_order, levels.gap)
    a, b, _ = step_coefficients(levels, "x0", 0.0)
    h, ratio, second, stays, last = tables.ratios(levels, first_order)
    none = torch.zeros_like(h)
    size = -torch.expm1(-h) if variant == "bh2" else h
    new, old = tables.corrected(h, ratio, second, size)
    size = levels.signal_s * size
    ahead = torch.where(second, size * ratio / 2, none)
    new, old = (torch.where(torch.isfinite(size), size * one, none) for one in (new, old))
    new, old = (a * tables.of_last(one, last, 0.0) for one in (new, old))  # at the next call that moves
    new, old = (torch.where(levels.gap == 0, none, one) for one in (new, old))
    alpha, beta = x0_coefficients(levels, prediction)
    to_x0 = new + b + ahead
    table = tables.output(a + to_x0 * alpha, to_x0 * beta, kept=old - new - ahead)
    table = torch.cat((table, tables.remembered(alpha, beta, stays)), -2)
    before = torch.stack((-old, none), -1).unsqueeze(-1)
    table = torch.cat((table, before), -1)
    some = readable(stays) and bool(stays.any())  # if not readable, the next corrector is of first order
    return _plan("unipc", prediction, times[:-1], times[1:], table, stays=stays if some else None)


def _levels(plan: str, schedule: Schedule, times: Tensor, prediction: Prediction) -> Levels:
    """Check the times of a run, and compute the levels of its steps."""
    plan_checks.times(plan, "times", times)
    return plan_checks.levels(plan, schedule, times[:-1], times[1:], prediction)


def _multistep(
    at: Tensor, order: int, moments: Tensor, x: Tensor, g: Tensor, made: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Stack the table of a method that extrapolates in `at`, and find the calls of a deep plan that keep all."""
    weights, stays = tables.extrapolated(at, order, moments)
    some = order > 2 and (not readable(stays) or bool(stays.any()))
    return tables.multistep(x, g, made, weights, stays), stays if some else None


def _plan(
    plan: str,
    prediction: Prediction,
    times: Tensor,
    ends: Tensor,
    table: Tensor,
    *,
    start: float | Tensor = 0.0,
    stays: Tensor | None = None,
) -> StepPlan:
    """Make the plan of a table whose factors are finite."""
    plan_checks.finite(plan, table)
    return StepPlan(times, table, start, ends, stays, prediction)
