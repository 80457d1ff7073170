"""Compute the tables of diffusers schedulers whose recurrences are their own, in float64.

In all of them the next sample is `a x + sum_j w_j m_j + v z`: m_0 is what the call makes of the sample and of the
prediction (x0, the noise, the slope in sigma, or the prediction itself), and m_j is the m of j calls before. A call
keeps its m. Formulas are those of diffusers 0.42, also where they differ from the paper.

`since` is the number of calls of a run before a step. Runs that begin in the middle have no history there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.runtime.levels import Levels, Prediction, step_coefficients, x0_coefficients
from lgd_kernels.sampling import plan_checks, solvers
from lgd_kernels.sampling import plan_tables as tables
from lgd_kernels.sampling.schedules import Discrete, Schedule

Pair = tuple[Tensor, Tensor]  # factors of x and of the prediction
ADAMS = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def multistep(a: Tensor, made: Pair, weights: list[Tensor], order: Tensor, v: Tensor | None = None) -> Tensor:
    """Stack a table `[N, P, 4 or more]` of `a x + sum_j w_j m_j + v z`.

    Args:
        a, v: `[N]`, the factors of the sample and of fresh noise.
        made: m_0 as factors of the sample and of the prediction, each `[N]`.
        weights: for each order k from 1, `[N, k]`.
        order: int `[N]`, the order of each step.
    """
    w = torch.zeros_like(weights[-1])
    for k, one in enumerate(weights, 1):
        w[:, :k] = torch.where((order == k)[:, None], one, w[:, :k])
    none = torch.zeros_like(a)
    moved = torch.stack((a + w[:, 0] * made[0], w[:, 0] * made[1], *(w[:, 1:2].unbind(1) or (none,))), -1)
    moved = torch.cat((moved, (none if v is None else v)[:, None], w[:, 2:]), -1).unsqueeze(1)
    if len(weights) == 1:
        return moved
    return torch.cat((moved, torch.nn.functional.pad(tables.output(*made), (0, w[:, 2:].shape[1]))), 1)


def warm_up(steps: int, since: int, most: int) -> Tensor:
    """Return the order of each step, `[N]`: one more than the calls before it, and at most `most`."""
    return torch.arange(steps, device="cpu").clamp(max=min(since, most - 1)) + 1


def before(values: Tensor, back: int) -> Tensor:
    """Return `[N]` the values of `back` steps before, and the first value where there is no such step."""
    return torch.cat((values[:1].expand(back), values))[: len(values)]


def nodes_before(at: Tensor, order: int) -> Tensor:
    """Return `[N, k]` where the last k values were, relative to the last one; different also where a run begins."""
    steps, spread = len(at) - 1, torch.arange(order, device="cpu")
    known = torch.arange(steps, device="cpu")[:, None] >= spread
    there = torch.stack([before(at[:-1], int(j)) for j in spread], 1) - at[:-1, None]
    return torch.where(known, there, -spread.to(at.dtype))


def dpm_multistep(scheduler: Any, schedule: Schedule, sigmas: Tensor, prediction: Prediction, since: int) -> Tensor:
    """Make DPM-Solver++ of order 1, 2 or 3, and its SDE.

        x_s = a x + b x0 + slope D1 + curve D2 + v z

    a, b and v are those of the step of order 1. D1 and D2 are the first and second divided differences of x0 in units
    of h. Midpoint has b / 2 for the slope in order 2. In order 3 diffusers takes half the curve of the exact integral,
    so its runs converge with order 2; and in the SDE of order 3 the 1/2 in the curve has the other sign.

    Source: Lu et al., arXiv 2211.01095.
    """
    config, levels = scheduler.config, schedule.levels(sigmas[:-1], sigmas[1:])
    steps, most, sde = len(sigmas) - 1, config["solver_order"], config["algorithm_type"] == "sde-dpmsolver++"
    a, b, v = step_coefficients(levels, "x0", float(sde))
    h = _log_ratio(levels)
    r, q = before(h, 1) / h, before(h, 2) / h  # of the steps before, relative to this one
    length = 2 * h if sde else h
    mean = -torch.expm1(-length) / length
    slope = levels.signal_s * (1 - mean)
    curve = levels.signal_s * ((mean - 1) / length + (-0.5 if sde else 0.5))
    share = (b / 2 if config["solver_type"] == "midpoint" else slope) / r
    newer, older = (slope * (1 + r / (r + q)) + curve / (r + q)) / r, -(slope * r + curve) / (r + q) / q
    weights = [
        b[:, None],
        torch.stack((b + share, -share), 1),
        torch.stack((b + newer, older - newer, -older), 1),
    ]
    order = warm_up(steps, since, most)
    few = config["lower_order_final"] and steps < 15
    if few:
        order[-2:] = order[-2:].clamp(max=2)
    if few or config["euler_at_final"] or config["final_sigmas_type"] == "zero":
        order[-1] = 1
    moved = torch.cat((torch.zeros(2, device="cpu", dtype=torch.bool), h != 0))  # a step of no length has no slope
    order = torch.where(moved[2:] & moved[1:-1], torch.where(moved[:-2], order, order.clamp(max=2)), 1)
    return multistep(a, x0_coefficients(levels, prediction), weights[:most], order, v)


def dpm_singlestep(scheduler: Any, schedule: Schedule, sigmas: Tensor, prediction: Prediction, since: int) -> Tensor:
    """Make the calls of DPM-Solver++ singlestep, of order 1, 2 or 3.

    A call of order k steps from the sample of k - 1 calls before. That sample is a combination of the present one and
    of the x0 in between, so the call is `a x + sum_j w_j m_j` too, and a is the one of order 1: noise_s / noise_t.

    Source: Lu et al., arXiv 2211.01095.
    """
    config, levels = scheduler.config, schedule.levels(sigmas[:-1], sigmas[1:])
    steps, most = len(sigmas) - 1, config["solver_order"]
    a, b, _ = step_coefficients(levels, "x0", 0.0)
    heun, end = config["solver_type"] == "heun", levels.signal_s
    part = _log_ratio(levels)  # of each call
    h = part + before(part, 1)
    first, slope, _ = _taylor(end, h)
    share = (slope if heun else first / 2) * h / before(part, 1)
    two = torch.stack((share, first - share), 1)
    h = h + before(part, 2)
    r, q = 1 - part / h, before(part, 2) / h  # where the calls are in the whole step
    first, slope, curve = _taylor(end, h)
    newest, middle = slope / r, torch.zeros_like(slope)
    if heun:
        newest, middle = (2 * curve - slope * q) / (r - q) / r, (slope * r - 2 * curve) / (r - q) / q
    three = torch.stack((newest, middle, first - newest - middle), 1)
    three[:, 1:] -= a[:, None] * torch.stack((before(two[:, 0], 1), before(two[:, 1], 1)), 1)
    two[:, 1] -= a * before(b, 1)
    order = torch.tensor(scheduler.order_list[:steps], device="cpu").minimum(warm_up(steps, since, most))
    return multistep(a, x0_coefficients(levels, prediction), [b[:, None], two, three][:most], order)


def deis(scheduler: Any, schedule: Schedule, sigmas: Tensor, prediction: Prediction, since: int) -> Tensor:
    """Make the steps of `solvers.deis`, with orders as at the beginning and the end of a run of diffusers."""
    config, levels = scheduler.config, schedule.levels(sigmas[:-1], sigmas[1:])
    steps, most = len(sigmas) - 1, config["solver_order"]
    signal, noise = schedule.signal_noise(sigmas)
    at = torch.log(noise) - torch.log(signal)
    length = at.diff()
    scale = torch.where(length == 0, 1.0, length)
    moments = tables.growing(length, most)
    ahead = (levels.signal_s * noise[:-1] / signal[:-1])[:, None]
    weights = []
    for k in range(1, most + 1):
        nodes = nodes_before(at, k) / scale[:, None]
        weights.append(ahead * tables.exact(nodes, moments[:, :k]))
    order = warm_up(steps, since, most)
    if config["lower_order_final"] and steps < 15:
        order[-2:] = order[-2:].clamp(max=2)
        order[-1] = 1
    alpha, beta = x0_coefficients(levels, prediction)
    signal, noise = levels.signal_t, levels.noise_t
    return multistep(levels.signal_s / signal, ((1 - signal * alpha) / noise, -signal * beta / noise), weights, order)


def lms(sigmas: Tensor, prediction: Prediction, since: int) -> Tensor:
    """Make the linear multistep method of order 4 in sigma, its integrals exact.

    diffusers counts the order of a step from the first sigma of the table, also in a run that begins later, and leaves
    out the slopes that such a run does not have.
    """
    steps, length = len(sigmas) - 1, sigmas.diff()
    weights = []
    for k in range(1, 5):
        nodes = nodes_before(sigmas, k) / length[:, None]
        moments = length[:, None] / torch.arange(1, k + 1, device="cpu")
        weights.append(tables.exact(nodes, moments) * (torch.arange(k, device="cpu") <= since))
    return multistep(torch.ones_like(length), tables.slope(sigmas[:-1], prediction), weights, warm_up(steps, 4, 4))


def pndm(scheduler: Any, table: Discrete, prediction: Prediction, since: int) -> Tensor:
    """Make PLMS: DDIM's step from the predictions by Adams-Bashforth with equal steps. The second call repeats the
    first step with the mean of two predictions, and keeps the first. Source: Liu et al., arXiv 2202.09778, Eq. 12."""
    config, t = scheduler.config, scheduler.timesteps.cpu().long()
    jump = config["num_train_timesteps"] // scheduler.num_inference_steps
    a, b = table_step(table, t, index_before(scheduler, t), prediction)
    weights = [torch.tensor(one, device="cpu", dtype=a.dtype) * b[:, None] for one in ADAMS]
    counts = warm_up(len(t), since, 5)  # 1, 2, ...: of the call
    found = multistep(a, (torch.zeros_like(a), torch.ones_like(a)), weights, (counts - 1).clamp(min=1))
    again, half = table_step(table, (t + jump).clamp(max=config["num_train_timesteps"] - 1), t, prediction)
    back = again / before(a, 1)  # the sample of the first call is (x - b m_1) / a
    second = torch.stack((back, half / 2, half / 2 - back * before(b, 1)), 1)
    first = torch.eye(6, device="cpu", dtype=a.dtype)[2].expand(len(t), 6)
    rows = torch.stack((torch.nn.functional.pad(second, (0, 3)), first), 1)
    return torch.where((counts == 2)[:, None, None], rows, found)


def index_before(scheduler: Any, t: Tensor, to_one: str = "set_alpha_to_one") -> Tensor:
    """Return where steps from t end in diffusers: a constant number of indices nearer the data."""
    s = t - scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
    return s.clamp(min=-1 if scheduler.config[to_one] else 0)


def table_step(table: Discrete, t: Tensor, s: Tensor, prediction: Prediction) -> Pair:
    """Return the factors of DDIM's step between indices: of the sample, and of the prediction."""
    factors = solvers.one_step(table, t, to=s, prediction=prediction).table[:, 0]
    return factors[:, 0], factors[:, 1]


