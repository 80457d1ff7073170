"""Linear combinations for each sample. Floor: a read of each tensor and a write of each output."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)


def combined(x, cond, uncond, coefficients, impl=None):
    """A guided step, once its coefficients are known."""
    return lgd.combine((x, cond, uncond), coefficients, columns=(0, 1, (1, 2)), impl=impl)


def formula(x, cond, uncond, coefficients):
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, d = (one.view(-1, *(1,) * (x.ndim - 1)) for one in coefficients.unbind(1))
    c = cond.to(wide)
    return (a * x.to(wide) + b * c + d * (c - uncond.to(wide))).to(x.dtype)


def terms(arguments, upstream):
    """Of the gradient to the coefficients: the upstream times each column."""
    x, cond, uncond = (arguments[name] for name in ("x", "cond", "uncond"))
    return torch.stack([(upstream * column).abs().flatten(1).sum(1) for column in (x, cond, cond - uncond)], 1)


def workload(shape, dtype, gradients=(), **options):
    def arguments(generator):
        x, cond, uncond = (testing.sample(shape, dtype, generator) for _ in range(3))
        return dict(x=x, cond=cond, uncond=uncond, coefficients=torch.randn(shape[0], 3, generator=generator))

    one = torch.Size(shape).numel() * dtype.itemsize
    moved = {TO_COEFFICIENTS: 4 * one, TO_ALL: 8 * one}  # reads upstream and tensors; or that, again, and three writes
    return Workload(
        op="combine",
        case="x, c, c - u",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=4 * one,
        backward={wanted: moved[wanted] for wanted in gradients},
        functions=(combined, formula),
        terms={"coefficients": terms},
        **options,
    )


TO_COEFFICIENTS, TO_ALL = ("coefficients",), ("x", "cond", "uncond", "coefficients")
WORKLOADS = [
    workload(BATCH, torch.float32, gradients=(TO_COEFFICIENTS, TO_ALL), quick=True),
    workload(LARGE, torch.float32, devices=("cuda",)),
    workload(LARGE, torch.bfloat16, devices=("cuda",)),
    workload(LATENTS, torch.float32, quick=True),
    workload(BATCH, torch.bfloat16),
]
HOST = workload(
    (1, 4, 2, 2), torch.float32, gradients=(TO_COEFFICIENTS,)
)  # for `benchmarks host`: a call that is all overhead
