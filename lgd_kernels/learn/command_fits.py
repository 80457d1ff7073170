"""Do the command's work after learning: fits to compare with, files, the picture, and the table it prints."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant, fit_interval, fit_table
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.particles import Particles, curve
from lgd_kernels.learn.trainer import NotFinite
from lgd_kernels.omega import plot
from lgd_kernels.omega.files import save as save_omega
from lgd_kernels.omega.forms import Constant, Interval
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.runtime import files_atomic
from lgd_kernels.runtime.progress import Track
from lgd_kernels.sampling.schedules import Schedule

SMOOTH = (3.0, 10.0, 30.0, 100.0)
EDGES = 21  # of the grid for the ends of an interval, even in unit time
Learned = nn.Module | OmegaTable
Omega = Learned | Callable[[Tensor, Tensor, Tensor], Tensor]  # (c [B], s [B], t [B]) -> [B]


class Fits(NamedTuple):
    """Hold what is fitted to the loss curves."""

    constant: Constant
    interval: Interval
    table: OmegaTable | None


def fit(args: argparse.Namespace, batches: Batches, classes: int | None, track: Track) -> Fits:
    """Fit the best constant, the best interval and, for --omega table, the best table: one pass over the model.

    A trainer's cache serves as that pass.
    """
    count = args.items if batches.cached is None else len(batches.cached.t)
    total = math.ceil(count / args.batch)
    curves, at, source = [], [], _parts(batches, args)
    for _ in track(range(total), "loss curves"):
        part = next(source)
        for name in ("x0", "cond", "uncond"):
            if not bool(getattr(part, name).isfinite().all()):
                raise NotFinite(f"`{name}` is NaN or infinite in a batch of items for the fits")
        curves.append(curve(part, churn=args.churn, impl=args.impl))
        at.append((part.c, part.s, part.t))
    c, s, t = (torch.cat(one).cpu() for one in zip(*at, strict=True))
    schedule, of_loss = batches.frozen.schedule, {"beta": args.beta, "lam": args.lam}
    device = batches.device
    edges = schedule.from_unit(torch.linspace(0, 1, EDGES, device="cpu"))
    table = None
    if args.omega == "table":
        s_knots, t_knots = knots(schedule, args.knots)
        table = fit_table(curves, c, s, t, s_knots, t_knots, conditions=classes, smooth=SMOOTH, **of_loss).to(device)
    constant, interval = fit_constant(curves, **of_loss), fit_interval(curves, t, edges, **of_loss)
    return Fits(constant.to(device), interval.to(device), table)


def _parts(batches: Batches, args: argparse.Namespace) -> Iterator[Particles]:
    """Yield items one batch at a time: the trainer's cache, or new ones."""
    cached = batches.cached
    if cached is None:
        yield from batches.parts(batches.data, args.items, args.seed)
        return
    for items in torch.arange(len(cached.t), device=cached.t.device).split(args.batch):
        yield cached.take(items, cached.seed, int(items[0])).to(batches.device)


def knots(schedule: Schedule, count: int) -> tuple[Tensor, Tensor]:
    """Return a table's knots, even in unit time: without the last for s, and without the first for t."""
    times = schedule.from_unit(torch.linspace(0, 1, count + 1, device="cpu"))
    times = times if times.is_floating_point() else times.float()
    return times[:-1], times[1:]


def others_of(args: argparse.Namespace, fits: Fits) -> dict[str, nn.Module]:
    """Return the omegas that the learned one is compared with: none, the one set by hand, and the fits."""
    device = fits.constant.omega.device
    by_hand = {} if args.by_hand is None else {"by_hand": Constant(args.by_hand).to(device)}
    return {"unguided": Constant(0.0).to(device), **by_hand, "constant": fits.constant, "interval": fits.interval}


def save(
    args: argparse.Namespace,
    fits: Fits,
    learned: Learned,
    frozen: Frozen,
    losses: dict[str, Tensor],
    c: Tensor,
    classes: int | None,
) -> None:
    """Write omega.safetensors, the fits and omega = 0, result.json and, if matplotlib is installed, omega.png."""
    schedule = frozen.schedule
    for name, omega in (*others_of(args, fits).items(), ("omega", learned)):
        save_omega(args.out / f"{name}.safetensors", omega, schedule, frozen.prediction)
    result: dict[str, dict] = {}
    for name, loss in losses.items():
        result[name] = {"held_out": float(loss.mean()), "draws": len(loss)}
        if name != args.omega:
            mean, half = paired(losses[args.omega], loss)
            result[name]["learned_minus_this"] = {"mean": mean, "half_width": half}
    (args.out / "samples.json").unlink(missing_ok=True)  # of an earlier omega
    files_atomic.write(args.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    if importlib.util.find_spec("matplotlib") is not None:
        conditions = c if classes is None else torch.arange(classes, device=c.device)
        plot.draw(learned, conditions, schedule).savefig(args.out / "omega.png", dpi=120)


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean of a - b over items, and half the width of its 95 % interval (1.96 standard errors)."""
    difference = a - b
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return float(difference.mean()), 1.96 * error


def summary(args: argparse.Namespace, fits: Fits, losses: dict[str, Tensor]) -> str:
    """Return the table of held-out losses, and the paths of the files."""
    learned = losses[args.omega]
    lines = [
        f"held-out loss, {len(learned)} draws, the same for all (95 % intervals over these draws):",
        "",
        f"{'':10} {'loss':>12}   {args.omega} minus this",
    ]
    for name, loss in losses.items():
        mean, half = paired(learned, loss)
        difference = "" if name == args.omega else f"{mean:+.6g} [{mean - half:+.6g}, {mean + half:+.6g}]"
        lines.append(f"{name:10} {float(loss.mean()):12.6g}   {difference}".rstrip())
    constant = fits.constant.omega.item()
    weight, low, high = (getattr(fits.interval, name).item() for name in ("omega", "low", "high"))
    lines += [
        "",
        f"best constant {constant:.4g}; best interval {weight:.4g} on ({low:.4g}, {high:.4g}], times of the schedule",
    ]
    path = args.out / "omega.safetensors"
    drawn = args.out / "omega.png"
    lines += [f"omega: {path}", *([f"picture: {drawn}"] if drawn.exists() else []), ""]
    return "\n".join(lines)
