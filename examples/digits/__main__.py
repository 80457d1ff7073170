"""Learn guidance weights on real data with wrong labels, and compare them: `python -m examples.digits`.

For each seed: split scikit-learn's digits, spoil the training labels, train a small denoiser on them, learn
omega(c, s, t) on the clean labels, choose every setting of every method on the validation split, and measure all
methods on the test split. docs/digits.md has the choices and the figures of eight seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch

from examples.shared import command
from lgd_kernels.runtime.progress import bars


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = command.parser("digits", __doc__, seeds=3)
    noise = "labels to replace: 0 to 75 %% over the classes, or 40 %% in each"
    parser.add_argument("--noise", choices=("rising", "uniform"), default="rising", help=noise)
    wrong = "what replaces a label: any of the ten, or a label of the other chosen images"
    parser.add_argument("--wrong", choices=("any", "swapped"), default="any", help=wrong)
    parser.add_argument("--ablate", action="store_true", help="also vary beta, lam, m and delta, one at a time")
    return command.parsed(parser, argv)


def main(argv: list[str]) -> int:
    """Run the study, write report.html and metrics.json, print the table. Return the exit status."""
    args = parse(argv)
    if command.lacks_packages():
        return 1
    from examples.digits import report, study

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = study.Config(args.noise, args.wrong, ablations=study.ABLATIONS if args.ablate else ())
    config = config.quick() if args.quick else config
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = [
        study.run_seed(seed, config, bars(f"seed {seed} ({seed + 1} of {args.seeds})")) for seed in range(args.seeds)
    ]
    shown = [seed.pop("show") for seed in seeds]
    metrics = {
        "config": asdict(config),
        "versions": command.versions(),
        "quick": args.quick,
        "seeds": seeds,
        "summary": study.summarise(seeds),
    }
    command.write(args.out, metrics, report.page(metrics, shown))
    print(report.text_table(metrics))
    print(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
