"""Guidance and a step of four of diffusers' schedulers, one omega and one time for all, as diffusers has it. Floor: 4
passes over memory; 6 for DPM-Solver++ 2M, which reads and writes what it remembers; 3 for guidance alone."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks import providers
from benchmarks.workload import Provider, Workload
from lgd_kernels import testing
from lgd_kernels.integrations.diffusers_plans import VPSigma
from lgd_kernels.sampling import solvers

OMEGA, INDEX = 4.0, 10  # step 10 of a run of 20 (providers.STEPS)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-7}  # diffusers rounds each operation to the dtype of the data
CASES = ("FlowMatchEuler", "DDIM", "Euler", "DPM-Solver++ 2M")
SHAPES = [(batch, 4, 64, 64) for batch in (1, 4, 16, 64)]
DIFFUSERS = {  # its class, with the spacing that gives whole timesteps
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
}


def alphas():
    """alpha bar of DDPM's linear betas, which the three schedulers share."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def sigmas(*timesteps):
    found = alphas()[list(timesteps)]
    return ((1 - found) / found).sqrt()


def levels(case, batch):
    """Of step 10, as float32 `[batch]`."""
    if case == "FlowMatchEuler":
        t, s = (torch.full((batch,), 1 - i * 0.999 / 19, dtype=torch.float64) for i in (INDEX, INDEX + 1))
        found = lgd.RectifiedFlow().levels(t, s)
    elif case == "DDIM":
        t, s = (torch.full((batch,), timestep) for timestep in (451, 401))
        found = lgd.Discrete(alphas(), dtype=torch.float64).levels(t, s)
    else:
        found = lgd.EDM().levels(*sigmas(450, 400)[:, None].expand(2, batch))
    return type(found)(*(one.float() for one in found))


def two_m(x, cond, uncond, kept, omega, plan, impl=None):
    """The next sample, and the x0 to remember."""
    return plan.step(1, x, cond, uncond, omega, kept, impl=impl)


def two_m_formula(x, cond, uncond, kept, omega, plan):
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, cond, uncond, kept = (one.to(wide) for one in (x, cond, uncond, kept))
    guided = cond + omega * (cond - uncond)
    return tuple((row[0] * x + row[1] * guided + row[2] * kept).to(dtype) for row in plan.table[1].to(x.device, wide))


def step(case, shape, dtype=torch.float32, **options):
    remembers = case == "DPM-Solver++ 2M"

    def arguments(generator):
        x, cond, uncond, kept = (testing.sample(shape, dtype, generator) for _ in range(4))
        found = dict(x=x, cond=cond, uncond=uncond, omega=OMEGA)
        if remembers:
            plan = solvers.dpm_solver_2m(VPSigma(), sigmas(517, 470, 423), prediction="eps")
            return found | {"kept": kept, "plan": plan.to("cpu", torch.float32)}
        return found | {"levels": levels(case, shape[0]), "prediction": "flow" if case == "FlowMatchEuler" else "eps"}

    one = torch.Size(shape).numel() * dtype.itemsize
    kind, config = DIFFUSERS[case]
    close = CLOSE[dtype]
    return Workload(
        op="combine" if remembers else "guided_step",
        case=f"{case}, guided",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=(6 if remembers else 4) * one,
        functions=(two_m, two_m_formula) if remembers else None,
        providers={
            "FusedScheduler": Provider("diffusers", providers.fused_step(kind, config, INDEX), close, ours=True),
            "diffusers": Provider("diffusers", providers.diffusers_step(kind, config, INDEX), close),
        },
        **options,
    )


def guidance(shape, dtype=torch.float32, **options):
    def arguments(generator):
        return dict(zip(("cond", "uncond"), (testing.sample(shape, dtype, generator) for _ in range(2)), strict=True),
                    omega=OMEGA)  # fmt: skip

    close = CLOSE[dtype]
    return Workload(
        op="guided_score",
        case="one omega",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=3 * torch.Size(shape).numel() * dtype.itemsize,
        providers={
            "LearnedGuidance": Provider("diffusers", providers.learned_guidance, close, ours=True),
            "diffusers": Provider("diffusers", providers.diffusers_guidance, close),
        },
        **options,
    )


WORKLOADS = [
    *(step("FlowMatchEuler", shape, quick=shape == SHAPES[0]) for shape in SHAPES),
    step("FlowMatchEuler", SHAPES[-1], torch.bfloat16),
    *(step(case, shape, quick=shape == SHAPES[0]) for case in CASES[1:] for shape in (SHAPES[0], SHAPES[-1])),
    *(guidance(shape, quick=shape == SHAPES[0]) for shape in SHAPES),
]
