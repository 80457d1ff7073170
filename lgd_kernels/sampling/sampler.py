"""Run a plan: call the network, take the step of the plan, repeat."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.guidance.rules import Rule
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup
from lgd_kernels.sampling.step_plan import StepPlan


def sample(
    denoiser: Callable[[Tensor, Tensor, Any], Tensor],
    x: Tensor,
    plan: StepPlan,
    cond: Any,
    uncond: Any = None,
    omega: float | Tensor | OmegaLookup | Callable[[Any, Tensor, Tensor], Tensor] = 0.0,
    *,
    condition: Tensor | None = None,
    rule: Rule | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    callback: Callable[[int, Tensor], None] | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Run a plan from x to the data: `for t in plan.times: x = step(x, denoiser(x, t, cond), denoiser(x, t, uncond))`.

    Args:
        denoiser: called as `denoiser(x, t, condition)` with t `[B]`; returns what the plan's `prediction` names.
        x: the noise at the first time, `[B, ...]` (for EDM, times its sigma).
        plan: of `lgd_kernels.solvers`; call `plan.to(device)` beforehand to avoid copies. A plan of times `[N + 1, B]`
            gives every sample its own times.
        cond, uncond: conditions of any type that the denoiser takes; without uncond nothing is guided.
        omega: a float; `[B]`; `[N, B]`, one row for each call of the network; or an `OmegaTable`, a network or any
            other function `omega(c, s, t) -> [B]` of times of the plan's schedule. A function is called once, before
            the loop, with N * B rows: t is the time of a call, s the time where a step from t ends (`plan.ends`). (The
            result of `table.at` is one weight for each sample, the same in all calls.) Without a rule, calls where all
            of omega is 0 skip the unconditional network, so limited intervals cost less. If `omega.prediction` and
            `plan.prediction` are known and differ, `sample` warns (UserWarning): the plan misreads the model's output.
        condition: the c of such a function, integers `[B]` or vectors `[B, E]`. The default is `cond` if it has that
            form (a table takes integers only), else None: a table with one condition, and functions that do not depend
            on c, need none.
        rule: as in `guided_step`, in the space of the prediction.
        seed: of solvers that draw: an int, a 0-dim int64 tensor or `[B]`. Each step draws from `seed + (step << 32)`,
            so seeds that differ by less than 2^32 share no noise.
        callback: called as `callback(step, x)` after each step.

    Returns x at the end, in the dtype of x. Differentiable, and raises TypeError or ValueError, as `StepPlan.step`.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.sampling import solvers
    >>> plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(1, 0, 5))
    >>> cond, uncond = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    >>> sample(lambda x, t, c: c.expand_as(x), torch.zeros(1, 2), plan, cond, uncond, 0.5)
    tensor([[4., 4.]])
    >>> knots = torch.linspace(0, 1, 3)
    >>> table = lgd.OmegaTable(torch.full((10, 3, 3), 0.5), knots, knots)
    >>> label = torch.tensor([7])
    >>> sample(lambda x, t, c: c.expand_as(x), torch.zeros(1, 2), plan, cond, uncond, table, condition=label)
    tensor([[4., 4.]])
    """

    checks.samples("sample", x=x)
    if not isinstance(plan, StepPlan):
        raise TypeError(
            f"sample: `plan` is a {type(plan).__name__}, expected a StepPlan, as lgd_kernels.solvers make it"
        )
    if len(plan):
        checks.function("sample", "denoiser", denoiser)
    if impl is not None:
        impls.named("sample", impl)
    if rule is not None:
        checks.function("sample", "rule", rule)
    if callback is not None:
        checks.function("sample", "callback", callback)
    same_prediction(omega, plan)
    batch, steps = x.shape[0], len(plan)
    if seed is not None:
        checks.seed("sample", seed, first_sample, batch, None)
    weights: float | Tensor | OmegaLookup
    if callable(omega):
        weights = 0.0 if uncond is None else _run_of(omega, condition, cond, plan, x)
    else:
        weights = omega
    rows = weights if isinstance(weights, Tensor) and weights.ndim == 2 else None
    if rows is not None and rows.shape != (steps, batch):
        raise ValueError(
            f"sample: `omega` has shape {list(rows.shape)}, expected [N, B] = [{steps}, {batch}], a row for each call "
            "of the network; or [B], or a number"
        )
    if uncond is not None and rows is None:
        checks.omega("sample", weights, "x", x)
    guided = _guided(weights, steps) if uncond is not None else [False] * steps
    if plan.start.any() if isinstance(plan.start, Tensor) else plan.start:
        if seed is None:
            raise ValueError("sample: the plan adds noise to its first sample; pass seed=...")
        x = started(x, plan, seed, first_sample, impl)
    kept: Tensor | tuple[Tensor, ...] | None = None
    for i, t in enumerate(plan.times):
        times = t.to(x.device).expand(batch)
        c = denoiser(x, times, cond)
        u = denoiser(x, times, uncond) if guided[i] or (rule is not None and uncond is not None) else None
        weight = 0.0 if u is None else weights if rows is None else rows[i]
        drawn: dict[str, Any] = {} if seed is None else {"seed": seed_of(seed, i), "first_sample": first_sample}
        x, kept = plan.step(i, x, c, u, weight, kept, rule=rule, impl=impl, **drawn)
        if callback is not None:
            callback(i, x)
    return x


