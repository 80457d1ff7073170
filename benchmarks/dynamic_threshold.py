"""clip(x0, -s, s) / s, s the 0.995 quantile of each sample's |x0|. Floor: a read and a write; a sample that does not
stay in the cache is read four times more: a digit of its bits at a time, and what comes after the last."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing

LATENTS, BATCH, IMAGE, LARGE = (1, 4, 64, 64), (64, 4, 64, 64), (1, 3, 1024, 1024), (1024, 4, 64, 64)


def thresholded(x0, impl=None):
    return lgd.dynamic_threshold(x0, impl=impl)


def by_quantile(x0):
    """As papers and diffusers write it. Its s is 1e-6 off where the position of the quantile is counted in float32."""
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    size = wide.flatten(1).abs()
    s = torch.quantile(size, 0.995, dim=1).clamp(min=1).view(-1, *(1,) * (x0.ndim - 1))
    return (torch.clamp(wide, -s, s) / s).to(x0.dtype)


def by_sorting(x0):
    """The two elements that the quantile lies between, from torch.sort."""
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    size = wide.flatten(1).abs().sort(1).values
    at = 0.995 * (size.shape[1] - 1)
    low, high = size[:, int(at)], size[:, int(at) + 1]
    s = (low + (at - int(at)) * (high - low)).clamp(min=1).view(-1, *(1,) * (x0.ndim - 1))
    return (torch.clamp(wide, -s, s) / s).to(x0.dtype)


def terms(arguments, upstream):
    """Each element is held to its own size: a baseline to 16 times what ours is, for the position in float32."""
    return by_sorting(**arguments).abs()


def workload(shape, dtype, **options):
    def arguments(generator):
        return {"x0": (2 * testing.sample(shape, torch.float32, generator)).to(dtype)}

    return Workload(
        op="dynamic_threshold",
        case="quantile 0.995",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=2 * torch.Size(shape).numel() * dtype.itemsize,
        functions=(thresholded, by_sorting),
        terms={"output": terms},
        baselines={"by quantile": by_quantile, "by sorting": by_sorting},
        **options,
    )


WORKLOADS = [
    workload(BATCH, torch.float32, quick=True),
    workload(LARGE, torch.float32, devices=("cuda",)),
    workload(LATENTS, torch.float32, quick=True),
    workload(IMAGE, torch.float32),
    workload(BATCH, torch.bfloat16),
]
HOST = workload((1, 4, 2, 2), torch.float32)  # for `benchmarks host`: a call that is all overhead