def next_index(t: Tensor, last: int) -> Tensor:
    """Return the index of the next call of a run; `last` after the last one."""
    return torch.cat((t[1:], t.new_full((1,), last)))


def ddpm(scheduler: Any, table: Discrete, prediction: Prediction) -> Tensor:
    """Make DDPM's step; "fixed_large" adds noise of variance beta, and none at index 0. Source: arXiv 2006.11239."""
    t = scheduler.timesteps.cpu().long()
    s = next_index(t, -1)
    found = solvers.one_step(table, t, to=s, prediction=prediction, churn=1.0).table
    if scheduler.config["variance_type"] == "fixed_large":
        (signal_t, _), (signal_s, _) = table.signal_noise(t), table.signal_noise(s)
        found[:, 0, 3] = torch.where(t > 0, (1 - (signal_t / signal_s) ** 2).sqrt(), 0.0)
    return found


def lcm(scheduler: Any, table: Discrete, prediction: Prediction) -> Tensor:
    """Make LCM's step, `signal_s (c_out x0 + c_skip x) + noise_s z`, the last one to the data, and, as a second output,
    what is in brackets. Source: arXiv 2310.04378."""
    t = scheduler.timesteps.cpu().long()
    levels = plan_checks.levels("LCM", table, t, next_index(t, int(t[-1])), prediction)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t.double())
    alpha, beta = x0_coefficients(levels, prediction)
    ends = torch.arange(len(t), device="cpu") == scheduler.num_inference_steps - 1
    signal, noise = torch.where(ends, 1.0, levels.signal_s), torch.where(ends, 0.0, levels.noise_s)
    x, g = out * alpha + skip, out * beta
    return torch.cat((tables.output(signal * x, signal * g, z=noise), tables.output(x, g)), 1)


