"""The operator `torch.ops.lgd.guided_energy`, and the differentiable op on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy import reference
from lgd_kernels.ops.guided_energy.statistics import Statistics, energy, pair_weights
from lgd_kernels.ops.guided_energy.structs import (
    EnergyCall,
    EnergyOptions,
    GuidedEnergy,
    GuidedEnergyBackward,
    SavedEnergy,
)
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import to_leaf
from lgd_kernels.runtime.levels import Levels, arithmetic_dtype, omega_at
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {
    "cuda": impls.FLOATS,
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

MOST_ROWS = 352  # kMostRows in csrc/guided_energy/guided_energy_cuda.h
Gradients = Sequence[Tensor | None]


def unfit(impl: str, x: Tensor, *others: Tensor) -> list[str]:
    """Return why `impl` cannot take these particles and targets `[B, k, ...]` (the fourth tensor); for `why_not`."""
    k = others[2].shape[1] if len(others) > 2 and others[2].ndim == x.ndim else 1
    return too_many(impl, x.shape[1], k) if x.ndim > 1 else []


def too_many(impl: str, m: int, k: int) -> list[str]:
    if impl != "cuda" or 2 * m + k <= MOST_ROWS:
        return []
    return [f"cuda takes m particles and k targets with 2 m + k <= {MOST_ROWS}, these are m = {m}, k = {k}"]


def choose(impl: str | None, a: GuidedEnergy) -> str:
    """Return what `impls.choose` does, unless there are too many particles for that."""
    found = impls.choose("guided_energy", impl, a.x.device, *[one.dtype for one in a.data if one is not None])
    reasons = too_many(found, a.x.shape[1], a.target.k)
    if reasons and impl is not None:
        raise ValueError(f"guided_energy: impl={impl!r} cannot run here: {reasons[0]}; impl=None chooses")
    return "reference" if reasons else found


def forward(a: EnergyCall, impl: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss `[B]`, its slope in omega `[B]` and the statistics `[B, count]`."""
    x, target = a.forward.x, a.forward.target
    impl, dtype = choose(impl, a.forward), arithmetic_dtype(*a.forward.data)
    batch, m = x.shape[:2]
    if impl == "reference" or not x.numel():
        at = reference.statistics(a.forward)
        shift = torch.zeros(batch, 1, dtype=at.P0.dtype, device=x.device)
        loss, slope = (energy(at, shift, *a.options, order)[:, 0] for order in (0, 1))
        if target.kind == "expected":
            loss = loss + Levels(*a.forward.scalars.levels).noise_s.double() ** 2 * target.data[:1].numel()
        return loss.to(dtype), slope.to(dtype), at.pack()
    loss, slope = torch.empty(batch, dtype=dtype, device=x.device), torch.empty(batch, dtype=dtype, device=x.device)
    found = torch.empty((batch, Statistics.numbers(m, target.k)), dtype=torch.float64, device=x.device)
    impls.launcher("guided_energy", impl).forward((loss, slope, found), a)
    return loss, slope, found


def fake(a: EnergyCall) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = a.forward.x, arithmetic_dtype(*a.forward.data)
    batch, m = x.shape[:2]
    loss, slope = x.new_empty(batch, dtype=dtype), x.new_empty(batch, dtype=dtype)
    return loss, slope, x.new_empty((batch, Statistics.numbers(m, a.forward.target.k)), dtype=torch.float64)


def statistics(a: GuidedEnergy, impl: str | None) -> Statistics:
    """Return how distances depend on omega, around the one given. Not differentiable."""
    with torch.no_grad():
        if impls.through_reference("guided_energy_curve", impl):
            return reference.statistics(a)
        found = raw(EnergyCall(a, EnergyOptions(2.0, 0.0, True)), impl)[2]
        return Statistics.unpack(found, a.x.shape[1], a.target.k)


def backward_data(b: GuidedEnergyBackward, impl: str | None) -> Gradients:
    """Compute the gradients to x, cond, uncond, noise and the target's tensor; None for one that is not wanted."""
    impl = choose(impl, b.forward)
    if impl == "reference" or not b.forward.x.numel():
        return reference_data(b)
    grads = empty_data(b)
    impls.launcher("guided_energy", impl).backward(grads, b)
    return grads


