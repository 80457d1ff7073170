"""Make a model and data for `python -m lgd_kernels learn`, and measure the omegas that it learned.

    python -m examples.photographs train       # some minutes: runs/photographs/model.pt and three .npz files
    python -m lgd_kernels learn --model "examples.photographs.model:load(runs/photographs)" ...
    python -m examples.photographs measure runs/photographs/network/omega.safetensors ...

The photographs are scikit-learn's (427 x 640 x 3). A crop is 32 x 32 x 3; its class is photograph and half, left or
right. Crops come from bands of rows that share no pixel: four to learn from, one to validate with, two to test with.
The denoiser is trained on labels that are wrong more often in each class than in the one before. docs/learning.md has
the commands and the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import lgd_kernels as lgd
from examples.photographs.model import CLASSES, NULL, SIDE, crops, load, train
from examples.shared.measures import energy_per_class
from lgd_kernels.learn import Frozen
from lgd_kernels.omega.files import load as load_omega
from lgd_kernels.runtime.progress import Track, bars, silent

CONSTANTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
Omega = Callable[[Tensor, Tensor, Tensor], Tensor]  # (c [B], s [B], t [B]) -> [B]


@torch.no_grad()
def sample(frozen: Frozen, omega: Omega, per_class: int, steps: int, seed: int, track: Track = silent) -> Tensor:
    """Return samples [classes, n, 3, 32, 32] by steps with churn 0 from noise that is the same for every omega."""
    found = []
    u = torch.linspace(1, 0, steps + 1)
    for label in track(range(CLASSES), "samples"):
        c = torch.full((per_class,), label)
        x = lgd.philox_normal((per_class, 3, SIDE, SIDE), seed=seed, first_sample=label * per_class)
        for i in range(steps):
            t, s = (frozen.schedule.from_unit(one.expand(per_class).contiguous()) for one in (u[i], u[i + 1]))
            cond, uncond = frozen.predict(x, t, c)
            levels = frozen.schedule.levels(t, s)
            x = lgd.guided_step(x, cond, uncond, omega(c, s, t).detach(), levels, prediction=frozen.prediction)
        found.append(x)
    return torch.stack(found)


def measure(args: argparse.Namespace) -> None:
    """Compare samples with each constant and with each omega in a file with the validation and test crops."""
    frozen = Frozen(load(str(args.folder)), lgd.RectifiedFlow(), "flow", null=NULL)
    data, track = crops(), bars("photographs")
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str, omega: Omega) -> None:
        started = time.perf_counter()
        x = sample(frozen, omega, args.samples, args.sampling_steps, args.seed, track).flatten(2)
        found = {
            split: energy_per_class(x[None], data[split].by_class())[0].tolist() for split in ("validation", "test")
        }
        rows[name] = found | {"seconds": time.perf_counter() - started}
        mean, test = (sum(found[split]) / CLASSES for split in ("validation", "test"))
        print(
            f"{name:40} {mean:10.3f} {test:10.3f}   " + " ".join(f"{value:.2f}" for value in found["test"]), flush=True
        )

    print(f"{'energy distance per class, mean':40} {'validation':>10} {'test':>10}   test, each class")
    for value in args.constants:
        row(f"constant {value:g}", lambda c, s, t, value=value: torch.full((len(s),), value))
    for path in args.omegas:
        row(str(path), load_omega(path, frozen.schedule))
    constants = [name for name in rows if name.startswith("constant ")]
    if constants:
        best = min(constants, key=lambda name: sum(rows[name]["validation"]))
        print(f"best on the validation split: {best}")
    (args.folder / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Run the command. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.photographs", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure"):
        one = commands.add_parser(name)
        one.add_argument("--folder", type=Path, default=Path("runs/photographs"))
        one.add_argument("--threads", type=int, default=1)
        one.add_argument("--seed", type=int, default=0)
        if name == "train":
            one.add_argument("--steps", type=int, default=500)
        else:
            one.add_argument("omegas", type=Path, nargs="*", help="files with an omega")
            one.add_argument("--samples", type=int, default=48, help="samples of each class")
            one.add_argument("--sampling-steps", type=int, default=20)
            one.add_argument("--constants", type=float, nargs="*", default=CONSTANTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.command == "measure":
        measure(args)
        return 0
    data = crops()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, (x, c) in data.items():
        numpy.savez(args.folder / f"{split}.npz", x0=x.numpy(), c=c.numpy())
    net = train(data["train"], args.steps, args.seed, track=bars("photographs"))
    torch.save(net.state_dict(), args.folder / "model.pt")
    print(f"{args.folder}: model.pt, " + ", ".join(f"{split}.npz ({len(data[split].x)})" for split in data))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