def tcd(scheduler: Any, table: Discrete, prediction: Prediction, gamma: float) -> Tensor:
    """Make TCD's step: down to index (1 - gamma) s, and up to s with noise; at gamma 0 without. Source: arXiv
    2402.19159."""
    t = scheduler.timesteps.cpu().long()
    s = next_index(t, 0)
    below = torch.floor((1 - gamma) * s).long()
    a, b = table_step(table, t, below, prediction)
    ends = torch.arange(len(t), device="cpu") == scheduler.num_inference_steps - 1
    up = torch.where(ends, 1.0, table.signal_noise(s)[0] / table.signal_noise(below)[0])
    return tables.output(a * up, b * up, z=(1 - up * up).clamp(min=0).sqrt())


def flow_heun(sigmas: Tensor) -> Tensor:
    """Make Heun's method for a velocity: two calls a step, and one in the last. The first keeps `x + h g / 2`."""
    h = sigmas.diff()
    one, none = torch.ones_like(h), torch.zeros_like(h)
    first = torch.cat((tables.output(one, h), tables.output(one, h / 2)), -2)
    second = torch.cat((tables.output(none, h / 2, kept=one), tables.output(none, none)), -2)
    return torch.stack((first, second), 1).flatten(0, 1)[:-1]


def unipc(scheduler: Any, schedule: Schedule, sigmas: Tensor, prediction: Prediction, since: int) -> Tensor:
    """Make UniPC of order 1 or 2 for runs that begin at any step."""
    config, steps = scheduler.config, len(sigmas) - 1
    first = torch.full((steps,), config["solver_order"] == 1, device="cpu")
    first[-1] |= config["lower_order_final"]

    def table(times: Tensor, first_order: Tensor) -> Tensor:
        made = functools.partial(solvers.unipc, schedule, prediction=prediction, variant=config["solver_type"])
        return made(times, first_order=first_order).table

    whole, runs = table(sigmas, first), steps - since
    if since > 1 or runs < 1:
        return whole
    times = torch.stack([sigmas[j : j + runs] for j in range(since + 2)])  # of one short run for each later step
    return torch.cat((whole[:since], table(times, torch.stack([first[j : j + runs] for j in range(since + 1)]))[-1]))


def _log_ratio(levels: Levels) -> Tensor:
    """Return h, the length of each step in ln(signal / noise); infinite to the data."""
    stays = levels.gap == 0
    return -torch.log1p(-levels.gap / torch.where(stays, 1.0, levels.signal_s * levels.noise_t))


def _taylor(end: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step of length h to signal `end` adds for an x0 of 1, u and u^2 / 2; u goes from 0 to 1."""
    mean = -torch.expm1(-h) / h
    return end * mean * h, end * (1 - mean), end * ((mean - 1) / h + 0.5)
