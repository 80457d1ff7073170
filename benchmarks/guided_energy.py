"""mean ||x_s - y||^beta - lam / 2 mean ||x_s - x_s'||^beta and its slope. Floor: one read of x, cond, uncond and the
targets; with noise and targets drawn inside, of x, cond, uncond and x0. The slope needs no further pass."""

from __future__ import annotations

import torch

import lgd_kernels as lgd
from benchmarks.workload import Workload, with_noise
from lgd_kernels import testing
from lgd_kernels.runtime.levels import step_coefficients

TO_OMEGA = ("omega",)
BETA, LAM = 1.75, 1.0


def guided(x, cond, uncond, omega, levels, target, prediction, churn, noise):
    """x_s [B, m, D] and targets [B, k, D] as one expression, in float32; omega [B, K] gives x_s [B K, m, D]."""
    a, b, v = (one.view(-1, 1, 1, 1) for one in step_coefficients(levels, prediction, churn))
    wide = torch.promote_types(x.dtype, torch.float32)
    x, cond, uncond, noise = (None if one is None else one.to(wide)[:, None] for one in (x, cond, uncond, noise))
    x_s = a * x + b * (cond + omega.view(x.shape[0], -1, 1, 1) * (cond - uncond))
    if noise is not None:
        x_s = x_s + v * noise
    y = with_noise(target, levels).to(wide)
    return x_s, y[:, None].expand(-1, x_s.shape[1], -1, -1)


def mean(attraction, repulsion, beta, lam, like):
    """The loss from squared distances [B, K, m, k] and [B, K, m, m]; the diagonal of the latter has no slope."""
    m = repulsion.shape[-1]
    same = torch.eye(m, dtype=torch.bool, device=repulsion.device)
    powers = repulsion.masked_fill(same, 1.0).pow(beta / 2).masked_fill(same, 0.0).sum((-1, -2))
    return (attraction.pow(beta / 2).mean((-1, -2)) - lam / 2 * powers / (m * (m - 1))).view(like.shape)


def broadcast(x, cond, uncond, omega, levels, target, prediction, churn, noise, beta, lam, **others):
    x_s, y = guided(x, cond, uncond, omega, levels, target, prediction, churn, noise)
    squares = ((x_s[:, :, :, None] - other[:, :, None]).square().sum(-1) for other in (y, x_s))
    return mean(*squares, beta, lam, omega)


def cdist(x, cond, uncond, omega, levels, target, prediction, churn, noise, beta, lam, **others):
    x_s, y = guided(x, cond, uncond, omega, levels, target, prediction, churn, noise)
    return mean(*(torch.cdist(x_s, other).square() for other in (y, x_s)), beta, lam, omega)


BASELINES = {"broadcast": broadcast, "cdist": cdist}


def curve(x, cond, uncond, levels, target, omega, *, prediction="x0", churn=0.0, noise=None, seed=None, beta=BETA,
          lam=LAM, impl=None):  # fmt: skip
    """The loss at omega [B, K]."""
    options = {"prediction": prediction, "churn": churn, "noise": noise, "seed": seed, "impl": impl}
    return lgd.guided_energy_curve(x, cond, uncond, levels, target, **options).loss(omega, beta, lam).to(omega.dtype)


def curve_by_points(omega, **arguments):
    """Its specification."""
    return torch.stack([lgd.guided_energy(omega=one, **arguments, impl="reference") for one in omega.unbind(1)], 1)


def statistics_of(arguments):
    """Squares of distances and of their slopes at omega: [B, K, pairs] of particles and targets, then of particles."""
    names = ("x", "cond", "uncond", "levels", "target", "churn", "seed")
    at = lgd.guided_energy_curve(**{name: arguments[name] for name in names if name in arguments}, impl="reference")
    P0, P1, P2, Q0, Q1, Q2 = at.statistics
    w = arguments["omega"].view(P0.shape[0], -1, 1)
    P2 = P2[:, :, None].expand_as(P0).flatten(1)[:, None]
    P0, P1, Q0, Q1, Q2 = (one.flatten(1)[:, None] for one in (P0, P1, Q0, Q1, Q2))
    return P0 + w * (2 * P1 + w * P2), P2, Q0 + w * (2 * Q1 + w * Q2), Q2


def terms(arguments, upstream):
    """Of the loss: powers of distances."""
    S, _, T, _ = statistics_of(arguments)
    return ((S ** (BETA / 2)).mean(-1) + LAM / 2 * (T ** (BETA / 2)).mean(-1)).view_as(upstream)


def terms_of_slope(arguments, upstream):
    """Each is below beta ||.||^(beta - 1) times the length of its slope."""
    S, P2, T, Q2 = statistics_of(arguments)
    each = (BETA * (square ** (BETA - 1) * turn).sqrt().mean(-1) for square, turn in ((S, P2), (T, Q2)))
    return upstream.abs() * (next(each) + LAM / 2 * next(each))[:, 0]


def workload(shape, dtype, draws=False, omegas=0, **options):
    """Shape [B, m, D], as many targets as particles; drawn inside from x0, or given."""
    batch, m, row = shape

    def arguments(generator):
        x, cond, uncond, y = (testing.sample(shape, dtype, generator) for _ in range(4))
        t = torch.linspace(0.9, 0.5, batch)
        omega = torch.rand((batch, omegas) if omegas else (batch,), generator=generator) * 3
        found = dict(
            x=x, cond=cond, uncond=uncond, omega=omega, levels=lgd.RectifiedFlow().levels(t, t - 0.3), target=y
        )
        if draws:
            found |= {"target": lgd.Renoise(y[:, 0], m, 7), "churn": 1.0, "seed": 7}
        return found

    particles = batch * m * row * dtype.itemsize  # one tensor of them; levels, omega and losses [B] are not counted
    return Workload(
        op="guided_energy",
        case=", ".join(filter(None, (f"curve, {omegas} omegas" if omegas else "", "drawn" if draws else "given"))),
        shape=shape,
        dtype=dtype,
        arguments=arguments,
        bytes=3 * particles + particles // (m if draws else 1),  # reads x, cond, uncond, and targets or x0
        backward={}
        if omegas
        else {TO_OMEGA: 12 * batch},  # reads upstream and the slope that is there; writes one more
        terms={"output": terms, "omega": terms_of_slope},
        baselines=BASELINES,
        functions=(curve, curve_by_points) if omegas else None,
        **options,
    )


WORKLOADS = [
    workload((64, 4, 16384), torch.float32, quick=True),
    workload((64, 4, 16384), torch.float32, draws=True, quick=True),
    workload((16, 4, 3072), torch.float32, quick=True),
    workload((16, 4, 3072), torch.float32, omegas=100, quick=True),
    workload((64, 4, 16384), torch.bfloat16),
    workload((16, 4, 12288), torch.float32),
    workload((16, 4, 12288), torch.bfloat16),
    workload((16, 16, 12288), torch.float32),
    workload((16, 16, 12288), torch.bfloat16),
    workload((256, 4, 12288), torch.float32, devices=("cuda",)),
    workload((256, 4, 12288), torch.bfloat16, devices=("cuda",)),
    workload((256, 4, 12288), torch.float32, draws=True, devices=("cuda",)),
    workload((256, 16, 12288), torch.float32, devices=("cuda",)),
    workload((256, 16, 12288), torch.bfloat16, devices=("cuda",)),
]
HOST = workload((1, 4, 16), torch.float32)  # for `benchmarks host`: a call that is all overhead