def started(x: Tensor, plan: StepPlan, seed: int | Tensor, first_sample: int = 0, impl: Impl | None = None) -> Tensor:
    """Add the noise of `plan.start`, which goes in before the first call of the network."""
    ones = torch.ones(x.shape[0], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    start = plan.start.to(x.device) if isinstance(plan.start, Tensor) else plan.start
    drawn = seed_of(seed, len(plan))
    found = combine((x,), ones, noise_scale=start, seed=drawn, first_sample=first_sample, impl=impl)
    assert isinstance(found, Tensor)
    return found


def _run_of(
    omega: Callable[[Any, Tensor, Tensor], Tensor],
    condition: Tensor | None,
    cond: Any,
    plan: StepPlan,
    x: Tensor,
) -> Tensor:
    """Compute omega(c, s, t) of every call and sample, `[N, B]`."""
    batch, steps = x.shape[0], len(plan)
    if plan.ends is None:
        raise ValueError(
            "sample: `plan.ends` is None, expected the times where steps end, the s of omega(c, s, t); "
            "dataclasses.replace(plan, ends=...) sets them"
        )
    c = _condition(omega, cond, batch) if condition is None else condition
    if c is not None and (not isinstance(c, Tensor) or c.shape[:1] != (batch,)):
        said = str(list(c.shape)) if isinstance(c, Tensor) else f"a {type(c).__name__}"
        raise ValueError(f"sample: `condition` is {said}, expected a tensor [B] or [B, E] with B = {batch}")
    c = None if c is None else c.to(x.device).repeat(steps, *(1,) * (c.ndim - 1))
    s, t = (times.to(x.device).reshape(steps, -1).expand(steps, batch).flatten() for times in (plan.ends, plan.times))
    found = omega(c, s, t)
    if not isinstance(found, Tensor) or found.shape != t.shape:
        said = str(list(found.shape)) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"sample: `omega` returned {said}, expected a tensor {list(t.shape)}, a weight for each of its s and t"
        )
    return found.view(steps, batch)


def _condition(omega: Callable[..., Tensor], cond: Any, batch: int) -> Tensor | None:
    """Return the default c of omega, or raise TypeError if omega needs a c that `cond` does not give."""
    values = getattr(omega, "values", None)  # of a table, [C, S, T]
    table = isinstance(values, Tensor)
    if isinstance(values, Tensor) and len(values) == 1:
        return None
    if isinstance(cond, Tensor) and cond.shape[:1] == (batch,):
        labels = cond.ndim == 1 and not cond.is_floating_point() and not cond.is_complex() and cond.dtype != torch.bool
        if labels or (cond.ndim == 2 and cond.is_floating_point() and not table):
            return cond
    if not table and getattr(omega, "classes", None) is None and getattr(omega, "embedding", None) is None:
        return None
    said = f"{cond.dtype} {list(cond.shape)}" if isinstance(cond, Tensor) else f"a {type(cond).__name__}"
    raise TypeError(
        f"sample: `cond` is {said}, which does not say what c is in omega(c, s, t) of the {type(omega).__name__}; "
        f"pass condition=..., integers [B] = [{batch}], or vectors [B, E] for a network of embeddings"
    )


def same_prediction(omega: object, plan: StepPlan) -> None:
    """Warn if omega was learned with another prediction than that of the plan."""
    learned = getattr(omega, "prediction", None)
    if learned is not None and plan.prediction is not None and learned != plan.prediction:
        warnings.warn(
            f"sample: `omega` was learned with prediction={learned!r}, but the plan has prediction="
            f"{plan.prediction!r}; make the plan with prediction={learned!r}, or, if the model now returns "
            f"{plan.prediction}, set omega.prediction = {plan.prediction!r}",
            stacklevel=3,
        )


def _guided(omega: float | Tensor | OmegaLookup, steps: int) -> list[bool]:
    """Return which calls have an omega other than 0: one device sync, before the loop. Omega that requires grad is
    always used."""
    if not isinstance(omega, Tensor):
        return [omega != 0] * steps
    if omega.requires_grad:
        return [True] * steps
    return omega.ne(0).any(1).tolist() if omega.ndim == 2 else [bool(omega.any())] * steps


def seed_of(seed: int | Tensor, step: int) -> int | Tensor:
    """Return the seed of a step: an int64 that wraps, as in a tensor."""
    if isinstance(seed, Tensor):
        return seed + (step << 32)
    return (seed + (step << 32) + 2**63) % 2**64 - 2**63
