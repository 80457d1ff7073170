"""`python -m examples.mixture`: learned guidance where all is known, a mixture of Gaussians in the plane.

For each seed and each of five denoisers (exact; trained for 150 and for 200 steps; exact for data with wrong labels,
evenly and unevenly spread over the classes): how far guided runs are from held-out data as the weight is constant,
limited to an interval, learned, baked, fitted, or fitted to the L2 loss. docs/mixture.md has the figures of eight
seeds.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

from examples import command
from lgd_kernels.runtime.progress import bars, silent

DENOISERS = ("exact", "150 steps", "200 steps", "even labels", "uneven labels")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    train: int = 4096  # clean pairs to learn from, as many held out
    wrong: float = 0.4  # share of the labels that are thrown away and drawn anew
    even: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)  # which label is drawn then
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
        return cls(
            train=300, denoiser_steps=(20, 30), denoiser_width=16, omega_steps=10, batch=64, fit_items=400,
            bias_items=100, sampling_steps=6, constants=(0.0, 0.5, 1.0), interval_omegas=(0.5, 1.0),
            interval_lows=(0.0, 0.4), interval_highs=(0.7, 1.0), validation_samples=20, validation_real=40,
            test_samples=30, test_real=60, shown=20,
        )  # fmt: skip


def run_seed(seed: int, config: Config, track) -> tuple[dict, dict]:
    """One seed, all denoisers: what goes into metrics.json, and what only the pictures need."""
    from examples.denoiser import train_denoiser
    from examples.mixture_study import Plane, l2_bias, study
    from examples.plane import CLASSES, NULL, Mixture, pinwheel
    from lgd_kernels.learn import Frozen
    from lgd_kernels.sampling.schedules import RectifiedFlow

    started = time.perf_counter()
    schedule, truth = RectifiedFlow(), pinwheel()

    def stream(stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + stage)

    def pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        c = torch.randint(0, CLASSES, (config.train,), generator=generator)
        return truth.sample(c, generator), c

    def exact(mixture: Mixture) -> Frozen:
        return Frozen(lambda x, t, c: mixture.denoise(x, *schedule.signal_noise(t), c), schedule, null=NULL)

    data = Plane(
        pairs(stream(0)), pairs(stream(1)), truth.per_class(config.validation_real, stream(2)),
        truth.per_class(config.test_real, stream(3)),
    )  # fmt: skip

    def trained(steps: int) -> Frozen:
        torch.manual_seed(seed)  # initial weights
        net = train_denoiser(
            *data.train, schedule, stream(4), net=undecided(config.denoiser_width), steps=steps, batch=128, track=track
        )
        return Frozen(net, schedule, null=NULL)

    labels = (truth.mislabelled(config.wrong, torch.tensor(falls)) for falls in (config.even, config.uneven))
    frozen = [exact(truth), *map(trained, config.denoiser_steps), *map(exact, labels)]
    found, shown = {}, {"real": data.test[:, : config.shown]}
    for i, (name, one) in enumerate(zip(DENOISERS, frozen, strict=True)):
        torch.manual_seed(seed)  # initial weights of omega
        found[name], shown[name] = study(one, data, 1000 * seed + 100 * (i + 1), config, track)
    bias = l2_bias(frozen[0], data.train, 1000 * seed + 5, config.bias_items)
    return {"seed": seed, "denoisers": found, "l2_bias": bias, "seconds": time.perf_counter() - started}, shown


def undecided(width: int):
    """A network that does not know its condition yet: the embeddings start at 0, and while it is under-trained it sees
    too little of them, which is what guidance is to mend."""
    from examples.denoiser import Denoiser
    from examples.plane import CLASSES

    net = Denoiser(width, embedding=8, classes=CLASSES, dim=2)
    torch.nn.init.zeros_(net.condition.weight)
    return net


def run(seeds: int, config: Config, processes: int) -> list[tuple[dict, dict]]:
    """`run_seed` of each, on one thread: tensors are small here, and a second thread only waits for the first."""
    if processes == 1:
        torch.set_num_threads(1)
        return [run_seed(seed, config, bars(f"seed {seed} ({seed + 1} of {seeds})")) for seed in range(seeds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(functools.partial(run_seed, config=config, track=silent), range(seeds)))


def main(argv: list[str]) -> int:
    """Run the study; write report.html and metrics.json; print the tables. Returns the exit status."""
    threads = "seeds side by side, each on one thread (default: as many as there are cores)"
    args = command.parsed(command.parser("mixture", __doc__, seeds=8, threads=threads), argv)
    if command.lacks("sklearn", "matplotlib"):
        return 1
    from examples.mixture_claims import claims, summarise
    from examples.mixture_report import text_table, write_report

    config = Config.quick() if args.quick else Config()
    args.out.mkdir(parents=True, exist_ok=True)
    ran = run(args.seeds, config, min(args.seeds, args.threads or os.cpu_count()))
    seeds, shown = map(list, zip(*ran, strict=True))
    metrics = {
        "config": asdict(config), "versions": command.versions(), "quick": args.quick, "seeds": seeds,
        "summary": summarise(seeds), "claims": claims(seeds, asdict(config)),
    }  # fmt: skip
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_report(args.out / "report.html", metrics, shown)
    print(text_table(metrics))
    print(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