def reference_data(b: GuidedEnergyBackward) -> Gradients:
    """Compute the same by the reference."""
    found = reference.guided_energy_backward(b)
    return tuple(
        grad.to(tensor.dtype).view(tensor.shape).contiguous() if want and tensor is not None else None
        for grad, tensor, want in zip(found, b.forward.data, b.wanted, strict=True)
    )


def empty_data(b: GuidedEnergyBackward) -> Gradients:
    return tuple(
        tensor.new_empty(tensor.shape) if want and tensor is not None else None
        for tensor, want in zip(b.forward.data, b.wanted, strict=True)
    )


def leaves(a: GuidedEnergy) -> tuple[Tensor | None, ...]:
    return a.x, a.cond, a.uncond, a.noise, a.scalars.omega.leaf, a.target.data


def save(a: EnergyCall, outputs: tuple[Tensor, Tensor, Tensor], wanted: list[bool]) -> SavedEnergy:
    _, slope, found = outputs
    forward = a.forward if any(wanted[:4]) or wanted[5] else a.forward.without_data()
    return SavedEnergy(slope, slope, found, a.forward.x.shape[1], forward, a.options, wanted)


def backward(b: SavedEnergy, impl: str | None, direct: bool) -> Gradients:
    """Compute the gradients to `leaves`: to omega without the data, to the data in one more pass."""
    *wanted, to_omega, to_target = b.wanted
    to_data: Gradients = raw_backward.run(weighed(b), impl, direct) if any(wanted) or to_target else [None] * 5
    d_omega, omega = None, b.forward.scalars.omega
    if to_omega:
        chosen = impls.choose("guided_energy", impl, b.slope.device) if direct and omega.table else "reference"
        d_omega = to_leaf(b.upstream * b.slope, omega, chosen)
    return *to_data[:4], d_omega, to_data[4]


def weighed(b: SavedEnergy) -> GuidedEnergyBackward:
    weights = pair_weights(statistics_of(b), b.upstream, *b.options)
    return GuidedEnergyBackward(b.forward, *weights, b.wanted_data)


def statistics_of(b: SavedEnergy) -> Statistics:
    return Statistics.unpack(b.statistics, b.m, b.forward.target.k)


def backward_reference(b: SavedEnergy) -> Gradients:
    """Compute the same by formulas, which have gradients themselves if gradients are recorded."""
    if torch.is_grad_enabled() and any(b.wanted_data):
        return differentiated(b)
    to_data: Gradients = reference_data(weighed(b)) if any(b.wanted_data) else [None] * 5
    d_omega, slope, omega = None, b.slope, b.forward.scalars.omega
    if b.wanted[4]:
        if torch.is_grad_enabled():  # a slope that has slopes itself, from the statistics
            now = omega_at(omega.given(), b.statistics)
            slope = energy(statistics_of(b), (now - now.detach())[:, None], *b.options, 1)[:, 0].to(slope.dtype)
        d_omega = to_leaf(b.upstream * slope, omega)
    return *to_data[:4], d_omega, to_data[4]


def differentiated(b: SavedEnergy) -> Gradients:
    """Differentiate the reference. Views, because one tensor may be two arguments."""
    a, omega = b.forward, b.forward.scalars.omega
    views: list[Any] = [
        leaf.view_as(leaf) if want and leaf is not None else leaf
        for leaf, want in zip(leaves(a), b.wanted, strict=True)
    ]
    x, cond, uncond, noise, values, data = views
    omega = omega._replace(table=[values, *omega.table[1:]]) if omega.table else omega._replace(tensor=values)
    a = GuidedEnergy(x, cond, uncond, noise, a.scalars._replace(omega=omega), a.seed, a.target._replace(data=data))
    loss = reference.guided_energy(EnergyCall(a, b.options))
    asked = [view for view, want in zip(views, b.wanted, strict=True) if want]
    found = iter(torch.autograd.grad(loss, asked, b.upstream, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in b.wanted]


raw = define(EnergyCall, "guided_energy", "(Tensor loss, Tensor slope, Tensor statistics)", forward, fake)
raw_backward = define(
    GuidedEnergyBackward,
    "guided_energy_backward",
    "(Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_target)",
    backward_data,
    empty_data,
)
guided_energy = Operator(
    "guided_energy",
    raw,
    reference=reference.guided_energy,
    leaves=lambda a: leaves(a.forward),
    saved=shape_of(SavedEnergy),
    save=save,
    backward=backward,
    reference_backward=backward_reference,
)
