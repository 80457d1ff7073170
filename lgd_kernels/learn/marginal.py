"""Compute the marginal objective: the energy of particles pooled over many items, by guided_step and energy_mmd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from lgd_kernels.guidance.api import guided_step
from lgd_kernels.learn.particles import Particles
from lgd_kernels.ops.energy_mmd.api import energy_mmd
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup, arithmetic_dtype, per_sample
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS, normal, philox_normal

OP = "marginal_loss"


def marginal_loss(
    particles: Particles,
    omega: float | Tensor | OmegaLookup,
    *,
    group: Tensor | None = None,
    beta: float = 1.75,
    lam: float = 1.0,
    churn: float = 1.0,
    targets: int | None = None,
    unbiased: bool = True,
    process_group: distributed.ProcessGroup | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Compute the energy of all guided particles of a group of items against all of their targets, for each group.

        L_g = E ||x_s - y||^beta  -  lam/2 E ||x_s - x_s'||^beta        x_s, x_s' from any items of the group, y too

    If the items of a group share condition and times, their x_s are samples of the guided model's law at s given the
    condition, and their targets `signal_s x0 + noise_s z` are samples of the data's law: L_g is half the energy
    distance of the two, without the term between targets, which does not depend on omega. `self_consistency_loss`
    compares with one x0 at a time and averages; the marginal loss is a weaker condition with a noisier gradient. With
    one item in each group both are the same.

    Args:
        particles: of `draw`; the noise of step and targets is that of `self_consistency_loss`.
        omega: one weight for each item.
        group: int64 `[B]`, the group of each item, from 0 on without gaps; None makes one group of all. The call reads
            the sizes of the groups: a device sync on a GPU.
        beta, lam, unbiased: as in `energy_mmd`.
        churn: of the step, in [0, 1]; 1 is the paper's in training.
        targets: k of each item; by default the number of particles.
        process_group: of processes that each hold a part of the items, drawn with `first_sample`; `group` counts over
            all processes. L is that of all items, and `backward` gives its gradient to this process's items.
        impl: "triton", "cpu" or "reference"; None chooses.

    Returns `[G]`, float32 (float64 for float64 data), differentiable in omega: any number of times; with a process
    group, once. Groups of unequal sizes are padded to the largest with samples of weight 0, which cost time and memory.

    Raises TypeError or ValueError, naming the argument. With a process group, after an error in one process the others
    wait until the group's timeout.

    Source: arXiv 2510.00815, Eq. 9, before it is conditioned on x0.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn import Frozen, draw
    >>> frozen = Frozen(lambda x, t, c: c[:, None].to(x).expand_as(x), lgd.RectifiedFlow(), null=0)
    >>> s, t = torch.zeros(2), torch.ones(2)  # one step from noise: x_s = omega + 1; data are at 2 and 4
    >>> drawn = draw(frozen, torch.tensor([[2.0], [4.0]]), torch.tensor([1, 1]), s, t, seed=0)
    >>> marginal_loss(drawn, torch.tensor([1.0, 3.0]), beta=1.0)  # 8 particles at 2 and at 4: (0 + 2) / 2 - 8/7 / 2
    tensor([0.4286])
    """
    batch, m = particles.x_t.shape[:2]
    k = m if targets is None else targets
    checks.count(OP, "targets", k)
    checks.flag(OP, "unbiased", unbiased)
    if not isinstance(process_group, (distributed.ProcessGroup, type(None))):
        raise TypeError(f"{OP}: `process_group` is a {type(process_group).__name__}, expected a ProcessGroup or None")
    sizes = _sizes(group, batch, particles.x0.device, process_group)
    if lam > 0 and unbiased and min(sizes) * m < 2:
        raise ValueError(f"{OP}: a group has one particle, which has no partner; draw two or more, or unbiased=False")
    x_s, y = _guided(particles, omega, churn, impl), _targets(particles, k)
    x_weights = y_weights = None
    if process_group is None and len(set(sizes)) == 1:
        if group is not None:
            order = torch.argsort(group, stable=True)
            x_s, y = x_s[order], y[order]
        x_s, y = (one.reshape(len(sizes), -1, *one.shape[2:]) for one in (x_s, y))
    elif group is None or len(sizes) == 1:
        x_s, y = (one.flatten(0, 1)[None] for one in (x_s, y))
    else:
        x_s, y, x_weights, y_weights = _padded(group, len(sizes), x_s, y)
    options: dict[str, Any] = {"beta": beta, "lam": lam, "unbiased": unbiased, "group": process_group, "impl": impl}
    return energy_mmd(x_s, y, x_weights=x_weights, y_weights=y_weights, target_term=False, batched=True, **options)


