"""Inner products and sums of c, u and c - u. Floor: 2 passes over memory, a read of each tensor. Their backward is a
combine, and is measured there."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing

LATENTS, BATCH, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1024, 4, 64, 64)
COLUMNS = (0, 1, (0, 1))


def packed(cond, uncond, impl=None):
    """Dots and sums as one tensor, `[B, 12]`."""
    found = lgd.moments((cond, uncond), columns=COLUMNS, impl=impl)
    return torch.cat((found.dots.flatten(1), found.sums), 1)


def formula(cond, uncond):
    """As written: products of flattened samples, summed."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    c, u = cond.to(wide).flatten(1), uncond.to(wide).flatten(1)
    columns = c, u, c - u
    dots = [(a * b).sum(1) for a in columns for b in columns]
    return torch.stack([*dots, *(a.sum(1) for a in columns)], 1)


def terms(arguments, upstream):
    columns = [column.abs() for column in (*arguments.values(), arguments["cond"] - arguments["uncond"])]
    dots = [(a * b).flatten(1).sum(1) for a in columns for b in columns]
    return torch.stack([*dots, *(a.flatten(1).sum(1) for a in columns)], 1)


def workload(shape, dtype, **options):
    def arguments(generator):
        return {name: testing.sample(shape, dtype, generator) for name in ("cond", "uncond")}

    return Workload(
        op="moments",
        case="c, u, c - u",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=2 * torch.Size(shape).numel() * dtype.itemsize,
        functions=(packed, formula),
        terms={"output": terms},
        **options,
    )


WORKLOADS = [
    workload(BATCH, torch.float32, quick=True),
    workload(LARGE, torch.float32, devices=("cuda",)),
    workload(LARGE, torch.bfloat16, devices=("cuda",)),
    workload(LATENTS, torch.float32, quick=True),
    workload(BATCH, torch.bfloat16),
]
HOST = workload((1, 4, 2, 2), torch.float32)  # for `benchmarks host`: a call that is all overhead
