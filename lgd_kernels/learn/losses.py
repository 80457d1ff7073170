"""Compute losses of omega on particles, each in one pass over memory. Source: arXiv 2510.00815.

All take `Particles` and omega as the kernels do: a float, `[B]`, or a looked-up table. They return one value for each
item, `[B]` float32 (float64 for float64 data), and are differentiable in omega any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgd_kernels.learn.particles import Particles
from lgd_kernels.ops.guided_energy.api import guided_energy
from lgd_kernels.ops.guided_energy.targets import Expected, Renoise
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup


def self_consistency_loss(
    particles: Particles,
    omega: float | Tensor | OmegaLookup,
    *,
    beta: float = 1.75,
    lam: float = 1.0,
    churn: float = 1.0,
    targets: int | None = None,
    unbiased: bool = True,
    impl: Impl | None = None,
) -> Tensor:
    """Compute the paper's loss: the energy of m guided particles against k targets, `signal_s x0 + noise_s z` each.

        L_i = 1/(m k) sum_jk ||x_s^j - y^k||^beta  -  lam/2 * 1/(m (m-1)) sum_{j != l} ||x_s^j - x_s^l||^beta

    `guided_energy` draws the noise and the targets, takes the step and computes the energy. The term between targets
    does not depend on omega and is left out: L may be negative, and only its differences have a meaning.

    Args:
        particles: of `draw`.
        omega: one weight for each item.
        beta, lam, unbiased, impl: as in `guided_energy`; 1.75 and 1 are the paper's.
        churn: of the step, in [0, 1]; 1 is the paper's in training.
        targets: k; by default the number of particles.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn.particles import draw
    >>> from lgd_kernels.learn.frozen import Frozen
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> s, t = torch.zeros(1), torch.ones(1)  # one step from noise: x_s = omega + 1, data are at 3
    >>> drawn = draw(frozen, torch.tensor([[3.0]]), torch.tensor([1]), s, t, seed=0)
    >>> self_consistency_loss(drawn, 0.0, beta=1.0), self_consistency_loss(drawn, 2.0, beta=1.0)
    (tensor([2.]), tensor([0.]))
    """
    target = Renoise(particles.x0, particles.x_t.shape[1] if targets is None else targets, particles.seed)
    return _energy(particles, omega, target, churn=churn, beta=beta, lam=lam, unbiased=unbiased, impl=impl)


def l2_loss(
    particles: Particles, omega: float | Tensor | OmegaLookup, *, churn: float = 1.0, impl: Impl | None = None
) -> Tensor:
    """Compute the least-squares variant, beta = 2 and lam = 0, with the targets' noise integrated out.

        L_i = 1/m sum_j ||x_s^j - signal_s x0||^2 + noise_s^2 D

    This loss is biased: no term makes the particles spread as the data do, and even an exact denoiser is guided, with
    omega = signal_t A / B on average, A and B the step's factors of x_t and of the prediction (docs/math.md).

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn.particles import draw
    >>> from lgd_kernels.learn.frozen import Frozen
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> drawn = draw(frozen, torch.tensor([[3.0]]), torch.tensor([1]), torch.zeros(1), torch.ones(1), seed=0)
    >>> l2_loss(drawn, 0.5)  # (3 - 1.5)^2
    tensor([2.2500])
    """
    return _energy(particles, omega, Expected(particles.x0), churn=churn, beta=2.0, lam=0.0, impl=impl)


def guided_score_matching_loss(
    particles: Particles, omega: float | Tensor | OmegaLookup, *, impl: Impl | None = None
) -> Tensor:
    """Compute the squared error of the guided prediction, `1/m sum_j ||x0 - g^j||^2`: for study, **not to train with**.

    g is the guided prediction in x0 space. This loss compares means at one time, and not the law of samples: its least
    is at `E <x0 - cond, cond - uncond> / E ||cond - uncond||^2` for every s, and that is 0 for a denoiser that is the
    conditional mean, however its samples differ from the data after a step (docs/math.md; the paper's appendix C.1).

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn.particles import draw
    >>> from lgd_kernels.learn.frozen import Frozen
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> drawn = draw(frozen, torch.tensor([[3.0]]), torch.tensor([1]), torch.full((1,), 0.2), torch.ones(1), seed=0)
    >>> guided_score_matching_loss(drawn, 0.5)  # (3 - 1.5)^2
    tensor([2.2500])
    """
    particles = particles._replace(levels=to_data(particles.levels))
    return _energy(particles, omega, Expected(particles.x0), churn=0.0, beta=2.0, lam=0.0, impl=impl)


def to_data(levels: Levels) -> Levels:
    """Return the levels of the step from t to the data, whose result is the guided prediction in x0 space."""
    one = torch.ones_like(levels.noise_t)
    return Levels(levels.signal_t, levels.noise_t, one, torch.zeros_like(one), levels.noise_t)


def _energy(p: Particles, omega: float | Tensor | OmegaLookup, target: Renoise | Expected, **options: Any) -> Tensor:
    return guided_energy(p.x_t, p.cond, p.uncond, omega, p.levels, target, **p.options(), **options)
