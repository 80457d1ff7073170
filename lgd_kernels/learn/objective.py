"""Compute the self-consistency loss of given particles, and draw the times that omega is learned at."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.api import guided_energy
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import Levels


def particle_energy(
    x_s: Tensor, targets: Tensor, beta: float = 1.75, lam: float = 1.0, unbiased: bool = True
) -> Tensor:
    """Compute the energy loss of m guided particles against k re-noised targets, one value for each item.

    Use it for particles made by several steps, or by another solver. For particles made by one `guided_step`,
    `lgd_kernels.guided_energy` takes the step and draws noise and targets in the same pass.

        L_i = 1/(m k) sum_jk ||x_s^j - y^k||^beta  -  lam/2 * 1/(m (m-1)) sum_{j != j'} ||x_s^j - x_s^j'||^beta

    For an item (x0, c, s, t) the targets are `y^k = signal_s x0 + noise_s z` and the particles `x_s^j` come from one
    guided step from `x_t^j = signal_t x0 + noise_t z'`. **z and z' must be independent**: with shared noise
    targets depend on their particles, and the loss degenerates. In expectation L_i is half the squared energy distance
    between the two laws (lam = 1), up to the target-target term, which does not depend on omega and is left out: L
    may be negative, and only its differences have a meaning.

    Args:
        x_s: guided particles `[B, m, ...]`.
        targets: `[B, k, ...]`, same trailing shape; m and k may differ.
        beta: power of the distance, in (0, 2].
        lam: weight of the repulsion between particles, in [0, 1]. beta = 2, lam = 0 is the L2 variant, which is
            biased: its least loss guides even an exact denoiser.
        unbiased: average over the m (m-1) pairs of different particles; False divides by m^2 instead.

    Returns `[B]`, float32 (float64 for float64 input).

    Differentiable in `x_s` and `targets`. Where two points coincide, the gradient of their distance is 0
    by definition (for beta <= 1 the distance has no slope there, and PyTorch's chain rule would give NaN).

    Source: Galashov et al., arXiv 2510.00815, Eq. 9 and 17-22; beta = 1.75, lam = 1 and m = 4 are the paper's.

    >>> import torch
    >>> x_s = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])      # B = 1, m = 2
    >>> y = torch.tensor([[[0.0, 0.0]]])                    # k = 1
    >>> particle_energy(x_s, y, beta=1.0, lam=1.0)    # (0 + 2) / 2 - 1/2 * (2 + 2) / 2
    tensor([0.])
    """
    for name, value in (("x_s", x_s), ("targets", targets)):
        checks.tensor("particle_energy", name, value)
    if x_s.dim() < 2 or targets.dim() != x_s.dim() or x_s.shape[2:] != targets.shape[2:]:
        raise ValueError(
            f"particle_energy: x_s {list(x_s.shape)} and targets {list(targets.shape)} must be [B, m, ...] "
            "and [B, k, ...] with the same trailing shape"
        )
    if len(x_s) != len(targets):
        raise ValueError(f"particle_energy: x_s holds {len(x_s)} items, targets {len(targets)}")
    checks.power("particle_energy", beta, lam, unbiased, x_s.shape[1])
    dtype = torch.promote_types(torch.promote_types(x_s.dtype, targets.dtype), torch.float32)
    x_s, targets = x_s.to(dtype), targets.to(dtype)
    nothing = x_s.new_zeros(()).expand_as(x_s)
    one = x_s.new_ones(len(x_s))
    stay = Levels(one, one, one, one, torch.zeros_like(one))  # a step from s to s is the identity
    return guided_energy(
        x_s, nothing, nothing, 0.0, stay, targets, beta=beta, lam=lam, unbiased=unbiased, impl="reference"
    )


def sample_times(
    batch: int,
    delta: float = 0.1,
    zeta: float = 0.01,
    s_min: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pairs of unit times to learn at: `s ~ U[s_min, 1 - zeta - delta]`, then `t = s + U[delta, 1 - zeta - s]`.

    Unit times run from 0 (data) to 1 (noise); `schedule.from_unit` makes them the times of a schedule.

    Args:
        batch: the number of pairs.
        delta: the shortest step that is learned from. In the paper 0.1 was the best of 0.01, 0.1, 0.2, 0.3.
        zeta: t is below 1 - zeta. The paper does not state it: this default is ours.
        s_min: the smallest s. The paper does not state it: this default is ours.
        generator: draws the numbers, on its device.

    Returns `(s, t)`, each `[batch]` float32. Source: Galashov et al., arXiv 2510.00815.

    >>> s, t = sample_times(1000, delta=0.1)
    >>> bool((t - s > 0.0999).all() and (t < 0.9901).all())
    True
    """
    check_times("sample_times", delta, zeta, s_min)
    checks.count("sample_times", "batch", batch)
    device = generator.device if generator is not None else None
    u, v = torch.rand(2, batch, generator=generator, device=device, dtype=torch.float32)
    s = s_min + (1 - zeta - delta - s_min) * u
    t = s + delta + (1 - zeta - s - delta) * v
    return s, t


def check_times(where: str, delta: float, zeta: float, s_min: float) -> None:
    """Raise ValueError if no pair of times is left."""
    if not (delta > 0 and zeta >= 0 and s_min >= 0 and s_min <= 1 - zeta - delta):
        raise ValueError(
            f"{where}: delta = {delta}, zeta = {zeta}, s_min = {s_min} leave no times: expected delta > 0 and "
            "0 <= s_min <= 1 - zeta - delta"
        )


def sample_s(
    t: Tensor, delta: float = 0.1, zeta: float = 0.01, s_min: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Draw other s for unit times t of `sample_times`, from the same law: with `g = 1 - zeta - delta`,

        p(s | t) = 1 / (g - s), up to a factor, from s_min to t - delta

    A prediction at t serves every s: curves of other steps from the same particles need no pass over the model.

    Args: as in `sample_times`. Returns s in the shape of t.

    >>> s, t = sample_times(1000)
    >>> other = sample_s(t)
    >>> bool((other >= 0.0099).all() and (t - other > 0.0999).all())
    True
    """
    check_times("sample_s", delta, zeta, s_min)
    end = 1 - zeta - delta
    u = torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float32)
    least = torch.finfo(t.dtype).tiny  # at t = 1 - zeta, where s may take its largest value
    shrinks = ((end + delta - t) / (end - s_min)).clamp(least, 1.0)  # rounding may leave the range
    return end - (end - s_min) * shrinks**u
