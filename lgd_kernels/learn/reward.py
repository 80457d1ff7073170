"""Add a reward of the guided prediction to a loss: `L + gamma L_R` with `L_R = -E R(g(x_t, c; omega), c)`.

g is the guided one-step estimate of x0 at time t, of the same particles as the loss. The reward is any callable
`(x0 [N, ...], c [N, ...]) -> [N]`. Source: arXiv 2510.00815, its section on reward-guided sampling; gamma is gamma_R
there, and no value is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lgd_kernels.guidance.api import guided_step
from lgd_kernels.learn.losses import self_consistency_loss, to_data
from lgd_kernels.learn.particles import Particles
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup, omega_at
from lgd_kernels.runtime.philox import STREAM_REWARD, philox_normal

Reward = Callable[[Tensor, Tensor], Tensor]  # (x0 [N, ...], c [N, ...]) -> [N]
Loss = Callable[[Particles, Tensor], Tensor]  # (particles, omega [B]) -> [B]
Estimate = Callable[[Particles, Tensor, Reward], Tensor]  # (particles, omega [B], reward) -> [B]


def reward_loss(
    particles: Particles, omega: float | Tensor | OmegaLookup, reward: Reward, *, impl: Impl | None = None
) -> Tensor:
    """Compute `-1/m sum_j R(g^j, c)` for each item, `[B]`, for a reward that PyTorch can differentiate.

    The gradient to omega is `-1/m sum_j <dR/dg^j, B (cond^j - uncond^j)>`, B from prediction to x0: through the reward,
    not through the denoiser.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn import Frozen, draw
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> drawn = draw(frozen, torch.zeros(1, 1), torch.tensor([2]), torch.zeros(1), torch.ones(1), seed=0)
    >>> omega = torch.tensor([0.5], requires_grad=True)  # g = 2 (1 + omega) = 3
    >>> loss = reward_loss(drawn, omega, lambda x0, c: -x0.square().sum(1))
    >>> loss, torch.autograd.grad(loss, omega)  # g^2, and 2 g dg/domega
    (tensor([9.], grad_fn=<NegBackward0>), (tensor([12.]),))
    """
    wide = torch.promote_types(particles.x0.dtype, torch.float32)
    checks.omega("reward_loss", omega, "particles.x0", particles.x0)
    weight = omega_at(omega, torch.empty(0, dtype=wide, device=particles.x0.device)).expand(len(particles.x0))
    return -_rewards(particles, _each(weight, particles), reward, impl).mean(1)


def black_box_reward_loss(
    particles: Particles, omega: Tensor, reward: Reward, *, sigma: float = 0.2, impl: Impl | None = None
) -> Tensor:
    """Compute the same for a reward without a gradient: one value for each particle, and a slope by a score function.

    Each particle is guided by another omega, omega + sigma e_j with e_j standard normal. The gradient of the reward
    that is smoothed so is `d/domega E R(g(omega + sigma e)) = E [R e / sigma]`, and the estimate

        1/m sum_j (R_j - b_j) e_j / sigma        b_j the mean of R over the item's other particles

    is unbiased: b_j does not depend on e_j. The smoothed reward has the slope of the reward itself if that is quadratic
    in omega; otherwise the slope is off by `sigma^2 / 2 R'''` to first order. A small sigma has a smaller bias and a
    larger variance, with a term of (spread of R over the particles)^2 / (m sigma^2).

    Args:
        particles: of `draw`, m at least 2.
        omega: `[B]`.
        reward: called once, under no_grad.
        sigma: the standard deviation of omega, above 0. This default is ours; the paper has no such estimator.

    Returns `-1/m sum_j R_j` `[B]`, whose gradient to omega is minus the estimate; differentiable once. e comes from
    stream 4 of the particles' seed: the same however a batch is split.

    Source: Williams 1992 (score function) and Salimans et al. 2017, arXiv 1703.03864 (smoothing).

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn import Frozen, draw
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> s, t, c = torch.zeros(4000), torch.ones(4000), torch.full((4000,), 2)
    >>> drawn = draw(frozen, torch.zeros(4000, 1), c, s, t, seed=0)
    >>> omega = torch.full((4000,), 0.5, requires_grad=True)  # g = 2 (1 + omega) = 3
    >>> loss = black_box_reward_loss(drawn, omega, lambda x0, c: -x0.square().sum(1)).mean()
    >>> bool((torch.autograd.grad(loss, omega)[0].sum() - 12).abs() < 0.5)
    True
    """
    checks.tensor("black_box_reward_loss", "omega", omega)
    checks.per_sample("black_box_reward_loss", "omega", omega, "particles.x0", particles.x0)
    m = particles.x_t.shape[1]
    if not 0 < sigma < math.inf:
        raise ValueError(f"black_box_reward_loss: `sigma` is {sigma}, expected a finite spread above 0")
    if m < 2:
        raise ValueError("black_box_reward_loss: one particle has no baseline; draw two or more")
    with torch.no_grad():
        first = particles.first_sample * m
        e = philox_normal(
            (omega.numel() * m,), particles.seed, stream=STREAM_REWARD, first_sample=first, device=omega.device
        ).view(-1, m)
        rewards = _rewards(particles, (omega[:, None] + sigma * e).flatten(), reward, impl)  # [B, m]
        others = (rewards.sum(1, keepdim=True) - rewards) / (m - 1)
        slope = ((rewards - others) * e).mean(1) / sigma
    return -rewards.mean(1) - slope * (omega - omega.detach())


def with_reward(
    reward: Reward, gamma: float, loss: Loss = self_consistency_loss, *, estimate: Estimate = reward_loss
) -> Loss:
    """Return the loss `L + gamma L_R`, for `Trainer(..., loss=...)`.

    Args:
        reward: `(x0 [N, ...], c [N, ...]) -> [N]`.
        gamma: the paper's gamma_R; with 0 the result is L. The scales of L and R differ, so try several values.
        loss: L.
        estimate: `reward_loss`, or `black_box_reward_loss` for a reward without a gradient.

    >>> import torch
    >>> from lgd_kernels.learn import l2_loss
    >>> loss = with_reward(lambda x0, c: -x0.square().sum(1), gamma=0.1, loss=l2_loss)
    """
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
        raise TypeError(f"with_reward: `gamma` is a {type(gamma).__name__}, expected a float")
    if not math.isfinite(gamma):
        raise ValueError(f"with_reward: `gamma` is {gamma}, expected a finite number")
    if gamma == 0:
        return loss

    def total(particles: Particles, omega: Tensor) -> Tensor:
        return loss(particles, omega) + gamma * estimate(particles, omega, reward)

    return total


def _each(values: Tensor, particles: Particles) -> Tensor:
    """Repeat `[B]` to `[B m]`, a value for each particle."""
    return values.repeat_interleave(particles.x_t.shape[1], 0)


def _rewards(particles: Particles, omega: Tensor, reward: Reward, impl: Impl | None) -> Tensor:
    """Return R of each particle `[B, m]`, guided by weights `[B m]` in a step from t to the data."""
    x, cond, uncond = (data.flatten(0, 1) for data in (particles.x_t, particles.cond, particles.uncond))
    levels = Levels(*(_each(level, particles) for level in to_data(particles.levels)))
    x0 = guided_step(x, cond, uncond, omega, levels, prediction=particles.prediction, impl=impl)
    found = reward(x0, _each(particles.c, particles))
    if not isinstance(found, Tensor) or found.shape != (len(x0),):
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"reward returned {came} for x0 {list(x0.shape)}, expected a tensor [{len(x0)}]")
    return found.view(particles.x_t.shape[:2])
