"""Guidance rules, alone and in a step, beside their formulas and beside diffusers' guiders. Floor: c and u read and g
written, 3 passes over memory, or 4 in a step; where a sample does not stay in the cache c and u are read once more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import lgd_kernels as lgd
from benchmarks import providers
from benchmarks.workload import Provider, Workload
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.runtime.levels import step_coefficients

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)
OMEGA, PHI = 4.0, 0.7
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-7}  # in bfloat16 most of diffusers' round each operation


def total(tensor):
    return tensor.sum(tuple(range(1, tensor.ndim)), keepdim=True)


def spread(tensor):
    return tensor.std(tuple(range(1, tensor.ndim)), keepdim=True)


def rescaled(c, u, omega):
    g = c + omega * (c - u)
    return g * (PHI * spread(c) / spread(g) + 1 - PHI)


def projected(c, u, omega):
    d = c - u
    return c + omega * (d - total(d * c) / total(c * c) * c)


def zero_star(c, u, omega):
    q = total(c * u) / (total(u * u) + 1e-8)
    return q * u + (1 + omega) * (c - q * u)


def tangential(c, u, omega):
    """u on the leading direction of [u; c], by the eigenvector of a 2 x 2 matrix."""
    apart, across = total(u * u) - total(c * c), total(c * u)
    length = torch.sqrt(apart * apart + 4 * across * across)
    u = (1 + apart / length) / 2 * u + across / length * c
    return u + (1 + omega) * (c - u)


class Case(NamedTuple):
    rule: Callable
    formula: Callable
    guider: str  # diffusers' class and its options
    options: dict
    close: float = 0.0  # what it is off by, where that is more


CASES = {
    "APG": Case(rules.apg, projected, "AdaptiveProjectedGuidance",
                {"guidance_scale": OMEGA, "eta": 0.0, "use_original_formulation": True,
                 "adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0}),
    "rescale": Case(functools.partial(rules.rescale, phi=PHI), rescaled, "ClassifierFreeGuidance",
                    {"guidance_scale": 1 + OMEGA, "guidance_rescale": PHI}),
    "TCFG": Case(rules.tcfg, tangential, "TangentialClassifierFreeGuidance", {"guidance_scale": 1 + OMEGA},
                 close=5e-4),  # a singular value decomposition of the data in float32
    "CFG-Zero*": Case(rules.cfg_zero_star, zero_star, "ClassifierFreeZeroStarGuidance",
                      {"guidance_scale": 1 + OMEGA, "zero_init_steps": 1}),
}  # fmt: skip


def guided(cond, uncond, omega, rule, impl=None):
    return lgd.guided_score(cond, uncond, omega, rule=rule, impl=impl)


def guided_formula(cond, uncond, omega, formula):
    wide = torch.promote_types(cond.dtype, torch.float32)
    return formula(cond.to(wide), uncond.to(wide), omega).to(cond.dtype)


def stepped(x, cond, uncond, omega, levels, rule, impl=None):
    return lgd.guided_step(x, cond, uncond, omega, levels, rule=rule, impl=impl)


def step_formula(x, cond, uncond, omega, levels, formula):
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, _ = (one.to(wide).view(-1, *(1,) * (x.ndim - 1)) for one in step_coefficients(levels, "x0", 0.0))
    return (a * x.to(wide) + b * formula(cond.to(wide), uncond.to(wide), omega)).to(x.dtype)


def workload(case, shape, dtype=torch.float32, step=False, **options):
    rule, formula, guider, config, close = CASES[case]

    def arguments(generator):
        shared, *own = (testing.sample(shape, torch.float64, generator) for _ in range(3))
        cond, uncond = ((0.8 * shared + 0.5 * one).to(dtype) for one in own)
        found = {"cond": cond, "uncond": uncond, "omega": OMEGA}
        if not step:
            return found
        t = torch.linspace(0.9, 0.5, shape[0])
        levels = lgd.RectifiedFlow().levels(t, t - 0.3)
        return found | {"x": testing.sample(shape, dtype, generator), "levels": levels}

    call, plain = (stepped, step_formula) if step else (guided, guided_formula)
    theirs = Provider("diffusers", providers.diffusers_rule(guider, config), max(close, CLOSE[dtype]))
    return Workload(
        op="combine",  # the op whose implementations they end in
        case=f"{'step' if step else 'guidance'} by {case}",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=(4 if step else 3) * torch.Size(shape).numel() * dtype.itemsize,
        functions=(functools.partial(call, rule=rule), functools.partial(plain, formula=formula)),
        providers={} if step else {"diffusers": theirs},
        **options,
    )


WORKLOADS = [
    *(workload(case, BATCH, quick=True) for case in CASES),
    *(workload(case, BATCH, step=True) for case in CASES),
    *(workload(case, BATCH, torch.bfloat16) for case in CASES),
    *(workload(case, BATCH, torch.bfloat16, step=True) for case in CASES),
    *(workload(case, LATENTS) for case in CASES),
    *(workload(case, LARGE, devices=("cuda",)) for case in CASES),
]