def _guided(particles: Particles, omega: float | Tensor | OmegaLookup, churn: float, impl: Impl | None) -> Tensor:
    """Return x_s `[B, m, ...]` in the arithmetic dtype."""
    x_t, m = particles.x_t, particles.x_t.shape[1]
    levels = Levels(*(level.repeat_interleave(m) for level in particles.levels))
    if isinstance(omega, OmegaLookup):
        omega = omega._replace(**{name: getattr(omega, name).repeat_interleave(m) for name in ("c", "s", "t")})
    elif isinstance(omega, Tensor):
        checks.per_sample(OP, "omega", omega, "particles.x0", particles.x0)
        omega = omega.repeat_interleave(m)
    x, cond, uncond = (data.flatten(0, 1) for data in (x_t, particles.cond, particles.uncond))
    options: dict[str, Any] = {"prediction": particles.prediction, "churn": churn, "impl": impl}
    if isinstance(particles.seed, Tensor) and particles.seed.ndim:  # a seed for each item, not for each particle
        options |= {"noise": _noise(particles, m, STREAM_STEP)}
    else:
        options |= {"seed": particles.seed, "first_sample": particles.first_sample * m}
    x_s = guided_step(x.to(arithmetic_dtype(x)), cond, uncond, omega, levels, **options)
    return x_s.view(x_t.shape)


def _targets(particles: Particles, k: int) -> Tensor:
    """Return the targets `[B, k, ...]` in the arithmetic dtype."""
    x0, levels = particles.x0, particles.levels
    z = _noise(particles, k, STREAM_TARGETS).to(arithmetic_dtype(x0)).view(len(x0), k, *x0.shape[1:])
    return per_sample(levels.signal_s.to(z.dtype), z) * x0[:, None] + per_sample(levels.noise_s.to(z.dtype), z) * z


def _noise(particles: Particles, count: int, stream: int) -> Tensor:
    """Return the noise of `guided_energy`, `count` for each item, `[B count, ...]`."""
    seed, x0 = particles.seed, particles.x0
    shape = (len(x0) * count, *x0.shape[1:])
    if isinstance(seed, Tensor) and seed.ndim:
        return normal(shape, seed, stream, 0, x0.device, count)
    return philox_normal(shape, seed, stream=stream, first_sample=particles.first_sample * count, device=x0.device)


def _sizes(
    group: Tensor | None, batch: int, device: torch.device, process_group: distributed.ProcessGroup | None
) -> list[int]:
    """Return the number of items of each group, over all processes."""
    if group is None:
        found = torch.full((1,), batch, dtype=torch.int64, device=device)
    else:
        if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.shape != (batch,):
            came = f"{group.dtype} {list(group.shape)}" if isinstance(group, Tensor) else type(group).__name__
            raise TypeError(f"{OP}: `group` is a {came}, expected int64 [B] = [{batch}], the group of each item")
        if batch and int(group.min()) < 0:
            raise ValueError(f"{OP}: `group` is {int(group.min())} for an item, expected 0 or more")
        count = group.amax(0, keepdim=True) + 1 if batch else torch.zeros(1, dtype=torch.int64, device=device)
        if process_group is not None:
            distributed.all_reduce(count, distributed.ReduceOp.MAX, group=process_group)
        found = torch.bincount(group, minlength=int(count))
    if process_group is not None:
        distributed.all_reduce(found, group=process_group)
    sizes = found.tolist()
    if not sizes or not all(sizes):
        raise ValueError(f"{OP}: group {sizes.index(0) if sizes else 0} has no items, expected some in each")
    return sizes


def _padded(group: Tensor, count: int, *data: Tensor) -> tuple[Tensor, ...]:
    """Return each `[B, m, ...]` as `[G, longest m, ...]`, and weights `[G, longest m]`, 0 for padding."""
    batch = len(data[0])
    sizes = torch.bincount(group, minlength=count)
    order = torch.argsort(group, stable=True)
    longest = max(1, int(sizes.max())) if batch else 1
    place = torch.arange(batch, device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    slots = group[order] * longest + place
    zeros = (one.new_zeros(count * longest, *one.shape[1:]) for one in data)
    padded = [into.index_copy(0, slots, one[order]) for into, one in zip(zeros, data, strict=True)]
    padded = [one.reshape(count, longest * one.shape[1], *one.shape[2:]) for one in padded]
    taken = torch.zeros(count * longest, dtype=data[0].dtype, device=group.device).index_fill(0, slots, 1.0)
    weights = [taken.view(count, longest, 1).expand(-1, -1, one.shape[1]).flatten(1) for one in data]
    return *padded, *weights
