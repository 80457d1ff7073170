"""Learn guidance where the truth is known, a mixture of Gaussians in the plane: `python -m examples.mixture`.

For each seed and each of five denoisers (exact; trained for 150 and for 200 steps; exact for data with wrong labels,
evenly and unevenly spread over the classes), the study measures how far guided runs are from held-out data when the
weight is constant, limited to an interval, learned, baked, fitted, or fitted to the L2 loss. docs/mixture.md has the
figures of eight seeds.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from examples.mixture.seed import run_seed
from examples.mixture.study import Config
from examples.shared import command
from lgd_kernels.runtime.progress import bars, silent


def run(seeds: int, config: Config, processes: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Call `run_seed` for each seed, on one thread: tensors are small, so a second thread would only wait."""
    if processes == 1:
        torch.set_num_threads(1)
        return [run_seed(seed, config, bars(f"seed {seed} ({seed + 1} of {seeds})")) for seed in range(seeds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(functools.partial(run_seed, config=config, track=silent), range(seeds)))


def main(argv: list[str]) -> int:
    """Run the study, write report.html and metrics.json, print the tables. Return the exit status."""
    threads = "seeds in parallel, each on one thread (default: one for each core)"
    args = command.parsed(command.parser("mixture", __doc__, seeds=8, threads=threads), argv)
    if command.lacks_packages():
        return 1
    from examples.mixture.claims import claims, summarise
    from examples.mixture.report import page, text_table

    config = Config.quick() if args.quick else Config()
    args.out.mkdir(parents=True, exist_ok=True)
    ran = run(args.seeds, config, min(args.seeds, args.threads or os.cpu_count() or 1))
    seeds, shown = map(list, zip(*ran, strict=True))
    metrics = {
        "config": asdict(config),
        "versions": command.versions(),
        "quick": args.quick,
        "seeds": seeds,
        "summary": summarise(seeds),
        "claims": claims(seeds, config),
    }
    command.write(args.out, metrics, page(metrics, shown))
    print(text_table(metrics))
    print(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
