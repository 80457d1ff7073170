"""Distances between samples as geomloss and KeOps have them: every pair, a sample and itself too, to the power 1.
Floor: the arithmetic of 2 n^2 pairs; of guided_energy, one read of x, cond, uncond and targets."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks import providers
from benchmarks.guided_energy import guided, statistics_of
from benchmarks.workload import Provider, Workload
from lgd_kernels import testing

SLACK = 1e-3  # of the sum of |terms|: geomloss forms ||x||^2 + ||y||^2 - 2 <x, y>, and KeOps adds up in float32
TIMED = ("forward", "both")


def of_pairs(kind, bandwidth):
    """(kernel, its function of distances and the size of its slope there, factors between and within)"""
    if kind == "energy":
        return lgd.Energy(), lambda r: r, torch.ones_like, (1.0, -0.5)
    if kind == "gaussian":
        k = lambda r: (-0.5 * (r / bandwidth).square()).exp()  # noqa: E731
        return lgd.Gaussian(bandwidth), k, lambda r: r / bandwidth**2 * k(r), (-2.0, 1.0)
    k = lambda r: (-r / bandwidth).exp()  # noqa: E731
    return lgd.Laplace(bandwidth), k, lambda r: k(r) / bandwidth, (-2.0, 1.0)


def of_square(kind, bandwidth):
    """The same of squared distances, for KeOps."""
    return {
        "energy": lambda s: s.sqrt(),
        "gaussian": lambda s: (s * (-0.5 / bandwidth**2)).exp(),
        "laplace": lambda s: (s.sqrt() * (-1 / bandwidth)).exp(),
    }[kind]


def samples(kind, n, dimension, dtype=torch.float32, **options):
    bandwidth = float(dimension) ** 0.5
    kernel, of, slope, (between, within) = of_pairs(kind, bandwidth)

    def arguments(generator):
        x, y = (testing.sample((n, dimension), dtype, generator) for _ in range(2))
        return dict(x=x, y=y + 0.1)

    def ours(x, y, impl=None):
        return lgd.energy_mmd(x, y, kernel=kernel, unbiased=False, impl=impl)

    def distances(a, b):
        mode = "donot_use_mm_for_euclid_dist" if dimension <= 64 else "use_mm_for_euclid_dist_if_necessary"
        return torch.cdist(a, b, compute_mode=mode)

    def cdist(x, y):
        pairs = (of(distances(a, b)).mean() for a, b in ((x, y), (x, x), (y, y)))
        return between * next(pairs) + within * next(pairs) + within * next(pairs)

    def broadcast(x, y):
        def mean(a, b):
            squares = (a[:, None] - b[None]).square().sum(-1)
            r = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
            return of(r).mean()

        return between * mean(x, y) + within * (mean(x, x) + mean(y, y))

    def terms(given, upstream):
        x, y = given["x"], given["y"]
        sizes = (of(distances(a, b)).mean() for a, b in ((x, y), (x, x), (y, y)))
        return abs(between) * next(sizes) + abs(within) * (next(sizes) + next(sizes))

    def terms_of(name):
        def terms(given, upstream):
            one, other = (given[key] for key in ("xy" if name == "x" else "yx"))
            mean = abs(between) * slope(distances(one, other)).mean(1) + 2 * abs(within) * slope(
                distances(one, one)
            ).mean(1)
            return upstream.abs() / n * mean[:, None].expand_as(one)

        return terms

    moved = 2 * n * dimension * dtype.itemsize
    named = {"energy": ("energy", 1.0, {}), "gaussian": ("gaussian", 2.0, {"blur": bandwidth}),
             "laplace": ("laplacian", 2.0, {"blur": bandwidth})}[kind]  # fmt: skip
    theirs = {"geomloss": Provider("geomloss", providers.geomloss_samples(*named[:2], **named[2]), SLACK)}
    if dimension <= 16:  # it unrolls dimensions, and compiles for each number of them
        theirs["KeOps"] = Provider(
            "pykeops", providers.keops_samples(of_square(kind, bandwidth), (between, within)), SLACK
        )
    return Workload(
        op="energy_mmd",
        case=f"{kind}, every pair",
        shape=(n, dimension),
        dtype=dtype,
        arguments=arguments,
        bytes=moved,
        backward={("x", "y"): moved},
        flops=2 * n * n * (3 * dimension + 2),
        terms={"output": terms, "x": terms_of("x"), "y": terms_of("y")},
        baselines={"cdist": cdist, **({"broadcast": broadcast} if n * n * dimension < 2**27 else {})},
        functions=(ours, cdist),
        providers=theirs,
        devices=("cpu",),  # no kernel of ours runs elsewhere yet
        parts=TIMED,
        **options,
    )


def steps(shape, dtype=torch.float32, **options):
    """A guided step of m particles and the energy distance to as many targets, `[B, m, D]`; its slope to omega."""
    batch, m, row = shape

    def arguments(generator):
        x, cond, uncond, y = (testing.sample(shape, dtype, generator) for _ in range(4))
        t = torch.linspace(0.9, 0.5, batch)
        omega = torch.rand(batch, generator=generator) * 3
        return dict(x=x, cond=cond, uncond=uncond, omega=omega, levels=lgd.RectifiedFlow().levels(t, t - 0.3), target=y)

    def ours(x, cond, uncond, omega, levels, target, impl=None):
        return lgd.guided_energy(
            x, cond, uncond, omega, levels, target, prediction="x0", beta=1.0, unbiased=False, impl=impl
        )

    def cdist(x, cond, uncond, omega, levels, target):
        x_s, y = (one[:, 0] for one in guided(x, cond, uncond, omega, levels, target, "x0", 0.0, None))
        return torch.cdist(x_s, y).mean((1, 2)) - 0.5 * (torch.cdist(x_s, x_s).mean((1, 2)))

    def broadcast(x, cond, uncond, omega, levels, target):
        x_s, y = (one[:, 0] for one in guided(x, cond, uncond, omega, levels, target, "x0", 0.0, None))
        attraction, repulsion = ((x_s[:, :, None] - other[:, None]).square().sum(-1) for other in (y, x_s))
        same = torch.eye(m, dtype=torch.bool, device=x.device)
        within = repulsion.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
        return attraction.sqrt().mean((1, 2)) - 0.5 * within.mean((1, 2))

    def reference(x, cond, uncond, omega, levels, target):
        return lgd.guided_energy(
            x, cond, uncond, omega, levels, target, prediction="x0", beta=1.0, unbiased=False, impl="reference"
        )

    def terms(given, upstream):
        S, _, T, _ = statistics_of(given)
        return (S.sqrt().mean(-1) + 0.5 * T.sqrt().mean(-1)).view_as(upstream)

    def terms_of_slope(given, upstream):
        S, P2, T, Q2 = statistics_of(given)
        return upstream.abs() * (P2.sqrt().mean(-1) + 0.5 * Q2.sqrt().mean(-1))[:, 0]

    theirs = providers.geomloss_guided(guided)
    particles = torch.Size(shape).numel() * dtype.itemsize
    return Workload(
        op="guided_energy",
        case="every pair",
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=4 * particles,
        backward={("omega",): 12 * batch},
        terms={"output": terms, "omega": terms_of_slope},
        baselines={"broadcast": broadcast, "cdist": cdist},
        functions=(ours, reference),
        providers={"geomloss": Provider("geomloss", theirs, SLACK)},
        parts=TIMED,
        **options,
    )


WORKLOADS = [
    steps((16, 4, 3072), quick=True),
    steps((16, 16, 12288)),
    steps((64, 4, 16384)),
    samples("energy", 500, 2, quick=True),
    samples("energy", 2000, 2),
    samples("energy", 5000, 2),
    samples("energy", 2000, 64),
    samples("gaussian", 2000, 2),
    samples("laplace", 2000, 2),
]
