"""E ||x - y|| - 1/2 (E ||x - x'|| + E ||y - y'||) of n samples each. Bytes count the samples alone: the
arithmetic is that of n k + n (n - 1) / 2 + k (k - 1) / 2 pairs."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload
from lgd_kernels import testing

TO_BOTH = ("x", "y")


def mean(distances):
    """From those between x and y, within x and within y; those of a sample and itself have no slope."""
    between, *within = distances
    loss = between.mean()
    for one in within:
        loss = loss - 0.5 * one.sum() / (one.shape[0] * (one.shape[0] - 1))
    return loss


def broadcast(x, y, **others):
    def distances(a, b, same=False):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0) if same else squares.sqrt()

    return mean([distances(x, y), distances(x, x, True), distances(y, y, True)])


def cdist(x, y, **others):
    return mean([torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)])


def product(x, y, **others):
    def distances(a, b, same=False):
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.t()
        near = squares <= 0  # of a point and itself the slope would be NaN
        if same:
            near = near | torch.eye(len(a), dtype=torch.bool, device=a.device)
        return squares.masked_fill(near, 1.0).sqrt().masked_fill(near, 0.0)

    return mean([distances(x, y), distances(x, x, True), distances(y, y, True)])


def by_distances(x, y, **others):
    """The specification by torch's own distances, since its differences would not fit into memory."""
    mode = "donot_use_mm_for_euclid_dist" if x.shape[1] <= 64 else "use_mm_for_euclid_dist_if_necessary"
    return mean([torch.cdist(a, b, compute_mode=mode) for a, b in ((x, y), (x, x), (y, y))])


def terms(arguments, upstream):
    """Of the loss: mean distances."""
    x, y = arguments["x"], arguments["y"]
    return torch.cdist(x, y).mean() + 0.5 * (torch.cdist(x, x).mean() + torch.cdist(y, y).mean())


def terms_of_slope(arguments, upstream):
    """Of a sample's slope: unit vectors over n."""
    return upstream.abs() * 2 / arguments["x"].shape[0] * torch.ones_like(arguments["x"])


def workload(n, dimension, dtype, backward=(TO_BOTH,), **options):
    def arguments(generator):
        x, y = (testing.sample((n, dimension), dtype, generator) for _ in range(2))
        return dict(x=x, y=y + 0.1)

    samples = 2 * n * dimension * dtype.itemsize
    # the broadcast of many dimensions fills memory, and keeps the compiler for minutes; few gain nothing by a product
    fits = {"broadcast": n * n * dimension < 2**27, "cdist": dimension < 512, "product": dimension > 16}
    return Workload(
        op="energy_mmd",
        case="energy",
        shape=(n, dimension),
        dtype=dtype,
        arguments=arguments,
        bytes=samples,
        backward={wanted: samples for wanted in backward},
        flops=2 * n * n * (3 * dimension + 2),
        terms={"output": terms, "x": terms_of_slope, "y": terms_of_slope},
        baselines={one.__name__: one for one in (cdist, broadcast, product) if fits[one.__name__]},
        functions=(lgd.energy_mmd, by_distances),
        devices=("cpu",),  # no kernel of ours runs elsewhere yet
        parts=("forward", "both"),  # our backward alone multiplies what the forward found
        seconds=5.0,
        **options,
    )


WORKLOADS = [
    workload(2000, 2, torch.float32, quick=True),
    workload(5000, 2, torch.float32),
    workload(5000, 64, torch.float32),
    workload(10000, 2048, torch.float32, backward=()),
]
HOST = workload(4, 2, torch.float32)  # for `benchmarks host`: a call that is all overhead
