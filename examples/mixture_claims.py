"""What the study says of the paper's claims: paired differences over the seeds, and a row for each claim."""

from __future__ import annotations

import torch

from examples.measures import spread
from examples.mixture import DENOISERS
from examples.mixture_study import METHODS
from examples.plane import undoing

WRONG = DENOISERS[1:]  # where the denoiser is not exact
HOLDS, DOES_NOT, OPEN = "holds", "does not hold", "not shown"


def summarise(seeds: list[dict]) -> dict:
    """For each denoiser: energy distance of each method, and learned - other; the L2 bias at each (s, t)."""
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
    return [seed["denoisers"][name]["test"][method]["energy"] for seed in seeds]


def difference(seeds: list[dict], name: str, one: str, other: str) -> dict:
    """Of the energy distances on test data, paired by seed: below 0, `one` is better."""
    pairs = zip(tested(seeds, name, one), tested(seeds, name, other), strict=True)
    return spread([a - b for a, b in pairs])


def verdict(value: dict, above: bool = False) -> str:
    """Whether the 95 % interval of a mean lies below 0 (or above), on the other side, or on both.

    >>> verdict({"interval95": [-2.0, -1.0]}), verdict({"interval95": [-2.0, 1.0]}), verdict({"interval95": None})
    ('holds', 'not shown', 'not shown')
    """
    if value["interval95"] is None:
        return OPEN
    low, high = (-end for end in reversed(value["interval95"])) if above else value["interval95"]
    return HOLDS if high < 0 else DOES_NOT if low > 0 else OPEN


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


def claims(seeds: list[dict], config: dict) -> list[dict]:
    """Rows {"claim", "denoiser", "what", "value" (a spread), "verdict"}."""
    rows = []

    def row(claim: str, name: str, what: str, value: dict, said: str) -> None:
        rows.append({"claim": claim, "denoiser": name, "what": what, "value": value, "verdict": said})

    def better(claim: str, name: str, one: str, other: str, above: bool = False) -> None:
        value = difference(seeds, name, one, other)
        row(claim, name, f"{one} − {other}", value, verdict(value, above))

    def of(name: str, number) -> dict:
        return spread([float(number(seed["denoisers"][name])) for seed in seeds])

    largest = of("exact", lambda d: max(max(step) for step in d["omega_path"]["learned"]))
    row("an exact denoiser needs no guidance: learned omega is 0", "exact", "largest omega of the path", largest,
        HOLDS if max(largest["values"]) == 0 else DOES_NOT)  # fmt: skip
    least = of("exact", lambda d: max(d["least"]))
    row("... and without the bound at 0 the least loss would be at 0 or below, at all times", "exact",
        "omega of the least loss, largest of four bands of t", least, at_most(least))  # fmt: skip
    harm = of("exact", lambda d: d["constants"]["energy"][1] - d["constants"]["energy"][0])
    row("guidance harms an exact denoiser", "exact", f"constant {config['constants'][1]:g} − unguided", harm,
        verdict(harm, above=True))  # fmt: skip
    bias = spread([ratio(seed["l2_bias"]) for seed in seeds])
    row("the L2 loss guides it all the same, by signal_t A / B", "exact", "found / formula, least squares", bias,
        around(bias, 1.0))  # fmt: skip
    better("... and makes its samples worse", "exact", "L2", "unguided", above=True)
    for claim, one, other in COMPARED:
        for name in WRONG:
            better(claim, name, one, other)
    for name in WRONG:
        gap = of(name, lambda d: d["chosen"]["loss constant"] - d["chosen"]["constant"])
        row("loss and whole runs agree on the best constant", name, "omega by loss − omega by runs", gap, around(gap))
    for name in WRONG:
        lost = of(name, lambda d: d["held_out_loss"]["fitted"] - d["held_out_loss"]["learned"])
        own = of(name, lambda d: d["held_out_loss"]["learned"])
        row("the fitted table reaches the network's held-out loss, within its spread", name,
            "loss fitted − learned" + (f" (spread {own['std']:.4f})" if own["std"] is not None else ""), lost,
            at_most(lost, own["std"]))  # fmt: skip
    for c, omega in enumerate(undoing(config["wrong"], torch.tensor(config["uneven"])).tolist()):
        off = of("uneven labels", lambda d, c=c, omega=omega: d["omega_path"]["learned"][0][c] - omega)
        row("omega follows the condition: at pure noise, what undoes the labels", "uneven labels",
            f"class {c}: learned − {omega:.2f}", off, around(off))  # fmt: skip
    return rows


def ratio(rows: list[dict]) -> float:
    """The factor between formula and what was found, least squares over the (s, t)."""
    return sum(r["found"] * r["expected"] for r in rows) / sum(r["expected"] ** 2 for r in rows)


def around(value: dict, expected: float = 0.0) -> str:
    """Whether the interval of a mean contains what is expected."""
    if value["interval95"] is None:
        return OPEN
    low, high = value["interval95"]
    return HOLDS if low <= expected <= high else DOES_NOT


def at_most(value: dict, bound: float | None = 0.0) -> str:
    """Whether a mean is at most so much, as far as its interval can tell."""
    if value["interval95"] is None:
        return OPEN
    low, high = value["interval95"]
    return HOLDS if high <= bound else DOES_NOT if low > bound else OPEN
