"""cond + omega (cond - uncond). Floor: 3 passes over memory; a pass is one read or write of one tensor."""

from __future__ import annotations

import torch

from benchmarks.workload import Workload
from lgd_kernels import testing
from lgd_kernels.ops.guided_score import reference
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.runtime.arguments import Omega

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)


def formula(cond, uncond, omega):
    return reference.guided_score(GuidedScore(cond, uncond, Omega.of(omega, cond)))


def workload(case, shape, dtype, **options):
    def arguments(generator):
        cond, uncond = (testing.sample(shape, dtype, generator) for _ in range(2))
        return {"cond": cond, "uncond": uncond, "omega": torch.rand(shape[0], generator=generator) * 3}

    one = torch.Size(shape).numel() * dtype.itemsize  # a pass; omega [B] is not counted
    return Workload(
        op="guided_score",
        case=case,
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        formula=formula,
        bytes=3 * one,  # reads cond, uncond; writes guided
        backward={
            ("omega",): 3 * one,  # reads upstream, cond, uncond
            ("cond", "uncond", "omega"): 5 * one,  # the same; writes two gradients
        },
        **options,
    )


WORKLOADS = [
    workload("omega [B]", LATENTS, torch.float32, quick=True),
    workload("omega [B]", BATCH, torch.float32, quick=True),
    workload("omega [B]", BATCH, torch.bfloat16),
    workload("omega [B]", LARGE, torch.float32, devices=("cuda",)),
]
HOST = workload("omega [B]", (1, 4, 2, 2), torch.float32)  # for `benchmarks host`: a call that is all overhead
