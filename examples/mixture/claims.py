"""Test the paper's claims on the figures: paired differences over the seeds, and a row for each claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from examples.mixture.plane import undoing
from examples.mixture.seed import DENOISERS
from examples.mixture.study import METHODS, Config
from examples.shared.measures import Spread, paired, spread

WRONG = DENOISERS[1:]  # where the denoiser is not exact
HOLDS, DOES_NOT, OPEN = "holds", "does not hold", "not shown"


def summarise(seeds: list[dict]) -> dict[str, Any]:
    """Return, for each denoiser, the energy distance of each method and learned - other; and the L2 bias by (s, t)."""
    return {
        "methods": {name: {m: spread(tested(seeds, name, m)) for m in METHODS} for name in DENOISERS},
        "paired": {
            name: {f"learned - {m}": difference(seeds, name, "learned", m) for m in METHODS if m != "learned"}
            for name in DENOISERS
        },
        "l2_bias": [
            {**row, "found": spread([seed["l2_bias"][i]["found"] for seed in seeds])}
            for i, row in enumerate(seeds[0]["l2_bias"])
        ],
    }


def tested(seeds: list[dict], name: str, method: str) -> list[float]:
    """Return the energy distance of a method on test data, for each seed."""
    return [seed["denoisers"][name]["test"][method]["energy"] for seed in seeds]


def difference(seeds: list[dict], name: str, one: str, other: str) -> Spread:
    """Return the difference of two methods' energy distances, paired by seed: below 0, `one` is better."""
    return paired(tested(seeds, name, one), tested(seeds, name, other))


def verdict(value: Spread, above: bool = False) -> str:
    """Return whether a mean is below 0 (or above): HOLDS if its 95 % interval is, DOES_NOT if it is on the other side.

    >>> verdict({"interval95": [-2.0, -1.0]}), verdict({"interval95": [-2.0, 1.0]}), verdict({"interval95": None})
    ('holds', 'not shown', 'not shown')
    """
    if value["interval95"] is None:
        return OPEN
    low, high = (-end for end in reversed(value["interval95"])) if above else value["interval95"]
    return HOLDS if high < 0 else DOES_NOT if low > 0 else OPEN


def around(value: Spread, expected: float = 0.0) -> str:
    """Return whether the interval of a mean contains the expected value."""
    if value["interval95"] is None:
        return OPEN
    low, high = value["interval95"]
    return HOLDS if low <= expected <= high else DOES_NOT


def at_most(value: Spread, bound: float | None = 0.0) -> str:
    """Return whether a mean is at most a bound, as far as its interval shows."""
    if value["interval95"] is None or bound is None:
        return OPEN
    low, high = value["interval95"]
    return HOLDS if high <= bound else DOES_NOT if low > bound else OPEN


def ratio(rows: list[dict[str, float]]) -> float:
    """Return the factor from the formula to the L2 bias that was found, by least squares over the (s, t)."""
    return sum(r["found"] * r["expected"] for r in rows) / sum(r["expected"] ** 2 for r in rows)


COMPARED = (  # for each wrong denoiser: the claim is that the first is better
    ("a wrong denoiser gains by guidance: some constant is better than none", "constant", "unguided"),
    ("learned omega is better than none", "learned", "unguided"),
    ("a limited interval is better than a constant", "interval", "constant"),
    ("learned omega is better than the best constant", "learned", "constant"),
    ("learned omega is better than the best limited interval", "learned", "interval"),
    ("learned omega is better than settings searched for each class alone", "learned", "per class"),
    ("learned omega is better than the constant with the least loss", "learned", "loss constant"),
    ("lam = 1 is better than the L2 loss, both as fitted tables", "fitted", "L2"),
)


def claims(seeds: list[dict], config: Config) -> list[dict[str, Any]]:
    """Return rows {"claim", "denoiser", "what", "value" (a spread), "verdict"}."""
    rows = []

    def row(claim: str, name: str, what: str, value: Spread, verdict: str) -> None:
        rows.append({"claim": claim, "denoiser": name, "what": what, "value": value, "verdict": verdict})

    def better(claim: str, name: str, one: str, other: str, above: bool = False) -> None:
        value = difference(seeds, name, one, other)
        row(claim, name, f"{one} − {other}", value, verdict(value, above))

    def of(name: str, number: Callable[[dict], float]) -> Spread:
        return spread([float(number(seed["denoisers"][name])) for seed in seeds])

    claim, what = "an exact denoiser needs no guidance: learned omega is 0", "largest omega of the path"
    value = of("exact", lambda d: max(max(step) for step in d["omega_path"]["learned"]))
    row(claim, "exact", what, value, HOLDS if max(value["values"]) == 0 else DOES_NOT)
    claim = "... and without the bound at 0 the least loss would be at 0 or below, at all times"
    value = of("exact", lambda d: max(d["least"]))
    row(claim, "exact", "omega of the least loss, largest of four bands of t", value, at_most(value))
    claim, what = "guidance harms an exact denoiser", f"constant {config.constants[1]:g} − unguided"
    value = of("exact", lambda d: d["constants"]["energy"][1] - d["constants"]["energy"][0])
    row(claim, "exact", what, value, verdict(value, above=True))
    claim, what = "the L2 loss guides it all the same, by signal_t A / B", "found / formula, least squares"
    value = spread([ratio(seed["l2_bias"]) for seed in seeds])
    row(claim, "exact", what, value, around(value, 1.0))
    better("... and makes its samples worse", "exact", "L2", "unguided", above=True)

    for claim, one, other in COMPARED:
        for name in WRONG:
            better(claim, name, one, other)
    claim, what = "loss and whole runs agree on the best constant", "omega by loss − omega by runs"
    for name in WRONG:
        value = of(name, lambda d: d["chosen"]["loss constant"] - d["chosen"]["constant"])
        row(claim, name, what, value, around(value))
    claim = "the fitted table reaches the network's held-out loss, within its spread"
    for name in WRONG:
        value = of(name, lambda d: d["held_out_loss"]["fitted"] - d["held_out_loss"]["learned"])
        std = of(name, lambda d: d["held_out_loss"]["learned"])["std"]
        what = "loss fitted − learned" + (f" (spread {std:.4f})" if std is not None else "")
        row(claim, name, what, value, at_most(value, std))
    claim, name = "omega follows the condition: at pure noise, what undoes the labels", "uneven labels"
    for c, omega in enumerate(undoing(config.wrong, torch.tensor(config.uneven)).tolist()):
        value = of(name, lambda d, c=c, omega=omega: d["omega_path"]["learned"][0][c] - omega)
        row(claim, name, f"class {c}: learned − {omega:.2f}", value, around(value))
    return rows
