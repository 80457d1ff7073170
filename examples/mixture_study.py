"""One denoiser, one seed: omega chosen, learned and fitted in every way, and how far guided runs are from data."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import lgd_kernels as lgd
from examples import guidance, variants
from examples.plane import CLASSES
from lgd_kernels.learn import Frozen, Settings, curve, draw
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant, fit_interval, fit_table
from lgd_kernels.runtime.levels import step_coefficients
from lgd_kernels.runtime.progress import Track

METHODS = (
    "unguided", "constant", "interval", "per class", "loss constant", "loss interval", "learned", "baked", "fitted",
    "L2",
)  # fmt: skip
KNOTS = 9  # of the fitted table, for s and for t
BANDS = (0.25, 0.5, 0.75)  # of t, between which the least loss is looked for
STEPS = ((0.1, 0.2), (0.2, 0.4), (0.4, 0.5), (0.4, 0.7), (0.6, 0.7), (0.6, 0.9), (0.8, 0.9))  # (s, t) for the L2 bias


class Plane(NamedTuple):
    """What a seed has drawn."""

    train: tuple[Tensor, Tensor]  # (x0 [N, 2], c [N]), labels right
    held: tuple[Tensor, Tensor]
    validation: Tensor  # [C, k, 2]
    test: Tensor


def study(frozen: Frozen, data: Plane, seed: int, config, track: Track) -> tuple[dict, dict]:
    """Figures for metrics.json, and what the pictures need besides. Times are unit times, the schedule's own."""
    schedule, steps = frozen.schedule, config.sampling_steps
    own = Settings(
        delta=1 / steps, s_min=0.02, lr=2e-3, ema=0.99, seed=seed, batch=config.batch, cache=config.fit_items
    )

    def sampled(tables: Tensor, count: int, offset: int, label: str) -> Tensor:  # one noise for all tables
        generator = torch.Generator().manual_seed(seed + offset)
        return guidance.sample_classes(
            frozen.predict, tables, count, 2, schedule, generator, track=track, label=label, chunk=8
        )

    def path(omega) -> Tensor:
        return guidance.learned_table(omega, schedule, steps, CLASSES)

    constants = [(omega, 0.0, 1.0) for omega in config.constants]
    spans = [(low, high) for low, high in product(config.interval_lows, config.interval_highs) if low < high]
    intervals = [(omega, *span) for omega, span in product(config.interval_omegas, spans)]
    settings = constants + intervals
    tables = torch.stack([guidance.interval_table(*setting, steps, CLASSES) for setting in settings])
    found = energy(sampled(tables, config.validation_samples, 1, f"grid of {len(settings)}"), data.validation)
    best = found.mean(1)
    constant = int(best[: len(constants)].argmin())
    interval = len(constants) + int(best[len(constants) :].argmin())
    per_class = found.argmin(0)  # [C]

    fit = variants.fitted(frozen, data.train, replace(own, seed=seed + 2), config.fit_items, KNOTS, CLASSES)
    table, took = fit.table, fit.seconds
    by_loss = fit_constant(fit.curves)
    limited = fit_interval(fit.curves, fit.t, torch.linspace(0, 1, 21))
    started = time.perf_counter()
    learned = guidance.learn_omega(
        frozen, data.train, own, classes=CLASSES, steps=config.omega_steps, every=config.omega_steps, track=track
    )[0]
    took["network"] = time.perf_counter() - started
    baked, bake_error = variants.baked(learned)
    squared = fit_table(  # the least of its loss, exactly: the bias is that of the loss, not of a training
        fit.curves, fit.c, fit.s, fit.t, *variants.knots(KNOTS), conditions=CLASSES, smooth=20.0, shared=2.0, beta=2.0,
        lam=0.0,
    )  # fmt: skip

    paths = {
        "unguided": torch.zeros_like(tables[0]),
        "constant": tables[constant],
        "interval": tables[interval],
        "per class": tables[per_class, :, torch.arange(CLASSES)].T,
        **dict(zip(METHODS[4:], map(path, (by_loss, limited, learned, baked, table, squared)), strict=True)),
    }
    drawn = sampled(torch.cat((torch.stack(list(paths.values())), tables[: len(constants)])), config.test_samples, 3,
                    "test samples")  # fmt: skip
    test = energy(drawn, data.test)  # [methods + constants, C]

    held = Batches(frozen, data.held, own, torch.device("cpu")).of(data.held, config.fit_items, seed + 4)
    held_curves = curve(held)

    def loss(omega) -> float:
        with torch.no_grad():
            return float(held_curves.loss(omega(held.c, held.s, held.t).double()).mean())

    grid = torch.tensor(config.constants, dtype=torch.float64)
    band = torch.bucketize(held.t, torch.tensor(BANDS))
    u = torch.linspace(0, 1, 41)
    figures = {
        "chosen": {
            "constant": settings[constant][0],
            "interval": settings[interval],
            "per class": [settings[i] for i in per_class],
            "loss constant": float(by_loss.omega.detach()),
            "loss interval": [float(part.detach()) for part in (limited.omega, limited.low, limited.high)],
        },
        "validation": {
            "constant": best[: len(constants)].tolist(),
            "interval": best[len(constants) :].tolist(),
        },
        "test": {
            name: {"energy": float(each.mean()), "energy_per_class": each.tolist()}
            for name, each in zip(METHODS, test, strict=False)
        },
        "constants": {
            "energy": test[len(METHODS) :].mean(1).tolist(),
            "loss": held_curves.loss(grid.expand(len(held.c), -1)).mean(0).tolist(),
        },
        "held_out_loss": {
            "unguided": loss(lambda c, s, t: torch.zeros_like(t)), "loss constant": loss(by_loss),
            "loss interval": loss(limited), "learned": loss(learned), "baked": loss(baked), "fitted": loss(table),
        },
        "least": held_curves.minimize(bracket=(-1.0, 3.0), group=band).tolist(),  # of each band of t, below 0 allowed
        "omega_path": {name: paths[name].tolist() for name in ("learned", "fitted", "L2")},  # [steps, C]
        "bake_error": bake_error,
        "seconds": took,
    }  # fmt: skip
    show = {
        "samples": dict(zip(METHODS, drawn[: len(METHODS), :, : config.shown], strict=True)),
        "omega": guidance.omega_grid(learned, schedule, *torch.meshgrid(u, u, indexing="ij"), CLASSES),  # [41, 41, C]
    }
    return figures, show


