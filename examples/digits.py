"""`python -m examples.digits`: learn guidance weights on real data with wrong labels, and compare them.

For each seed: split scikit-learn's digits, spoil the training labels, train a small denoiser on them, learn
omega(c, s, t) on the clean labels, choose every setting of every method on the validation split, and measure all
methods on the test split. docs/digits.md has the choices and the figures of eight seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import median

import torch

from examples import command

METHODS = ("unguided", "constant", "interval", "per class", "learned", "baked", "fitted", "L2")


ABLATIONS = (
    ("beta", (0.5, 1.0, 1.5, 1.75, 2.0)),
    ("lam", (0.0, 0.5, 0.9, 1.0)),
    ("particles", (2, 4, 8, 16)),
    ("delta", (0.01, 0.05, 0.1, 0.2, 0.3)),
)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

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
    ablations: tuple[tuple[str, tuple[float, ...]], ...] = ()
    timing_rounds: int = 60  # of a training step with each form of the loss

    @classmethod
    def quick(cls, noise: str, wrong: str, ablations: tuple = ()) -> Config:
        return cls(
            noise, wrong, l2_steps=10, fit_items=600, gammas=(0.0, 1.0), variant_steps=5,
            ablations=tuple((name, values[:2]) for name, values in ablations),
            denoiser_steps=200, omega_steps=20, checkpoint_every=10, learning=((0.1, 0.02),),
            sampling_steps=6, constants=(0.0, 0.5), interval_omegas=(0.5, 1.0), interval_lows=(0.0, 0.4),
            interval_highs=(0.8,), validation_samples=8, test_samples=12, timing_rounds=3,
        )  # fmt: skip


def run_seed(seed: int, config: Config, track) -> dict:
    """One seed from data to test figures. The keys under "show" are for the report's pictures only."""
    from examples import guidance, measures, timing, variants
    from examples.data import PIXELS, load_digits
    from examples.denoiser import NULL, train_denoiser
    from lgd_kernels.learn import Frozen, Settings, l2_loss
    from lgd_kernels.sampling.schedules import RectifiedFlow

    started = time.perf_counter()
    schedule, steps = RectifiedFlow(), config.sampling_steps

    def stream(stage: int) -> torch.Generator:  # no stage's random numbers depend on another's length
        return torch.Generator().manual_seed(1000 * seed + stage)

    torch.manual_seed(seed)  # initial weights
    data = load_digits(config.noise, config.wrong, stream(0))
    net = train_denoiser(data.train.x, data.captions, schedule, stream(1), steps=config.denoiser_steps, track=track)
    frozen, clean = Frozen(net, schedule, null=NULL), (data.train.x, data.train.c)
    classifier = measures.fit_classifier(data.train)

    def draw(tables: torch.Tensor, label: str) -> torch.Tensor:  # test samples: one noise for every method
        return guidance.sample_classes(
            frozen.predict, tables, config.test_samples, PIXELS, schedule, stream(4), track=track, label=label
        )

    def validate(tables: torch.Tensor, label: str) -> torch.Tensor:  # [settings, 10]: its mean is the primary figure
        x = guidance.sample_classes(
            frozen.predict, tables, config.validation_samples, PIXELS, schedule, stream(2), track=track, label=label
        )
        return measures.energy_per_class(x, data.validation)

    constants = [(omega, 0.0, 1.0) for omega in config.constants]
    intervals = list(product(config.interval_omegas, config.interval_lows, config.interval_highs))
    settings = constants + intervals
    tables = torch.stack([guidance.interval_table(*setting, steps) for setting in settings])
    found_by_class = validate(tables, f"grid of {len(settings)}")
    found = found_by_class.mean(1)
    constant = int(found[: len(constants)].argmin())
    interval = len(constants) + int(found[len(constants) :].argmin())
    per_class = found_by_class.argmin(0)  # [10]: a search for each class, with its own part of the figure

    learning_started = time.perf_counter()
    candidates, learning = [], []
    for delta, s_min in config.learning:
        own = Settings(delta=delta, s_min=s_min, ema=0.99, seed=1000 * seed + 3)
        checkpoints = guidance.learn_omega(
            frozen, clean, own, steps=config.omega_steps, every=config.checkpoint_every, track=track
        )
        for i, checkpoint in enumerate(checkpoints):
            candidates.append(checkpoint)
            learning.append({"delta": delta, "s_min": s_min, "steps": (i + 1) * config.checkpoint_every})
    learning_seconds = time.perf_counter() - learning_started
    learned_tables = torch.stack([guidance.learned_table(omega, schedule, steps) for omega in candidates])
    learned_found = validate(learned_tables, "checkpoints").mean(1)
    learned = int(learned_found.argmin())
    network_seconds = learning_seconds / len(config.learning)

    own = Settings(s_min=0.02, ema=0.99, seed=1000 * seed + 6)
    table, fit, *_ = variants.fitted(frozen, clean, replace(own, delta=0.02), config.fit_items)
    baked, bake_error = variants.baked(candidates[learned])
    squared = guidance.learn_omega(
        frozen, clean, own, loss=l2_loss, steps=config.l2_steps, every=max(1, config.l2_steps // 3), track=track,
        label="L2",
    )  # fmt: skip
    squared_tables = torch.stack([guidance.learned_table(omega, schedule, steps) for omega in squared])
    squared_found = validate(squared_tables, "L2").mean(1)

    chosen = torch.stack(
        [
            torch.zeros_like(tables[0]),
            tables[constant],
            tables[interval],
            tables[per_class, :, torch.arange(10)].T,
            learned_tables[learned],
            guidance.learned_table(baked, schedule, steps),
            guidance.learned_table(table, schedule, steps),
            squared_tables[squared_found.argmin()],
        ]
    )
    x = draw(chosen, "test samples")
    rewards = variants.reward_sweep(
        frozen, data.train, data.test, own, config.gammas, config.variant_steps, draw, classifier, stream(7),
        sampling_steps=steps, track=track,
    )  # fmt: skip
    ablations = variants.ablations(
        frozen, clean, data.test, own, dict(config.ablations), config.variant_steps, draw, sampling_steps=steps,
        track=track,
    ) if config.ablations else {}  # fmt: skip
    u = torch.linspace(0, 1, 51)
    return {
        "seed": seed,
        "chosen": {
            "constant": {"omega": settings[constant][0], "validation": float(found[constant])},
            "interval": {
                **dict(zip(("omega", "low", "high"), settings[interval], strict=True)),
                "validation": float(found[interval]),
            },
            "per class": {
                "settings": [settings[i] for i in per_class],
                "validation": float(found_by_class.min(0).values.mean()),
            },
            "learned": {**learning[learned], "validation": float(learned_found[learned])},
            "L2": {"validation": float(squared_found.min())},
        },
        "validation": {
            "constant": [[omega, float(v)] for omega, v in zip(config.constants, found[: len(constants)], strict=True)],
            "interval": [[*setting, float(v)] for setting, v in zip(intervals, found[len(constants) :], strict=True)],
            "learned": [{**setting, "energy": float(v)} for setting, v in zip(learning, learned_found, strict=True)],
            "L2": [{"energy": float(v)} for v in squared_found],
        },
        "test": {name: measures.measure(x[i], data.test, classifier) for i, name in enumerate(METHODS)},
        "accuracy_real": measures.accuracy(classifier, *data.test),
        "wrong_captions": [  # share of a class's captions that are wrong
            float((data.train.c[data.captions == c] != c).double().mean()) for c in range(10)
        ],
        "replaced": data.rates.tolist(),
        "fit": {**fit, "network": network_seconds},
        "bake_error": bake_error,
        "reward": rewards,
        "ablations": ablations,
        "loss_share": {
            "predicted": timing.loss_share(frozen, clean, rounds=config.timing_rounds, track=track),
            "cached": timing.loss_share(frozen, clean, cache=2048, rounds=config.timing_rounds, track=track),
        },
        "omega_path": learned_tables[learned].tolist(),  # [steps, classes], from noise to data
        "seconds": time.perf_counter() - started,
        "show": {
            "real": torch.stack([data.test.of_class(c)[:8] for c in range(10)]),  # [10, 8, 64]
            "samples": x[:, :, :8],  # [methods, 10, 8, 64]
            "omega": guidance.omega_grid(candidates[learned], schedule, *torch.meshgrid(u, u, indexing="ij")),
        },
    }


def summarise(seeds: list[dict]) -> dict:
    """Means over the seeds, and the paired differences learned - other, each with spread and interval; medians of what
    the loss takes."""
    from examples.measures import spread

    figures = ("energy", "energy_overall", "frechet", "accuracy")
    values = {m: {f: [seed["test"][m][f] for seed in seeds] for f in figures} for m in METHODS}
    return {
        "methods": {m: {f: spread(values[m][f]) for f in figures} for m in METHODS},
        "paired": {
            f"learned - {m}": {
                f: spread([a - b for a, b in zip(values["learned"][f], values[m][f], strict=True)]) for f in figures
            }
            for m in METHODS
            if m != "learned"
        },
        "loss_share": {
            kind: {name: median(seed["loss_share"][kind][name] for seed in seeds) for name in share}
            for kind, share in seeds[0]["loss_share"].items()
        },
        "fit": {name: median(seed["fit"][name] for seed in seeds) for name in seeds[0]["fit"]},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("digits", __doc__, seeds=3)
    parser.add_argument(
        "--noise", choices=("rising", "uniform"), default="rising",
        help="labels replaced: 0 to 75 %% over the classes, or 40 %% in each",
    )  # fmt: skip
    parser.add_argument(
        "--wrong", choices=("any", "swapped"), default="any",
        help="a replaced label is any of the ten, or the chosen images pass their labels around",
    )  # fmt: skip
    parser.add_argument("--ablate", action="store_true", help="also vary beta, lam, m and delta, one at a time")
    return command.parsed(parser, argv)


def main(argv: list[str]) -> int:
    """Run the demo; write report.html and metrics.json; print the table. Returns the exit status."""
    args = parse(argv)
    if command.lacks("sklearn", "matplotlib"):
        return 1
    from examples.report import text_table, write_report
    from lgd_kernels.runtime.progress import bars

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ablated = ABLATIONS if args.ablate else ()
    config = (
        Config.quick(args.noise, args.wrong, ablated)
        if args.quick
        else Config(args.noise, args.wrong, ablations=ablated)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = [run_seed(seed, config, bars(f"seed {seed} ({seed + 1} of {args.seeds})")) for seed in range(args.seeds)]
    shown = [seed.pop("show") for seed in seeds]
    metrics = {
        "config": asdict(config),
        "versions": command.versions(),
        "quick": args.quick,
        "seeds": seeds,
        "summary": summarise(seeds),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_report(args.out / "report.html", metrics, shown)
    print(text_table(metrics))
    print(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
