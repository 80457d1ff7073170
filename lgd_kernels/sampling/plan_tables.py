"""Compute the parts of the tables of solvers: outputs of a step, slopes, and ratios of steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.levels import Levels, x0_coefficients
from lgd_kernels.sampling import plan_checks


class Ratios(NamedTuple):
    """Compare each step with the last step before it that moved."""

    h: Tensor  # of the step, in ln(signal / noise)
    ratio: Tensor  # of h to that of the last step; 0 in steps of first order
    second: Tensor  # whether the step is of second order
    stays: Tensor  # whether the step does not move, and keeps the history
    last: Tensor  # `last_moved`


def ratios(levels: Levels, first_order: Tensor | None) -> Ratios:
    """Compute the ratios of all steps; `first_order`: the steps that must be of first order."""
    moves = levels.gap != 0
    h = -torch.log1p(-levels.gap / torch.where(moves, levels.signal_s * levels.noise_t, 1.0))  # 0/0 at s = t = 0, 1
    last = last_moved(moves)
    ratio = torch.where(last >= 0, h / of_last(h, last, 1.0), torch.inf)
    second, stays = torch.isfinite(ratio) & (h > 0), ~moves & (last >= 0)
    if first_order is not None:
        first_order = first_order.reshape(first_order.shape + (1,) * (h.ndim - first_order.ndim))
        second, stays = second & ~first_order, stays & ~first_order
    return Ratios(h, torch.where(second, ratio, torch.zeros_like(h)), second, stays, last)


def last_moved(moves: Tensor) -> Tensor:
    """Return, for every step, the last step before it that moved; -1 if none did."""
    steps = torch.arange(len(moves), device=moves.device).reshape(-1, *(1,) * (moves.ndim - 1))
    found = torch.where(moves, steps, -1).cummax(0).values
    return torch.cat((torch.full_like(found[:1], -1), found[:-1]))


def of_last(values: Tensor, last: Tensor, none: float) -> Tensor:
    """Return the values in step `last`; `none` if there is no such step."""
    return torch.where(last >= 0, values.gather(0, last.clamp(min=0)), none)


def exact(nodes: Tensor, moments: Tensor) -> Tensor:
    """Return the integrals of Lagrange's polynomials of k nodes `[..., k]`: weights of the values there that integrate
    polynomials of degree below k exactly. `moments [..., k]` are the integrals of 1, u, u^2, ..."""
    weights = []
    for j, node in enumerate(nodes.unbind(-1)):
        powers = [torch.ones_like(node)]  # coefficients of the polynomial that is 1 at this node and 0 at the others
        for i, other in enumerate(nodes.unbind(-1)):
            if i != j:
                none, gap = torch.zeros_like(node), node - other
                pairs = zip([none, *powers], [*powers, none], strict=True)
                powers = [(lower - other * same) / gap for lower, same in pairs]
        weights.append(sum(one * moments[..., p] for p, one in enumerate(powers)))
    return torch.stack(weights, -1)  # type: ignore[arg-type]  # sums of tensors


def growing(h: Tensor, count: int) -> Tensor:
    """Return the integrals `[..., count]` of e^v (v / h)^p over v from 0 to h, p = 0, 1, ..."""
    moves = h != 0
    found, end = [torch.expm1(h)], torch.exp(h) * moves
    while len(found) < count:
        found.append(end - len(found) * found[-1] / torch.where(moves, h, 1.0))
    return torch.stack(found, -1)


def extrapolated(at: Tensor, order: int, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a multistep method whose integrand is a polynomial in `at` through its last values.

    Args:
        at: `[N + 1]` or `[N + 1, B]`.
        order: the largest number of values.
        moments: `[N, order]` or `[N, B, order]`: for each step the integrals of 1, u, u^2, ..., u = 0 at the start of
            the step and 1 at its end.

    Returns the weights `[..., order - 1]` of differences between earlier values and the newest, the later first, and
    bool `[...]`, the steps that do not move and keep the history. The first moved steps, and infinite ones, are of
    lower order.
    """
    h = at[1:] - at[:-1]
    moves = h != 0
    last = [last_moved(moves)]
    while len(last) < order - 1:
        last.append(of_last(last[0], last[-1], -1))
    nodes, weights = [torch.zeros_like(h)], torch.zeros_like(moments[..., 1:])
    usable = moves & torch.isfinite(h)
    for k, one in enumerate(last[: order - 1], 1):
        there = of_last(at[:-1], one, torch.nan) - at[:-1]
        usable = usable & torch.isfinite(there)
        nodes.append(torch.where(usable, there / torch.where(moves, h, 1.0), float(k)))
        found = exact(torch.stack(nodes, -1), moments[..., : k + 1])[..., 1:]
        weights[..., :k] = torch.where(usable.unsqueeze(-1), found, weights[..., :k])
    return weights, ~moves & (last[0] >= 0)