def energy(x: Tensor, real: Tensor) -> Tensor:
    """Energy distance `2 E|x - y| - E|x - x'| - E|y - y'|` (unbiased) of each class: x [settings, C, n, 2] and real
    [C, k, 2] -> [settings, C]."""
    apart = lgd.energy_mmd(x.flatten(0, 1), real.repeat(len(x), 1, 1), batched=True, target_term=False)
    within = torch.stack([torch.pdist(one).mean() for one in real])
    return 2 * apart.view(len(x), -1) - within


def l2_bias(frozen: Frozen, data: tuple[Tensor, Tensor], seed: int, items: int) -> list[dict]:
    """The omega with the least L2 loss (beta 2, lam 0) at a few (s, t), and what the formula says of an exact
    denoiser's: signal_t A / B."""
    x0, c = data
    chosen = torch.randint(0, len(x0), (items * len(STEPS),), generator=torch.Generator().manual_seed(seed))
    group = torch.arange(len(STEPS)).repeat_interleave(items)
    s, t = torch.tensor(STEPS)[group].unbind(1)
    particles = draw(frozen, x0[chosen], c[chosen], s, t, seed=seed)
    rows = []
    for churn in (0.0, 1.0):
        found = curve(particles, churn=churn).minimize(beta=2.0, lam=0.0, bracket=(0.0, 6.0), group=group)
        of_x, of_prediction, _ = step_coefficients(particles.levels, "x0", churn)
        expected = (particles.levels.signal_t * of_x / of_prediction)[::items]
        rows += [
            {"s": pair[0], "t": pair[1], "churn": churn, "found": float(one), "expected": float(other)}
            for pair, one, other in zip(STEPS, found, expected, strict=True)
        ]
    return rows
