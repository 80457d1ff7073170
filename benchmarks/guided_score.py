"""cond + omega (cond - uncond). Floor: 3 passes over memory; a pass is one read or write of one tensor."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing
from lgd_kernels.ops.guided_score import reference
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.runtime.arguments import Omega

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)
TO_OMEGA, TO_DATA, TO_ALL = ("omega",), ("cond", "uncond"), ("cond", "uncond", "omega")
BOTH = (TO_OMEGA, TO_ALL)


def formula(cond, uncond, omega):
    return reference.guided_score(GuidedScore(cond, uncond, Omega.of(omega, cond)))


def workload(case, shape, dtype, gradients=(), **options):
    """case: "omega [B]", "one omega" (a number) or "table"."""

    def arguments(generator):
        batch = shape[0]
        cond, uncond = (testing.sample(shape, dtype, generator) for _ in range(2))
        omega = 1.5 if case == "one omega" else torch.rand(batch, generator=generator) * 3
        if case == "table":
            knots, t = torch.linspace(0, 1, 16), torch.linspace(0.9, 0.5, batch)
            values = torch.rand(10, 16, 16, generator=generator) * 3
            omega = lgd.OmegaTable(values, knots, knots).at(torch.arange(batch) % 10, t - 0.3, t)
        return {"cond": cond, "uncond": uncond, "omega": omega}

    one = torch.Size(shape).numel() * dtype.itemsize  # a pass; omega [B] and the table are not counted
    moved = {
        TO_OMEGA: 3 * one,  # reads upstream, cond, uncond
        TO_DATA: 3 * one,  # reads upstream; writes two gradients
        TO_ALL: 5 * one,  # reads upstream, cond, uncond; writes two gradients
    }
    return Workload(
        op="guided_score",
        case=case,
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        formula=formula,
        bytes=3 * one,  # reads cond, uncond; writes guided
        backward={wanted: moved[wanted] for wanted in gradients},
        **options,
    )


WORKLOADS = [
    workload("omega [B]", LATENTS, torch.float32, BOTH, quick=True),
    workload("omega [B]", BATCH, torch.float32, BOTH, quick=True),
    workload("omega [B]", BATCH, torch.bfloat16, BOTH),
    workload("omega [B]", LARGE, torch.float32, BOTH, devices=("cuda",)),
]
HOST = workload("omega [B]", (1, 4, 2, 2), torch.float32, BOTH)  # for `benchmarks host`: a call that is all overhead
