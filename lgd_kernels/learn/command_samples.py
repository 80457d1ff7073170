"""Do the command's last work: sample with every omega, print how far the samples are from held-out data, and say which
omega to use."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lgd_kernels.learn import command_lines, runs
from lgd_kernels.learn.batches import Settings
from lgd_kernels.learn.data import Data, items_of
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.runtime import files_atomic
from lgd_kernels.runtime.progress import Track

FILE = "samples.json"
ROWS = 10  # labels that are printed
DATA = 2**20  # numbers in the samples of an omega, by default
FEWEST, MOST = 64, 1024  # samples by default
CALLED = {
    "unguided": "no guidance",
    "by_hand": "your constant",
    "constant": "the constant",
    "interval": "the interval",
}


class Found(NamedTuple):
    """Hold the result of a comparison."""

    compared: runs.Compared
    learned: int  # which of the omegas
    best: int  # the nearest of the others
    better: str | None  # the name of the better of these two; None if the samples cannot tell


def delta(steps: int) -> float:
    """Return the shortest step to learn, in unit time: that of a run of so many steps, and the paper's 0.1 at most.

    >>> delta(50), delta(4), delta(0)
    (0.02, 0.1, 0.1)
    """
    return min(Settings.delta, 1 / steps) if steps else Settings.delta


def compare(
    args: argparse.Namespace, frozen: Frozen, omegas: Mapping[str, runs.Omega], held: Data, device: Any, track: Track
) -> Found | None:
    """Sample with every omega, print the table and the verdict, and write samples.json. Return None without samples."""
    if not args.sample_steps:
        print("no samples were compared (--sample-steps 0): less loss does not always make better samples\n")
        return None
    x0, _ = items_of(held, torch.zeros(1, dtype=torch.int64, device="cpu"))
    try:
        compared = runs.compare(
            frozen,
            omegas,
            held,
            steps=args.sample_steps,
            samples=args.samples or max(FEWEST, min(MOST, DATA // x0.numel())),
            seed=args.seed,
            start=command_lines.start(args, frozen),
            chunk=args.batch * args.m,
            device=device,
            track=track,
        )
    except runs.TooFew as error:
        print(f"no samples were compared: {error}; pass more --held-out data\n")
        return None
    found = judged(compared, args.omega)
    text = (json.dumps(figures(found, args.sample_steps), indent=1) + "\n").encode()
    files_atomic.write(args.out / FILE, text)
    print(summary(found, args.sample_steps))
    print(words(found, args))
    return found


def judged(compared: runs.Compared, learned: str) -> Found:
    """Return which of the learned omega and the nearest of the others is better, if the interval of the difference
    lies on one side of 0. Samples with NaN or infinity lose."""
    own, every = compared.names.index(learned), compared.over_all
    far = every.value.nan_to_num(nan=math.inf)
    best = min((i for i in range(len(far)) if i != own), key=lambda i: float(far[i]))
    if not bool(far[[own, best]].isfinite().all()):
        lower = None if far[own] == far[best] else compared.names[own if far[own] < far[best] else best]
        return Found(compared, own, best, lower)
    mean, half = every.difference(own, best)
    return Found(compared, own, best, None if abs(mean) <= half else compared.names[own if mean < 0 else best])


def file(found: Found | None) -> str:
    """Return the name of the file that the verdict recommends: the learned omega, unless another is better.

    >>> file(None)
    'omega'
    """
    if found is None or found.better in (None, found.compared.names[found.learned]):
        return "omega"
    return str(found.better)


def figures(found: Found, steps: int) -> dict[str, Any]:
    """Return what samples.json holds. NaN is null there."""
    compared, own = found.compared, found.learned

    def of(each: runs.Distances) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(compared.names):
            mean, half = each.interval(i)
            rows[name] = {"distance": _known(mean), "half_width": _known(half)}
            if i != own:
                mean, half = each.difference(own, i)
                rows[name]["learned_minus_this"] = {"mean": _known(mean), "half_width": _known(half)}
        return rows

    conditions = zip(compared.conditions, compared.each, strict=True)
    return {
        "steps": steps,
        "samples_of_each_condition": compared.samples,
        "held_out": dict(zip(map(str, compared.conditions), compared.held, strict=True)),
        "learned": compared.names[own],
        "nearest_other": compared.names[found.best],
        "better": found.better,
        "file": f"{file(found)}.safetensors",
        "over_all": of(compared.over_all),
        "conditions": {str(condition): of(each) for condition, each in conditions},
    }


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def summary(found: Found, steps: int) -> str:
    """Return the table of distances over all, and of the conditions."""
    compared, own, best = found.compared, found.learned, found.best
    names, learned, other = compared.names, compared.names[own], compared.names[best]
    labels = compared.labels > 0
    if labels:
        some = f"{len(compared.each)} of {compared.labels}" if len(compared.each) < compared.labels else compared.labels
        what = f"mean of {some} classes, {compared.samples} samples of each"
    else:
        what = f"{compared.samples} pairs (x, c) and {compared.held[0]} held-out ones with other c"
    lines = [
        f"energy distance of samples in {steps} steps to held-out data ({what},",
        "the same noise for all; 95 % intervals, jackknife):",
        "",
        f"{'':10} {'distance':>12}   {'':20} {learned} minus this",
    ]
    for i, name in enumerate(names):
        mean, half = compared.over_all.interval(i)
        row = f"{name:10} {_number(mean, half):>12}   {_interval(mean, half):20}"
        lines.append(row if i == own else f"{row} {_with_interval(*compared.over_all.difference(own, i), sign='+')}")
    lines = [line.rstrip() for line in lines]
    rows = [(str(one), each) for one, each in zip(compared.conditions, compared.each, strict=True)]
    lines += ["", f"{'class' if labels else '':8}{'held-out':>10}"]
    lines[-1] += "".join(f"{name:>12}" for name in names) + f"   {learned} minus {other}"
    gains = [each.difference(own, best)[0] for _, each in rows]
    worst = sorted(range(len(rows)), key=lambda i: (-gains[i], i))[:ROWS]
    for i in sorted(worst) if len(rows) <= ROWS else worst:
        each = rows[i][1]
        distances = "".join(f"{_number(*each.interval(j)):>12}" for j in range(len(names)))
        lines.append(
            f"{rows[i][0]:8}{compared.held[i]:10}{distances}   {_with_interval(*each.difference(own, best), sign='+')}"
        )
    if len(rows) > ROWS:
        lines.append(f"({ROWS} of {len(rows)} classes: those where {learned} gains least)")
    if compared.left_out:
        shown = ", ".join(map(str, compared.left_out[:ROWS])) + (", ..." if len(compared.left_out) > ROWS else "")
        lines.append(f"(left out, with fewer than {runs.FEWEST} held-out items: class {shown})")
    return "\n".join([*lines, ""])


def words(found: Found, args: argparse.Namespace) -> str:
    """Return the verdict in words: whether the learned omega is better, and which file to use."""
    every, names = found.compared.over_all, found.compared.names
    learned, other = names[found.learned], names[found.best]
    said = [
        f"{called}: {_with_interval(*every.interval(i))}"
        for called, i in ((f"learned omega ({learned})", found.learned), (f"best other, {CALLED[other]}", found.best))
    ]
    mean, half = every.difference(found.learned, found.best)
    amount = f" by {_with_interval(abs(mean), half)}" if math.isfinite(mean) else ""
    path = args.out / f"{file(found)}.safetensors"
    if found.better == learned:
        verdict = f"the learned omega is better{amount}."
    elif found.better is not None:
        verdict = (
            f"{CALLED[other]} is better{amount}.\nThe learned omega does not win here: the lines below load {path}."
        )
    elif amount:
        verdict = (
            f"no difference that these samples can tell ({_with_interval(mean, half, sign='+')}).\nMore --samples and "
            f"more held-out data tell smaller ones. The lines below load the learned omega; the other one\nis "
            f"{args.out / other}.safetensors."
        )
    else:
        verdict = "the samples of every omega hold NaN or infinity."
    return f"{said[0]};\n{said[1]}:\n{verdict}\n"


def _number(mean: float, half: float, sign: str = "") -> str:
    """Return a number with two digits of half the width of its interval.

    >>> _number(0.123456, 0.0123), _number(1234.5, 67.0), _number(0.5, 0.0)
    ('0.123', '1234', '0.5')
    """
    if not math.isfinite(mean):
        return "NaN"
    if not math.isfinite(half) or half <= 1e-12 * max(abs(mean), 1e-300):
        return f"{mean:{sign}.4g}"
    return f"{mean:{sign}.{min(12, max(0, 1 - math.floor(math.log10(half))))}f}"


def _interval(mean: float, half: float, sign: str = "") -> str:
    low, high = (_number(end, half, sign) for end in (mean - half, mean + half))
    return f"[{low}, {high}]" if math.isfinite(mean) else ""


def _with_interval(mean: float, half: float, sign: str = "") -> str:
    """Return a number and its interval.

    >>> _with_interval(0.123456, 0.0123, "+")
    '+0.123 [+0.111, +0.136]'
    """
    return f"{_number(mean, half, sign)} {_interval(mean, half, sign)}".rstrip()
