"""What omega is learned from: data noised to t, m particles of each item, and what the denoiser predicts from there."""

from __future__ import annotations

from typing import NamedTuple

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
    """B items with m particles each, and all that a loss of omega needs but omega itself.

    Nothing here depends on omega: drawn once, it serves any number of omegas and of losses. `seed` is that of the
    noise which a loss draws, in the step and in the targets; x_t was drawn with it too, from a stream of its own.

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
    first_sample: int = 0  # index of the first item in the whole batch, where that is split over processes

    def take(self, items: Tensor, seed: int | Tensor, first_sample: int = 0) -> Particles:
        """Some of the items, int64 `[B']`, for a loss that draws fresh noise from a seed of its own."""
        c, s, t, x0, x_t, cond, uncond = (
            part.index_select(0, items)  # copies rows whole, several times as fast as indexing
            for part in (self.c, self.s, self.t, self.x0, self.x_t, self.cond, self.uncond)
        )
        levels = Levels(*(level.index_select(0, items) for level in self.levels))
        return Particles(c, s, t, levels, x0, x_t, cond, uncond, self.prediction, seed, first_sample)

    def to(self, device: torch.device | str) -> Particles:
        """All tensors on a device."""
        moved = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Particles(*moved)._replace(levels=Levels(*(level.to(device) for level in self.levels)))


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
    """Noise each item to its time t, m times over, and let the denoiser predict from there.

        x_t^j = signal_t x0 + noise_t z'_j        z' = philox_normal((B m, ...), seed, stream=3)

    The losses draw from streams 1 (the step) and 2 (the targets) with the same seed: independent of z' by
    construction, as the loss requires (docs/math.md).

    Args:
        frozen: the denoiser.
        x0: clean data `[B, ...]`, any float dtype; x_t has the same.
        c: the conditions, `[B]` or `[B, ...]`, on the device of x0.
        s, t: `[B]`, times of the schedule, s < t; see `sample_times`.
        particles: m, how many of each item; 4 is the paper's.
        seed: an int64 number or a 0-dim int64 tensor; give every batch its own.
        first_sample: index of the first item in the whole batch, where that is split over processes: the noise is then
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
    z = philox_normal(
        (len(x0) * particles, *x0.shape[1:]), seed, stream=STREAM_PARTICLES, first_sample=first_sample * particles,
        device=x0.device,
    ).view(len(x0), particles, *x0.shape[1:])  # fmt: skip
    x_t = (per_sample(levels.signal_t, z) * x0[:, None] + per_sample(levels.noise_t, z) * z).to(x0.dtype)
    t_each, c_each = (one.repeat_interleave(particles, 0) for one in (t, c))
    cond, uncond = frozen.predict(x_t.flatten(0, 1), t_each, c_each)
    return Particles(
        c, s, t, levels, x0, x_t, cond.view_as(x_t), uncond.view_as(x_t), frozen.prediction, seed, first_sample
    )


def curve(
    particles: Particles, churn: float = 1.0, targets: int | None = None, impl: Impl | None = None
) -> EnergyCurve:
    """The self-consistency loss of each item at every omega, beta and lam, from one pass over the particles.

    Args:
        particles: of `draw`.
        churn: of the step, in [0, 1]; 1 is the paper's in training.
        targets: how many for each item; as many as particles by default.
        impl: as in `guided_energy_curve`.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> s, t = torch.zeros(512), torch.ones(512)  # one step from noise: x_s = omega + 1, data are at 3
    >>> c = torch.ones(512, dtype=torch.int64)
    >>> drawn = draw(frozen, torch.full((512, 2), 3.0), c, s, t, seed=0)
    >>> curve(drawn).minimize(group=torch.zeros(512, dtype=torch.int64)).round(decimals=6)
    tensor([2.], dtype=torch.float64)
    """
    return guided_energy_curve(
        particles.x_t, particles.cond, particles.uncond, particles.levels,
        Renoise(particles.x0, targets or particles.x_t.shape[1], particles.seed), prediction=particles.prediction,
        churn=churn, seed=particles.seed, first_sample=particles.first_sample, impl=impl,
    )  # fmt: skip