def multistep(x: Tensor, g: Tensor, made: tuple[Tensor, Tensor], weights: Tensor, stays: Tensor) -> Tensor:
    """Stack a table whose calls keep m, `made` of the sample and of the prediction. It is the step of first order, with
    factors x and g, plus the weighted differences between earlier m and this one."""
    back = -weights.sum(-1)
    moved = output(x + back * made[0], g + back * made[1], kept=weights[..., 0])
    kept = remembered(*made, stays)
    older = weights[..., None, 1:]
    return torch.cat((torch.cat((moved, older), -1), torch.cat((kept, torch.zeros_like(older)), -1)), -2)


def corrected(h: Tensor, ratio: Tensor, second: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what UniPC's corrector adds to a prediction, in units of signal_s B: the factors of the newest difference
    of x0, and of the difference before. `size` is B."""
    one = 1 + torch.expm1(-h) / h
    first, then = one / size, (1 - 2 * one / h) / size
    share = (first - then) * ratio / (1 + ratio)
    half = torch.full_like(h, 0.5)
    return torch.where(second, first - share, half), torch.where(second, (share - 0.5) * ratio, torch.zeros_like(h))


def output(x: Tensor, g: Tensor, kept: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Stack the factors of one output: `[N, 1, 4]`, or `[N, B, 1, 4]`."""
    none = torch.zeros_like(x)
    return torch.stack((x, g, none if kept is None else kept, none if z is None else z), -1).unsqueeze(-2)


def remembered(x: Tensor, g: Tensor, stays: Tensor) -> Tensor:
    """Make the second output: the new history or, in steps that stay, the old history."""
    none = torch.zeros_like(x)
    return output(torch.where(stays, none, x), torch.where(stays, none, g), kept=stays.to(x.dtype))


def slope(sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Return `(x - x0) / sigma` as factors of x and of the prediction, at signal 1. (Finite at 0, where runs end.)"""
    sigma = torch.where(sigma == 0, 1.0, sigma)
    one = torch.ones_like(sigma)
    alpha, beta = x0_coefficients(Levels(one, sigma, one, sigma, sigma), prediction)
    return (1 - alpha) / sigma, -beta / sigma


def late(added: Tensor) -> Tensor:
    """Move the noise of each step to the end of the step before."""
    return torch.cat((added[1:], torch.zeros_like(added[:1])))


def first_noise(added: Tensor) -> float | Tensor:
    """Return the scale of the noise that is added before the first call of the network."""
    if not len(added):
        return 0.0
    return float(added[0]) if added.ndim == 1 else added[0]


def raised(
    plan: str,
    sigmas: Tensor,
    prediction: str,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    **unknown: float,
) -> tuple[Tensor, Tensor]:
    """Compute sigma_hat of every step, and the scale of its noise, `s_noise sqrt(sigma_hat^2 - sigma^2)`."""
    if unknown:
        raise TypeError(f"{plan}: got `{next(iter(unknown))}`, expected s_churn, s_tmin, s_tmax or s_noise")
    plan_checks.sigmas(plan, sigmas, prediction)
    plan_checks.at_least_0(plan, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    plan_checks.finite_at_least_0(plan, s_noise=s_noise)
    at = sigmas[:-1]
    most = min(s_churn / max(len(at), 1), math.sqrt(2) - 1)
    gamma = torch.where((at >= float(s_tmin)) & (at <= float(s_tmax)), torch.full_like(at, most), 0.0)
    return at * (1 + gamma), float(s_noise) * at * torch.sqrt(gamma * (2 + gamma))
