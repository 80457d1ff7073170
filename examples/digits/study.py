"""Compare guidance weights on the digits, one seed from data to test figures; and summarise the seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import learning as cost
from examples.digits import judge, variants
from examples.digits.data import CLASSES, NULL, PIXELS, load_digits
from examples.shared import by_hand, guidance, omegas
from examples.shared.denoiser import Denoiser, train_denoiser
from examples.shared.measures import energy_per_class, paired, spread
from lgd_kernels.learn import Frozen, Settings, l2_loss
from lgd_kernels.runtime.progress import Track
from lgd_kernels.sampling.schedules import RectifiedFlow

METHODS = ("unguided", "constant", "interval", "per class", "learned", "baked", "fitted", "L2")
FIGURES = ("energy", "energy_overall", "frechet", "accuracy")
Ablations = tuple[tuple[str, tuple[float, ...]], ...]
ABLATIONS: Ablations = (
    ("beta", (0.5, 1.0, 1.5, 1.75, 2.0)),
    ("lam", (0.0, 0.5, 0.9, 1.0)),
    ("particles", (2, 4, 8, 16)),
    ("delta", (0.01, 0.05, 0.1, 0.2, 0.3)),
)


@dataclass(frozen=True)
class Config:
    """Hold everything that a run depends on."""

    noise: str = "rising"
    wrong: str = "any"
    denoiser_steps: int = 3000
    omega_steps: int = 900
    checkpoint_every: int = 150
    learning: tuple[tuple[float, float], ...] = ((0.02, 0.02), (0.1, 0.02), (0.1, 0.1))  # (delta, s_min)
    sampling_steps: int = 50
    constants: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    interval_omegas: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    interval_lows: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7)
    interval_highs: tuple[float, ...] = (0.75, 0.8, 0.9, 1.0)
    validation_samples: int = 100  # per class and setting
    test_samples: int = 300  # per class and method
    l2_steps: int = 450
    fit_items: int = 20480
    gammas: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0)
    variant_steps: int = 300  # of each reward and each ablation
    ablations: Ablations = ()
    timing_rounds: int = 60  # of a training step with each form of the loss

    def quick(self) -> Config:
        """Return a run of seconds."""
        return replace(
            self,
            denoiser_steps=200,
            omega_steps=20,
            checkpoint_every=10,
            learning=((0.1, 0.02),),
            sampling_steps=6,
            constants=(0.0, 0.5),
            interval_omegas=(0.5, 1.0),
            interval_lows=(0.0, 0.4),
            interval_highs=(0.8,),
            validation_samples=8,
            test_samples=12,
            l2_steps=10,
            fit_items=600,
            gammas=(0.0, 1.0),
            variant_steps=5,
            ablations=tuple((name, values[:2]) for name, values in self.ablations),
            timing_rounds=3,
        )


def run_seed(seed: int, config: Config, track: Track) -> dict[str, Any]:
    """Return the figures of one seed. What only the pictures need is under "show"."""
    started = time.perf_counter()
    schedule, steps = RectifiedFlow(), config.sampling_steps

    def stream(stage: int) -> torch.Generator:  # no stage's random numbers depend on another's length
        return torch.Generator().manual_seed(1000 * seed + stage)

    torch.manual_seed(seed)  # initial weights
    data = load_digits(config.noise, config.wrong, stream(0))
    images, labels = data.train.x, data.captions
    net = Denoiser(CLASSES, PIXELS)
    train_denoiser(net, images, labels, schedule, stream(1), steps=config.denoiser_steps, track=track)
    frozen, clean = Frozen(net, schedule, null=NULL), (data.train.x, data.train.c)
    classifier = judge.fit_classifier(data.train)

    def sample(tables: Tensor, count: int, stage: int, label: str) -> Tensor:
        return guidance.sample_classes(
            frozen.predict, tables, count, PIXELS, schedule, stream(stage), track=track, label=label
        )

    def draw(tables: Tensor, label: str) -> Tensor:  # test samples: one noise for every method
        return sample(tables, config.test_samples, 4, label)

    def validate(tables: Tensor, label: str) -> Tensor:  # [settings, 10]: its mean is the primary figure
        return energy_per_class(sample(tables, config.validation_samples, 2, label), data.validation.by_class())

    def learn(settings: Settings, total: int, every: int, **options: Any) -> list:
        return guidance.learn_omega(
            frozen, clean, settings, classes=CLASSES, steps=total, every=every, track=track, **options
        )

    def path(omega: Any) -> Tensor:
        return guidance.path_table(omega, schedule, steps, CLASSES)

    hand = by_hand.search(
        config.constants,
        config.interval_omegas,
        config.interval_lows,
        config.interval_highs,
        steps=steps,
        classes=CLASSES,
        validate=validate,
    )

    learning_started = time.perf_counter()
    candidates, learning = [], []
    for delta, s_min in config.learning:
        own = Settings(delta=delta, s_min=s_min, ema=0.99, seed=1000 * seed + 3)
        for i, checkpoint in enumerate(learn(own, config.omega_steps, config.checkpoint_every)):
            candidates.append(checkpoint)
            learning.append({"delta": delta, "s_min": s_min, "steps": (i + 1) * config.checkpoint_every})
    learning_seconds = time.perf_counter() - learning_started
    learned_tables = torch.stack([path(omega) for omega in candidates])
    learned_found = validate(learned_tables, "checkpoints").mean(1)
    learned = int(learned_found.argmin())

    own = Settings(s_min=0.02, ema=0.99, seed=1000 * seed + 6)
    fit = omegas.fitted(frozen, clean, replace(own, delta=0.02), config.fit_items, count=8, classes=CLASSES)
    baked, bake_error = omegas.baked(candidates[learned])
    squared = learn(own, config.l2_steps, max(1, config.l2_steps // 3), loss=l2_loss, label="L2")
    squared_tables = torch.stack([path(omega) for omega in squared])
    squared_found = validate(squared_tables, "L2").mean(1)

    chosen = hand.best() | {
        "learned": learned_tables[learned],
        "baked": path(baked),
        "fitted": path(fit.table),
        "L2": squared_tables[squared_found.argmin()],
    }
    x = draw(torch.stack([chosen[method] for method in METHODS]), "test samples")
    bench = variants.Bench(frozen, data, own, config.variant_steps, steps, draw, track)
    rewards = variants.reward_sweep(bench, config.gammas, classifier, stream(7))
    ablations = variants.ablations(bench, dict(config.ablations)) if config.ablations else {}
    omega, low, high = hand.settings[hand.interval]
    found = hand.found.tolist()
    return {
        "seed": seed,
        "chosen": {
            "constant": {"omega": hand.settings[hand.constant][0], "validation": found[hand.constant]},
            "interval": {"omega": omega, "low": low, "high": high, "validation": found[hand.interval]},
            "per class": {
                "settings": [hand.settings[i] for i in hand.per_class],
                "validation": hand.per_class_found,
            },
            "learned": {**learning[learned], "validation": float(learned_found[learned])},
            "L2": {"validation": float(squared_found.min())},
        },
        "validation": {
            "constant": [[one[0], figure] for one, figure in zip(hand.constants, found, strict=False)],
            "interval": [
                [*one, figure] for one, figure in zip(hand.intervals, found[len(hand.constants) :], strict=True)
            ],
            "learned": [{**setting, "energy": float(v)} for setting, v in zip(learning, learned_found, strict=True)],
            "L2": [{"energy": float(v)} for v in squared_found],
        },
        "test": {name: judge.measure(x[i], data.test, classifier) for i, name in enumerate(METHODS)},
        "accuracy_real": judge.accuracy(classifier, *data.test),
        "wrong_captions": [  # share of a class's captions that are wrong
            float((data.train.c[data.captions == c] != c).double().mean()) for c in range(CLASSES)
        ],
        "replaced": data.rates.tolist(),
        "fit": {**fit.seconds, "network": learning_seconds / len(config.learning)},
        "bake_error": bake_error,
        "reward": rewards,
        "ablations": ablations,
        "loss_share": {
            kind: cost.loss_share(frozen, clean, CLASSES, cache=cache, rounds=config.timing_rounds, track=track)
            for kind, cache in (("predicted", 0), ("cached", 2048))
        },
        "omega_path": learned_tables[learned].tolist(),  # [steps, classes], from noise to data
        "seconds": time.perf_counter() - started,
        "show": {
            "real": torch.stack([images[:8] for images in data.test.by_class()]),  # [10, 8, 64]
            "samples": x[:, :, :8],  # [methods, 10, 8, 64]
            "omega": guidance.omega_square(candidates[learned], schedule, 51, CLASSES),
        },
    }


def summarise(seeds: list[dict]) -> dict[str, Any]:
    """Return, over the seeds: means, paired differences learned - other, medians of what the loss and the fit take."""
    values = {m: {f: [seed["test"][m][f] for seed in seeds] for f in FIGURES} for m in METHODS}
    return {
        "methods": {m: {f: spread(values[m][f]) for f in FIGURES} for m in METHODS},
        "paired": {
            f"learned - {m}": {f: paired(values["learned"][f], values[m][f]) for f in FIGURES}
            for m in METHODS
            if m != "learned"
        },
        "loss_share": {
            kind: {name: median(seed["loss_share"][kind][name] for seed in seeds) for name in share}
            for kind, share in seeds[0]["loss_share"].items()
        },
        "fit": {name: median(seed["fit"][name] for seed in seeds) for name in seeds[0]["fit"]},
    }
