"""Share between the tests of guided_energy: its definition by other ops, the terms of its sums, and the calls."""

from __future__ import annotations

import torch
from conftest import dtypes_of
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.learn.objective import particle_energy
from lgd_kernels.ops.guided_step import reference as step
from lgd_kernels.ops.guided_step.structs import GuidedStep
from lgd_kernels.runtime.levels import Levels, OmegaLookup, widest


def interpreted(target) -> bool:
    """Return whether a target is Triton's interpreter, where a program takes 1 ms and a pair of particles as much."""
    return (target.impl, target.device) == ("triton", "cpu")


def dtypes(target, turn=0):
    """Return all dtypes that the target takes; in the interpreter one of them, in turn."""
    found = dtypes_of(target)
    return [found[turn % len(found)]] if interpreted(target) else found


def on(target, function, *args, **options):
    """Call guided_energy by the target's implementation, on its device."""
    moved = (testing.moved(value, target.device) for value in args)
    options = {name: testing.moved(value, target.device) for name, value in options.items()}
    return function(*moved, impl=target.impl, **options)


def guided_energy(target, *args, **options):
    return on(target, lgd.guided_energy, *args, **options)


def loss_and_slope(target, x, cond, uncond, omega, *args, **options):
    """Return L and dL / domega for omega `[B]`, on the CPU."""
    omega = omega.detach().to(target.device).requires_grad_()
    loss = guided_energy(target, x, cond, uncond, omega, *args, **options)
    return loss.detach().cpu(), torch.autograd.grad(loss.sum(), omega)[0].cpu()


def points(x, cond, uncond, omega, levels, target, prediction="x0", churn=0.0, noise=None, seed=None, first_sample=0):
    """Return x_s `[B, m, ...]` by guided_step's reference and y `[B, k, ...]`, noise from philox_normal."""
    batch, m = x.shape[:2]

    def each(value):  # of an item, for each of its particles
        if isinstance(value, OmegaLookup):
            return value._replace(**{name: each(getattr(value, name)) for name in "cst"})
        return value.repeat_interleave(m) if isinstance(value, Tensor) else value

    if noise is None and seed is not None:
        noise = drawn((batch, m, *x.shape[2:]), seed, 1, first_sample).to(x.dtype)
    flat = [one if one is None else one.flatten(0, 1) for one in (x, cond, uncond, noise)]
    each_level = Levels(*map(each, levels))
    options = {"prediction": prediction, "churn": each(churn), "noise": flat[3], "seed": None, "first_sample": 0}
    x_s = step.guided_step(GuidedStep.of(*flat[:3], each(omega), each_level, **options)).view(x.shape)
    if isinstance(target, lgd.Renoise):
        z = drawn((batch, target.particles, *x.shape[2:]), target.seed, 2, first_sample)
        column = (-1, *(1,) * (x.ndim - 1))
        target = levels.signal_s.view(column) * target.x0[:, None] + levels.noise_s.view(column) * z.to(x.dtype)
    return x_s, target


def drawn(shape, seed, stream, first_sample=0):
    """Return the noise of B items, `[B, particles, ...]`."""
    batch, particles, *rest = shape
    if isinstance(seed, Tensor) and seed.ndim:
        return torch.stack([lgd.philox_normal((particles, *rest), int(one), stream=stream) for one in seed])
    first = first_sample * particles
    return lgd.philox_normal((batch * particles, *rest), seed, stream=stream, first_sample=first).view(shape)


def defined(*args, beta=1.75, lam=1.0, unbiased=True, **options):
    """Compute the definition: guided_step, then particle_energy. Differentiable."""
    return particle_energy(*points(*args, **options), beta, lam, unbiased)


def truth(x, cond, uncond, omega, levels, target, *, beta=1.75, lam=1.0, unbiased=True, **options):
    """Return in float64, for omega `[B]`: L, dL / domega, and the sums of |terms| that bound their errors."""
    args = [testing.promoted(value) for value in (x, cond, uncond, omega, levels, target)]
    options = {name: testing.promoted(value) for name, value in options.items()}
    omega = args[3] = args[3].detach().requires_grad_()
    x_s, y = points(*args, **options)
    x_s, y = x_s.flatten(2), y.flatten(2)
    loss = particle_energy(x_s, y, beta, lam, unbiased)
    slope = torch.autograd.grad(loss.sum(), omega, retain_graph=True)[0]
    turn = x_s.detach() - points(*args[:3], omega.detach() + 1, *args[4:], **options)[0].flatten(2)  # -G
    m = x_s.shape[1]
    share = lam / 2 if m > 1 else 0.0
    pairs = m * (m - 1) if unbiased and m > 1 else m * m
    x_s = x_s.detach()
    apart, between = torch.cdist(x_s, y, compute_mode=DIRECT), torch.cdist(x_s, x_s, compute_mode=DIRECT)
    lengths, turns = turn.norm(dim=-1)[:, :, None], torch.cdist(turn, turn, compute_mode=DIRECT)
    terms = (apart**beta).mean((1, 2)) + share * (between**beta).sum((1, 2)) / pairs
    steep = torch.where(between > 0, between, 1.0) ** (beta - 1)
    slopes = beta * (apart ** (beta - 1) * lengths).mean((1, 2)) + share * beta * (steep * turns).sum((1, 2)) / pairs
    return loss.detach(), slope, terms, slopes


DIRECT = "donot_use_mm_for_euclid_dist"


def problem(
    generator, m, k, row, dtypes=torch.float32, batch=3, kind="tensor", noise=False, layout="contiguous", **options
):
    """Return arguments of guided_energy: x, cond, uncond, omega, levels, target, and its options."""
    row = row if isinstance(row, tuple) else (row,)
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 5

    def made(count, dtype):
        return testing.sample((batch, count, *row), dtype, generator, layout)

    x, cond, uncond, z = (made(m, dtype) for dtype in dtypes[:4])
    t = torch.linspace(0.9, 0.5, batch)
    levels = lgd.RectifiedFlow().levels(t, t - 0.3)
    omega = torch.rand(batch, generator=generator, dtype=widest(*dtypes)) * 3
    target = made(k if kind == "tensor" else 1, dtypes[4])
    if row == (1,):  # single numbers would be as close to each other as their rounding
        target = target + 10
    if kind != "tensor":
        x0 = target[:, 0]
        target = lgd.Expected(x0) if kind == "expected" else lgd.Renoise(x0, k, 11)
    if noise:
        options = {"churn": torch.rand(batch, generator=generator), "noise": z} | options
    return (x, cond, uncond, omega, levels, target), options
