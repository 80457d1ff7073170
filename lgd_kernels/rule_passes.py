"""Runs a rule: a moments pass where it asks for moments, then one combine. What `rule=` in guided_score and guided_step
comes to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.levels import Levels, OmegaLookup, arithmetic_dtype, omega_at, step_coefficients, x0_coefficients
from lgd_kernels.rules import Pair, Rule

SPACES = ("prediction", "x0")


def guided_score(cond: Tensor, uncond: Tensor, omega: float | Tensor | OmegaLookup, rule: Rule, impl: str | None):
    """`cond_weight c + delta_weight D`."""
    tensors, delta, m = _read("guided_score", rule, cond, uncond, impl)
    to_cond, to_delta, to_x = _weights("guided_score", rule, m, omega, cond)
    if isinstance(to_x, Tensor) or to_x != 0:
        raise ValueError("guided_score: `rule` reads x, which guided_score does not have; guided_step takes it")
    return _combine(tensors, (to_cond, to_delta), (0, delta), impl)


def guided_step(x, cond, uncond, omega, levels, prediction, churn, noise, seed, first_sample, rule, space, impl):
    """One guided step, by a rule in the space of the prediction or of x0."""
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=arithmetic_dtype(x, cond, uncond, noise)))
    levels = Levels(*(level.to(wide) for level in levels))
    in_x0 = space == "x0" and prediction != "x0"
    tensors, delta, m = _read("guided_step", rule, cond, uncond, impl, (x, levels, prediction) if in_x0 else None)
    kept, to_cond, to_delta, to_x = (1.0, *_weights("guided_step", rule, m, omega, x))
    if in_x0:  # g = to_cond (alpha x + beta c) + to_delta beta D + to_x x
        alpha, beta = x0_coefficients(levels, prediction)
        kept, prediction = beta, "x0"
        to_x = to_x + to_cond * alpha
    a, b, v = step_coefficients(levels, prediction, churn)
    factors = [a + b * to_x, b * kept * to_cond, b * kept * to_delta]
    columns = [0, 1, delta + 1 if isinstance(delta, int) else (1, 2)]
    tensors = [x, *tensors]
    quiet = isinstance(churn, (int, float)) and churn == 0
    if noise is not None and not (quiet and not noise.requires_grad):
        tensors, factors, columns = [*tensors, noise], [*factors, v], [*columns, len(tensors)]
    drawn = {} if seed is None or quiet else {"noise_scale": v, "seed": seed, "first_sample": first_sample}
    return _combine(tensors, factors, columns, impl, **drawn)


def _read(op: str, rule: Rule, cond: Tensor, uncond: Tensor, impl: str | None, step=None):
    """The tensors of the predictions, which column of them is D, and their moments, unread."""
    from lgd_kernels.ops.moments.api import moments

    if not callable(rule):
        raise TypeError(f"{op}: `rule` is a {type(rule).__name__}, expected a function of (moments, omega), see rules")
    tensors, delta, u = (cond, uncond), (0, 1), 1
    if hasattr(rule, "difference"):  # D by the rule's own account
        if step is not None:
            raise ValueError(f'{op}: `rule` keeps a difference of predictions, expected rule_space="prediction"')
        tensors, delta, u = (cond, rule.difference(cond, uncond, impl)), 1, (0, 1)
    count = math.prod(cond.shape[1:])

    def read():
        if step is None:
            return _wide(moments(tensors, columns=(0, u, delta), impl=impl))
        return _x0_moments(*step, cond, uncond, impl)

    return tensors, delta, Pair(read, count)


def _x0_moments(x, levels, prediction, cond, uncond, impl):
    """c and u in x0 space, written in float32, are two reads more; D stays a difference of predictions, scaled."""
    from lgd_kernels.ops.combine.api import combine
    from lgd_kernels.ops.moments.api import moments

    alpha, beta = x0_coefficients(levels, prediction)
    none = torch.zeros_like(alpha)
    factors = torch.stack((torch.stack((alpha, beta, none), 1), torch.stack((alpha, none, beta), 1)), 1)
    c, u = combine((x.to(arithmetic_dtype(x, cond, uncond)), cond, uncond), factors, impl=impl)
    dots, sums = _wide(moments((c, u, cond, uncond), columns=(0, 1, (2, 3)), impl=impl))
    scale = torch.stack((torch.ones_like(beta), torch.ones_like(beta), beta), 1)
    return dots * scale[:, :, None] * scale[:, None, :], sums * scale


def _wide(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rules count in float64: a handful of numbers for each sample."""
    dots, sums = found
    return (dots, sums) if dots.device.type == "mps" else (dots.double(), sums.double())


def _weights(op: str, rule: Rule, m: Pair, omega: float | Tensor | OmegaLookup, like: Tensor):
    w = omega_at(omega, like.new_empty(0, dtype=arithmetic_dtype(like)))
    found = rule(m, w.expand(like.shape[0]) if w.ndim == 0 else w)
    if not isinstance(found, tuple) or not 2 <= len(found) <= 3:
        raise TypeError(f"{op}: `rule` returned a {type(found).__name__}, expected Guidance(cond, delta), see rules")
    return found if len(found) == 3 else (*found, 0.0)


def _combine(tensors, factors, columns, impl, **drawn):
    from lgd_kernels.ops.combine.api import combine

    batch = tensors[0].shape[0]
    ones = [one for one in factors if not isinstance(one, Tensor)]
    if ones:
        like = next((one for one in factors if isinstance(one, Tensor)), None)
        like = tensors[0].new_ones(batch, dtype=arithmetic_dtype(*tensors)) if like is None else like
        factors = [one if isinstance(one, Tensor) else torch.full_like(like, one) for one in factors]
    return combine(tensors, torch.stack(factors, 1), columns=columns, impl=impl, **drawn)
