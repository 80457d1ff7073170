"""a x + b (cond + omega (cond - uncond)) + v z. Floor: 4 passes over memory, also with noise drawn inside; 5 with a
noise tensor. A pass is one read or write of one tensor."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing
from lgd_kernels.ops.guided_step import reference
from lgd_kernels.ops.guided_step.structs import GuidedStep

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)  # the last: 256 MB in float32
TO_OMEGA = ("omega",)
TO_ALL = ("x", "cond", "uncond", "omega")


def formula(x, cond, uncond, omega, levels, **options):
    return reference.guided_step(GuidedStep.of(x, cond, uncond, omega, levels, **options))


def workload(shape, dtype, prediction="x0", noise="", omega="[B]", gradients=(), **options):
    """noise: "", "seed" (drawn inside) or "noise tensor"; omega: "[B]", "one omega" (a number) or "table"."""

    def arguments(generator):
        batch = shape[0]
        x, cond, uncond, z = (testing.sample(shape, dtype, generator) for _ in range(4))
        t = torch.linspace(0.9, 0.5, batch)
        s = t - 0.3
        weights = 1.5 if omega == "one omega" else torch.rand(batch, generator=generator) * 3
        if omega == "table":
            knots = torch.linspace(0, 1, 16)
            values = torch.rand(10, 16, 16, generator=generator) * 3
            weights = lgd.OmegaTable(values, knots, knots).at(torch.arange(batch) % 10, s, t)
        drawn = {"": {}, "seed": {"churn": 1.0, "seed": 7}, "noise tensor": {"churn": 1.0, "noise": z}}[noise]
        levels = lgd.RectifiedFlow().levels(t, s)
        return dict(x=x, cond=cond, uncond=uncond, omega=weights, levels=levels, prediction=prediction, **drawn)

    one = torch.Size(shape).numel() * dtype.itemsize  # a pass; omega, levels [B] and the table are not counted
    moved = {
        TO_OMEGA: 3 * one,  # reads upstream, cond, uncond
        TO_ALL: 6 * one,  # the same; writes three gradients
    }
    return Workload(
        op="guided_step",
        case=", ".join(filter(None, (prediction, noise, "" if omega == "[B]" else omega))),
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        formula=formula,
        bytes=(5 if noise == "noise tensor" else 4) * one,  # reads x, cond, uncond (and noise); writes x_s
        backward={wanted: moved[wanted] for wanted in gradients},
        **options,
    )


WORKLOADS = [  # what says most comes first, should a run be cut short
    workload(LATENTS, torch.float32, gradients=(TO_OMEGA,), quick=True),
    workload(LARGE, torch.float32, gradients=(TO_OMEGA, TO_ALL), devices=("cuda",)),
    workload(LARGE, torch.float32, noise="seed", devices=("cuda",)),
    workload(LARGE, torch.bfloat16, gradients=(TO_OMEGA,), devices=("cuda",)),
    workload(LARGE, torch.bfloat16, noise="seed", devices=("cuda",)),
    workload(LATENTS, torch.bfloat16),
    workload(LATENTS, torch.float32, noise="seed"),
    workload(BATCH, torch.float32, gradients=(TO_OMEGA, TO_ALL), quick=True),
    workload(BATCH, torch.bfloat16, gradients=(TO_OMEGA, TO_ALL)),
    workload(BATCH, torch.float32, noise="seed", quick=True),
    workload(BATCH, torch.bfloat16, noise="seed"),
    workload(BATCH, torch.float32, noise="noise tensor"),
    workload(BATCH, torch.bfloat16, noise="noise tensor"),
    workload(BATCH, torch.float32, "v"),
    workload(BATCH, torch.bfloat16, "v"),
    workload(BATCH, torch.float32, omega="table", gradients=(TO_OMEGA,)),
]
HOST = workload(
    (1, 4, 2, 2), torch.float32, gradients=(TO_OMEGA,)
)  # for `benchmarks host`: a call that is all overhead
