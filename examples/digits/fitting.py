"""Compare a table fitted to the loss curves with a trained network: `python -m examples.digits.fitting`.

For each seed: split the digits, spoil the labels and train the denoiser on them, as `python -m examples.digits` does.
Then learn omega on the clean labels: a table by `fit_table`, two networks that differ in their start and their draws,
and the best constant and interval. All are measured by the self-consistency loss of the validation split, on the same
draws. The two networks show how much a network varies. The command prints a table and, with --out, writes the figures
as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from examples.digits.data import CLASSES, NULL, PIXELS, load_digits
from examples.shared import guidance, omegas
from examples.shared.denoiser import Denoiser, train_denoiser
from examples.shared.measures import paired
from lgd_kernels.learn import Frozen, Settings, self_consistency_loss
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant, fit_interval
from lgd_kernels.runtime.progress import Track, bars
from lgd_kernels.sampling.schedules import RectifiedFlow

EDGES = torch.linspace(0, 1, 21)


def one_seed(seed: int, args: argparse.Namespace, track: Track) -> dict[str, dict[str, float]]:
    """Return {"loss": {omega: loss}, "seconds": {omega: seconds}} of one seed."""

    def stream(stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + stage)

    torch.manual_seed(seed)
    data, schedule = load_digits("rising", "any", stream(0)), RectifiedFlow()
    images, labels = data.train.x, data.captions
    net = Denoiser(CLASSES, PIXELS)
    train_denoiser(net, images, labels, schedule, stream(1), steps=args.denoiser_steps, track=track)
    frozen, clean = Frozen(net, schedule, null=NULL), (data.train.x, data.train.c)
    own = Settings(ema=0.99, seed=1000 * seed + 3)
    found: dict[str, Any] = {}
    seconds = {}
    for name in ("network", "again"):
        own = Settings(ema=0.99, seed=own.seed + 1)
        torch.manual_seed(own.seed)
        started = time.perf_counter()
        (found[name],) = guidance.learn_omega(
            frozen, clean, own, classes=CLASSES, steps=args.steps, every=args.steps, track=track
        )
        seconds[name] = time.perf_counter() - started
    started = time.perf_counter()
    fit = omegas.fitted(frozen, clean, own, args.items, count=8, classes=CLASSES)
    found["table"] = fit.table
    seconds["table"] = time.perf_counter() - started

    batches = Batches(frozen, clean, own, torch.device("cpu"))
    found["constant"] = fit_constant(fit.curves)
    found["interval"] = fit_interval(fit.curves, fit.t, EDGES)
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for part in batches.parts((data.validation.x, data.validation.c), args.draws, 1000 * seed + 9):
        with torch.no_grad():
            for name, omega in found.items():
                losses[name].append(self_consistency_loss(part, omega(part.c, part.s, part.t)).double())
    return {"loss": {name: float(torch.cat(each).mean()) for name, each in losses.items()}, "seconds": seconds}


def summary(seeds: list[dict]) -> dict[str, Any]:
    """Return paired differences with 95 % intervals, the spread of a network, and how long each took."""
    loss = {name: [seed["loss"][name] for seed in seeds] for name in seeds[0]["loss"]}
    network = [(a + b) / 2 for a, b in zip(loss["network"], loss["again"], strict=True)]
    found = {
        f"table - {name}": paired(loss["table"], other)
        for name, other in (("network", network), ("constant", loss["constant"]), ("interval", loss["interval"]))
    }
    gaps = [(a - b) ** 2 / 2 for a, b in zip(loss["network"], loss["again"], strict=True)]
    ratio = [(seed["seconds"]["network"] + seed["seconds"]["again"]) / 2 / seed["seconds"]["table"] for seed in seeds]
    return {
        "paired": found,
        "spread": math.sqrt(sum(gaps) / len(gaps)),
        "times_as_long": {"least": min(ratio), "median": median(ratio)},
    }


def main(argv: list[str]) -> int:
    """Run the study. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.fitting", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--denoiser-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=900, help="updates of a network")
    parser.add_argument("--items", type=int, default=20480, help="items that the fits are made from")
    parser.add_argument("--draws", type=int, default=8192, help="draws of the validation split")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: a difference needs its interval")
    torch.set_num_threads(args.threads)
    seeds = []
    for seed in range(args.seeds):
        seeds.append(one_seed(seed, args, bars(f"seed {seed}")))
        line = "  ".join(f"{name} {loss:.5f}" for name, loss in seeds[-1]["loss"].items())
        print(f"seed {seed}  {line}", flush=True)
    total = summary(seeds)
    if args.out is not None:
        args.out.write_text(json.dumps({"seeds": seeds, "summary": total}, indent=1) + "\n")
    for name, found in total["paired"].items():
        low, high = found["interval95"]
        print(f"{name}: {found['mean']:+.5f} [{low:+.5f}, {high:+.5f}]")
    print(f"spread of a network (standard deviation over starts and draws): {total['spread']:.5f}")
    print(
        "a network takes {median:.1f} times as long as the table (least {least:.1f})".format(**total["times_as_long"])
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
