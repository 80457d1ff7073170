"""A sampling loop that reads like the algorithm: call the network, take the plan's step, go on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lgd_kernels.ops.combine.api import combine
from lgd_kernels.rules import Rule
from lgd_kernels.solvers import StepPlan


def sample(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    plan: StepPlan,
    cond: Tensor,
    uncond: Tensor | None = None,
    omega: float | Tensor = 0.0,
    *,
    rule: Rule | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    callback: Callable[[int, Tensor], None] | None = None,
    impl: str | None = None,
) -> Tensor:
    """Runs a plan from x to the data: `for t in plan.times: x = step(x, denoiser(x, t, cond), denoiser(x, t, uncond))`.

    Args:
        denoiser: called as `denoiser(x, t, condition)` with t `[B]`; returns what the plan's `prediction` names.
        x: the noise at the first time, `[B, ...]` (for EDM, times its sigma).
        plan: of `lgd_kernels.solvers`; `plan.to(device)` beforehand spares copies. Made of times `[N + 1, B]` it takes
            every sample through times of its own.
        cond, uncond: conditions, whatever the denoiser takes; without uncond nothing is guided.
        omega: a float; `[B]`; or the whole table `[N, B]`, one row for each call of the network. omega does not depend
            on x, so a learned one is worked out before the loop. Calls where all of it is 0 leave the unconditional
            network out, without a rule: limited intervals cost what they should.
        rule: as in `guided_step`, in the space of the prediction.
        seed: of solvers that draw: an int, a 0-dim int64 tensor or `[B]`. Each step draws from `seed + (step << 32)`,
            so seeds that are apart by less than 2^32 share no noise.
        callback: `callback(step, x)` after each step.

    Returns x at the end, in its dtype. Differentiable as the steps are. Raises TypeError or ValueError, as they do.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels import solvers
    >>> plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(1, 0, 5))
    >>> cond, uncond = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    >>> sample(lambda x, t, c: c.expand_as(x), torch.zeros(1, 2), plan, cond, uncond, 0.5)
    tensor([[4., 4.]])
    """

    batch, steps = x.shape[0], len(plan)
    if isinstance(omega, Tensor) and omega.ndim == 2 and omega.shape != (steps, batch):
        raise ValueError(
            f"sample: `omega` has shape {list(omega.shape)}, expected [N, B] = [{steps}, {batch}], a row for each call "
            "of the network; or [B], or a number"
        )
    rows = omega if isinstance(omega, Tensor) and omega.ndim == 2 else [omega] * steps
    guided = _guided(omega, steps) if uncond is not None else [False] * steps
    if plan.start.any() if isinstance(plan.start, Tensor) else plan.start:
        if seed is None:
            raise ValueError("sample: the plan adds noise to its first sample; pass seed=...")
        ones = torch.ones(batch, 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        start = plan.start.to(x.device) if isinstance(plan.start, Tensor) else plan.start
        x = combine((x,), ones, noise_scale=start, seed=seed_of(seed, steps), first_sample=first_sample, impl=impl)
    kept = None
    for i, t in enumerate(plan.times):
        times = t.to(x.device).expand(batch)
        c = denoiser(x, times, cond)
        u = denoiser(x, times, uncond) if guided[i] or (rule is not None and uncond is not None) else None
        drawn = {} if seed is None else {"seed": seed_of(seed, i), "first_sample": first_sample}
        x, kept = plan.step(i, x, c, u, rows[i] if u is not None else 0.0, kept, rule=rule, impl=impl, **drawn)
        if callback is not None:
            callback(i, x)
    return x


def _guided(omega: float | Tensor, steps: int) -> list[bool]:
    """Which calls have an omega that is not 0. One look, before the loop; one that requires grad is always used."""
    if not isinstance(omega, Tensor):
        return [omega != 0] * steps
    if omega.requires_grad:
        return [True] * steps
    return omega.ne(0).any(1).tolist() if omega.ndim == 2 else [bool(omega.any())] * steps


def seed_of(seed: int | Tensor, step: int) -> int | Tensor:
    """Of a step; an int64 that wraps, as a tensor's does."""
    if isinstance(seed, Tensor):
        return seed + (step << 32)
    return (seed + (step << 32) + 2**63) % 2**64 - 2**63
