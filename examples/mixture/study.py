"""Study one denoiser with one seed: choose, learn and fit omega in every way, and measure guided runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.mixture.plane import CLASSES
from examples.shared import by_hand, guidance, omegas
from examples.shared.measures import energy_per_class
from lgd_kernels.learn import Frozen, Settings, curve, draw
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant, fit_interval, fit_table
from lgd_kernels.runtime.levels import step_coefficients
from lgd_kernels.runtime.progress import Track

METHODS = (
    "unguided",
    "constant",
    "interval",
    "per class",
    "loss constant",
    "loss interval",
    "learned",
    "baked",
    "fitted",
    "L2",
)
KNOTS = 9  # of the fitted table, for s and for t
BANDS = (0.25, 0.5, 0.75)  # of t, between which the least loss is searched for
STEPS = ((0.1, 0.2), (0.2, 0.4), (0.4, 0.5), (0.4, 0.7), (0.6, 0.7), (0.6, 0.9), (0.8, 0.9))  # (s, t) for the L2 bias


@dataclass(frozen=True)
class Config:
    """Hold everything that a run depends on."""

    train: int = 4096  # clean pairs to learn from, as many held out
    wrong: float = 0.4  # share of the labels that are replaced
    even: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)  # probability of each new label
    uneven: tuple[float, ...] = (0.0, 1 / 3, 2 / 3)
    denoiser_steps: tuple[int, int] = (150, 200)
    denoiser_width: int = 64
    omega_steps: int = 200
    batch: int = 256
    fit_items: int = 8192
    bias_items: int = 2048  # at each (s, t)
    sampling_steps: int = 20
    constants: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)
    interval_omegas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    interval_lows: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    interval_highs: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    validation_samples: int = 200  # per class and setting
    validation_real: int = 1000  # held-out data, per class
    test_samples: int = 600
    test_real: int = 2000
    shown: int = 250

    @classmethod
    def quick(cls) -> Config:
        """Return a run of seconds."""
        return cls(
            train=300,
            denoiser_steps=(20, 30),
            denoiser_width=16,
            omega_steps=10,
            batch=64,
            fit_items=400,
            bias_items=100,
            sampling_steps=6,
            constants=(0.0, 0.5, 1.0),
            interval_omegas=(0.5, 1.0),
            interval_lows=(0.0, 0.4),
            interval_highs=(0.7, 1.0),
            validation_samples=20,
            validation_real=40,
            test_samples=30,
            test_real=60,
            shown=20,
        )


class Plane(NamedTuple):
    """Hold the data of a seed."""

    train: tuple[Tensor, Tensor]  # (x0 [N, 2], c [N]), with right labels
    held: tuple[Tensor, Tensor]
    validation: Tensor  # [C, k, 2]
    test: Tensor


def study(
    frozen: Frozen, data: Plane, seed: int, config: Config, track: Track
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures for metrics.json, and what only the pictures need. Times are the schedule's, unit times."""
    schedule, steps = frozen.schedule, config.sampling_steps
    own = Settings(
        delta=1 / steps, s_min=0.02, lr=2e-3, ema=0.99, seed=seed, batch=config.batch, cache=config.fit_items
    )

    def sampled(tables: Tensor, count: int, offset: int, label: str) -> Tensor:  # one noise for all tables
        generator = torch.Generator().manual_seed(seed + offset)
        return guidance.sample_classes(
            frozen.predict, tables, count, 2, schedule, generator, track=track, label=label, chunk=8
        )

    def validate(tables: Tensor, label: str) -> Tensor:  # [settings, C]
        return energy_per_class(sampled(tables, config.validation_samples, 1, label), data.validation)

    hand = by_hand.search(
        config.constants,
        config.interval_omegas,
        config.interval_lows,
        config.interval_highs,
        steps=steps,
        classes=CLASSES,
        validate=validate,
    )
    fit = omegas.fitted(frozen, data.train, replace(own, seed=seed + 2), config.fit_items, count=KNOTS, classes=CLASSES)
    started = time.perf_counter()
    (learned,) = guidance.learn_omega(
        frozen, data.train, own, classes=CLASSES, steps=config.omega_steps, every=config.omega_steps, track=track
    )
    took = fit.seconds | {"network": time.perf_counter() - started}
    baked, bake_error = omegas.baked(learned)
    s_knots, t_knots = omegas.knots(KNOTS)
    free = {"conditions": CLASSES, "smooth": 20.0, "shared": 2.0}
    found: dict[str, Any] = {  # of each method that is not set by hand
        "loss constant": fit_constant(fit.curves),
        "loss interval": fit_interval(fit.curves, fit.t, torch.linspace(0, 1, 21)),
        "learned": learned,
        "baked": baked,
        "fitted": fit.table,
        # the least of its loss, exactly: the bias is that of the loss, not of training
        "L2": fit_table(fit.curves, fit.c, fit.s, fit.t, s_knots, t_knots, beta=2.0, lam=0.0, **free),
    }
    paths = hand.best() | {name: guidance.path_table(omega, schedule, steps, CLASSES) for name, omega in found.items()}
    tables = torch.stack([paths[method] for method in METHODS])
    every = torch.cat((tables, hand.tables[: len(hand.constants)]))
    drawn = sampled(every, config.test_samples, 3, "test samples")
    test = energy_per_class(drawn, data.test)  # [methods + constants, C]

    held = Batches(frozen, data.held, own, torch.device("cpu")).of(data.held, config.fit_items, seed + 4)
    held_curves = curve(held)

    def loss(omega: Any) -> float:
        with torch.no_grad():
            return float(held_curves.loss(omega(held.c, held.s, held.t).double()).mean())

    grid = torch.tensor(config.constants, dtype=torch.float64)
    band = torch.bucketize(held.t, torch.tensor(BANDS))
    limited = found["loss interval"]
    by_loss = ("loss constant", "loss interval", "learned", "baked", "fitted")
    figures = {
        "chosen": {
            "constant": hand.settings[hand.constant][0],
            "interval": hand.settings[hand.interval],
            "per class": [hand.settings[i] for i in hand.per_class],
            "loss constant": float(found["loss constant"].omega.detach()),
            "loss interval": [float(part.detach()) for part in (limited.omega, limited.low, limited.high)],
        },
        "validation": {
            "constant": hand.found[: len(hand.constants)].tolist(),
            "interval": hand.found[len(hand.constants) :].tolist(),
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
            "unguided": loss(lambda c, s, t: torch.zeros_like(t)),
            **{name: loss(found[name]) for name in by_loss},
        },
        "least": held_curves.minimize(bracket=(-1.0, 3.0), group=band).tolist(),  # of each band of t, below 0 allowed
        "omega_path": {name: paths[name].tolist() for name in ("learned", "fitted", "L2")},  # [steps, C]
        "bake_error": bake_error,
        "seconds": took,
    }
    show = {
        "samples": dict(zip(METHODS, drawn[: len(METHODS), :, : config.shown], strict=True)),
        "omega": guidance.omega_square(learned, schedule, 41, CLASSES),
    }
    return figures, show


def l2_bias(frozen: Frozen, data: tuple[Tensor, Tensor], seed: int, items: int) -> list[dict[str, float]]:
    """Return the omega with the least L2 loss (beta 2, lam 0) at each (s, t) of STEPS, and the formula for an exact
    denoiser, signal_t A / B."""
    x0, c = data
    chosen = torch.randint(0, len(x0), (items * len(STEPS),), generator=torch.Generator().manual_seed(seed))
    group = torch.arange(len(STEPS)).repeat_interleave(items)
    s, t = torch.tensor(STEPS)[group].unbind(1)
    particles = draw(frozen, x0[chosen], c[chosen], s, t, seed=seed)
    rows: list[dict[str, float]] = []
    for churn in (0.0, 1.0):
        found = curve(particles, churn=churn).minimize(beta=2.0, lam=0.0, bracket=(0.0, 6.0), group=group)
        of_x, of_prediction, _ = step_coefficients(particles.levels, "x0", churn)
        expected = (particles.levels.signal_t * of_x / of_prediction)[::items]
        rows += [
            {"s": pair[0], "t": pair[1], "churn": churn, "found": float(one), "expected": float(other)}
            for pair, one, other in zip(STEPS, found, expected, strict=True)
        ]
    return rows
