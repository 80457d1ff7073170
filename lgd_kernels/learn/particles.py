"""Draw what omega is learned from: items noised to t, m times over, and the denoiser's predictions from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.ops.guided_energy.api import guided_energy_curve
from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.ops.guided_energy.targets import Renoise
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, Prediction, per_sample
from lgd_kernels.runtime.philox import STREAM_PARTICLES, philox_normal


class Particles(NamedTuple):
    """Hold B items with m particles each: all inputs of a loss except omega.

    No field depends on omega: particles drawn once serve any number of omegas and of losses. A loss draws the noise of
    its step and of its targets with `seed`; x_t was drawn with the same seed from another stream.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: 0 * x, lgd.RectifiedFlow(), null=0)
    >>> half = torch.full((3,), 0.5)
    >>> drawn = draw(frozen, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), half / 2, half, particles=5, seed=1)
    >>> drawn.x_t.shape, drawn.take(torch.tensor([2]), seed=2).x_t.shape
    (torch.Size([3, 5, 2]), torch.Size([1, 5, 2]))
    """

    c: Tensor  # [B] int64 labels, or [B, E] embeddings
    s: Tensor  # [B], times of the schedule
    t: Tensor  # [B]
    levels: Levels
    x0: Tensor  # [B, ...]
    x_t: Tensor  # [B, m, ...], like the predictions
    cond: Tensor
    uncond: Tensor
    prediction: Prediction
    seed: int | Tensor
    first_sample: int = 0  # index of the first item in the whole batch, if that is split over processes

    def take(self, items: Tensor, seed: int | Tensor, first_sample: int = 0) -> Particles:
        """Return some of the items, int64 `[B']`, for a loss that draws fresh noise with another seed."""
        some = self.mapped(lambda part: part.index_select(0, items))  # several times as fast as indexing
        return some._replace(seed=seed, first_sample=first_sample)

    def to(self, device: torch.device | str) -> Particles:
        """Return the particles with all tensors on a device."""
        seed = self.seed.to(device) if isinstance(self.seed, Tensor) else self.seed
        return self.mapped(lambda part: part.to(device))._replace(seed=seed)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Particles:
        """Return the particles with a function applied to each of the items' tensors."""
        c, s, t, x0, x_t, cond, uncond = map(function, self.tensors())
        levels = Levels(*map(function, self.levels))
        return Particles(c, s, t, levels, x0, x_t, cond, uncond, self.prediction, self.seed, self.first_sample)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the items' tensors, without the levels."""
        return self.c, self.s, self.t, self.x0, self.x_t, self.cond, self.uncond

    def options(self) -> dict[str, Any]:
        """Return prediction and noise as keyword arguments of the ops."""
        return {"prediction": self.prediction, "seed": self.seed, "first_sample": self.first_sample}


def joined(parts: Sequence[Particles]) -> Particles:
    """Return the items of all parts, with the seed of the first."""
    c, s, t, x0, x_t, cond, uncond = map(torch.cat, zip(*(part.tensors() for part in parts), strict=True))
    levels = Levels(*map(torch.cat, zip(*(part.levels for part in parts), strict=True)))
    first = parts[0]
    return Particles(c, s, t, levels, x0, x_t, cond, uncond, first.prediction, first.seed, first.first_sample)


@torch.no_grad()
def draw(
    frozen: Frozen,
    x0: Tensor,
    c: Tensor,
    s: Tensor,
    t: Tensor,
    particles: int = 4,
    *,
    seed: int | Tensor,
    first_sample: int = 0,
) -> Particles:
    """Noise each item to its time t, m times over, and predict from there with the denoiser.

        x_t^j = signal_t x0 + noise_t z'_j        z' = philox_normal((B m, ...), seed, stream=3)

    The losses draw from streams 1 (the step) and 2 (the targets) with the same seed, so their noise is independent of
    z', as the loss requires (docs/math.md).

    Args:
        frozen: the denoiser.
        x0: clean data `[B, ...]`, any float dtype; x_t has the same.
        c: the conditions, `[B]` or `[B, ...]`, on the device of x0.
        s, t: `[B]`, times of the schedule, s < t; see `sample_times`.
        particles: m, the number of particles of each item; 4 is the paper's.
        seed: an int64 number or a 0-dim int64 tensor; pass another one for every batch.
        first_sample: index of the first item in the whole batch, if that is split over processes: the noise is then
            that of the whole batch.

    Returns `Particles`. Nothing is differentiable. Raises TypeError or ValueError, naming the argument.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: 0 * x, lgd.RectifiedFlow(), null=0)
    >>> x0, c = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> s, t = torch.full((4,), 0.25), torch.full((4,), 0.5)
    >>> whole = draw(frozen, x0, c, s, t, seed=7)
    >>> part = draw(frozen, x0[2:], c[2:], s[2:], t[2:], seed=7, first_sample=2)
    >>> bool((part.x_t == whole.x_t[2:]).all())
    True
    """
    checks.samples("draw", x0=x0)
    checks.count("draw", "particles", particles)
    checks.seed("draw", seed, first_sample, len(x0), None)
    if isinstance(seed, Tensor) and seed.ndim:
        raise ValueError(f"draw: `seed` has shape {list(seed.shape)}, expected one seed for the batch")
    for name, value in (("c", c), ("s", s), ("t", t)):
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(x0):
            came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"draw: `{name}` is {came}, expected a tensor with one entry for each of {len(x0)} items")
    levels = frozen.schedule.levels(t, s)
    shape, first = (len(x0) * particles, *x0.shape[1:]), first_sample * particles
    z = philox_normal(shape, seed, stream=STREAM_PARTICLES, first_sample=first, device=x0.device)
    z = z.view(len(x0), particles, *x0.shape[1:])
    x_t = (per_sample(levels.signal_t, z) * x0[:, None] + per_sample(levels.noise_t, z) * z).to(x0.dtype)
    t_each, c_each = (one.repeat_interleave(particles, 0) for one in (t, c))
    cond, uncond = frozen.predict(x_t.flatten(0, 1), t_each, c_each)
    return Particles(
        c, s, t, levels, x0, x_t, cond.view_as(x_t), uncond.view_as(x_t), frozen.prediction, seed, first_sample
    )


def curve(
    particles: Particles, churn: float = 1.0, targets: int | None = None, impl: Impl | None = None
) -> EnergyCurve:
    """Compute the self-consistency loss of each item at every omega, beta and lam, in one pass over the particles.

    Args:
        particles: of `draw`.
        churn: of the step, in [0, 1]; 1 is the paper's in training.
        targets: their number for each item; by default, that of the particles.
        impl: as in `guided_energy_curve`.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> s, t = torch.zeros(512), torch.ones(512)  # one step from noise: x_s = omega + 1, data are at 3
    >>> c = torch.ones(512, dtype=torch.int64)
    >>> drawn = draw(frozen, torch.full((512, 2), 3.0), c, s, t, seed=0)
    >>> curve(drawn).minimize(group=torch.zeros(512, dtype=torch.int64)).round(decimals=6)
    tensor([2.], dtype=torch.float64)
    """
    p, k = particles, targets or particles.x_t.shape[1]
    target = Renoise(p.x0, k, p.seed)
    return guided_energy_curve(p.x_t, p.cond, p.uncond, p.levels, target, churn=churn, impl=impl, **p.options())
