"""The marginal objective: particles of many items are pooled before they are compared, guided_step then energy_mmd."""

from __future__ import annotations

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
    """The energy between all guided particles of a group of items and all of their targets, one value for each group.

        L_g = E ||x_s - y||^beta  -  lam/2 E ||x_s - x_s'||^beta        x_s, x_s' from any items of the group, y too

    Where items share condition and times, their x_s are samples of the guided model's law at s given the condition, and
    their targets `signal_s x0 + noise_s z` of the data's: L_g is half their energy distance but for the term between
    targets, which does not depend on omega. `self_consistency_loss` compares with one x0 at a time, and averages; this
    asks less of the particles, and its gradient varies more. With each item a group of its own it is the same loss.

    Args:
        particles: of `draw`; their noise, and that of the targets, is the one of `self_consistency_loss`.
        omega: one weight for each item.
        group: int64 `[B]`, the group of each item, from 0 on without gaps; None makes one group of all. Its sizes are
            read: on a GPU the call waits for them.
        beta, lam, unbiased: as in `energy_mmd`.
        churn: of the step, in [0, 1]; 1 is the paper's in training.
        targets: k of each item; as many as particles by default.
        process_group: of processes that hold a part of the items each, drawn with `first_sample`, and `group` counted
            over all: L is that of all items, and `backward` gives its gradient to this process's own.
        impl: "triton", "cpu" or "reference"; None chooses.

    Returns `[G]`, float32 (float64 where data are), differentiable in omega: any number of times, with a process group
    once. Groups of unequal sizes are filled up to the largest with samples of weight 0, which cost time and memory.

    Raises TypeError or ValueError, naming the argument. With a process group an error of one process leaves the others
    waiting until the group's timeout.

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
    if process_group is None and len(set(sizes)) == 1:
        if group is not None:
            order = torch.argsort(group, stable=True)
            x_s, y = x_s[order], y[order]
        x_s, y, weights = (*(one.reshape(len(sizes), -1, *one.shape[2:]) for one in (x_s, y)), {})
    elif len(sizes) == 1:
        x_s, y, weights = (*(one.flatten(0, 1)[None] for one in (x_s, y)), {})
    else:
        x_s, y, *filled = _filled_up(group, len(sizes), x_s, y)
        weights = dict(zip(("x_weights", "y_weights"), filled, strict=True))
    return energy_mmd(
        x_s, y, beta=beta, lam=lam, unbiased=unbiased, target_term=False, batched=True, group=process_group, impl=impl,
        **weights,
    )  # fmt: skip


def _guided(particles: Particles, omega: float | Tensor | OmegaLookup, churn: float, impl: Impl | None) -> Tensor:
    """x_s `[B, m, ...]`, not rounded to a half."""
    x_t, m = particles.x_t, particles.x_t.shape[1]
    levels = Levels(*(level.repeat_interleave(m) for level in particles.levels))
    if isinstance(omega, OmegaLookup):
        omega = omega._replace(**{name: getattr(omega, name).repeat_interleave(m) for name in ("c", "s", "t")})
    elif isinstance(omega, Tensor):
        checks.per_sample(OP, "omega", omega, "particles.x0", particles.x0)
        omega = omega.repeat_interleave(m)
    x, cond, uncond = (data.flatten(0, 1) for data in (x_t, particles.cond, particles.uncond))
    noise = {"seed": particles.seed, "first_sample": particles.first_sample * m}
    if isinstance(particles.seed, Tensor) and particles.seed.ndim:
        noise = {"noise": _noise(particles, m, STREAM_STEP)}
    x_s = guided_step(
        x.to(arithmetic_dtype(x)), cond, uncond, omega, levels, prediction=particles.prediction, churn=churn, impl=impl,
        **noise,
    )  # fmt: skip
    return x_s.view(x_t.shape)


def _targets(particles: Particles, k: int) -> Tensor:
    """y `[B, k, ...]`, in the dtype of the particles."""
    x0, levels = particles.x0, particles.levels
    z = _noise(particles, k, STREAM_TARGETS).to(arithmetic_dtype(x0)).view(len(x0), k, *x0.shape[1:])
    return per_sample(levels.signal_s.to(z.dtype), z) * x0[:, None] + per_sample(levels.noise_s.to(z.dtype), z) * z


def _noise(particles: Particles, count: int, stream: int) -> Tensor:
    """That of `guided_energy`: so many for each item, `[B count, ...]`."""
    seed, x0 = particles.seed, particles.x0
    shape = (len(x0) * count, *x0.shape[1:])
    if isinstance(seed, Tensor) and seed.ndim:
        return normal(shape, seed, stream, 0, x0.device, count)
    return philox_normal(shape, seed, stream=stream, first_sample=particles.first_sample * count, device=x0.device)


def _sizes(group: Tensor | None, batch: int, device: torch.device, process_group) -> list[int]:
    """Items of each group, over all processes."""
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


def _filled_up(group: Tensor | None, count: int, *data: Tensor) -> tuple[Tensor, ...]:
    """Each `[B, m, ...]` as `[G, longest m, ...]`, and weights `[G, longest m]`: 1 for samples, 0 for what fills."""
    batch = len(data[0])
    sizes = torch.bincount(group, minlength=count)
    order = torch.argsort(group, stable=True)
    longest = max(1, int(sizes.max())) if batch else 1
    place = torch.arange(batch, device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    slots = group[order] * longest + place
    filled = [
        one.new_zeros(count * longest, *one.shape[1:]).index_copy(0, slots, one[order]).reshape(
            count, longest * one.shape[1], *one.shape[2:]
        ) for one in data
    ]  # fmt: skip
    taken = torch.zeros(count * longest, dtype=data[0].dtype, device=group.device).index_fill(0, slots, 1.0)
    weights = [taken.view(count, longest, 1).expand(-1, -1, one.shape[1]).flatten(1) for one in data]
    return *filled, *weights
