"""Print the tables of the study in the plane, and make its report."""

from __future__ import annotations

from typing import Any

from examples.mixture.figures import draw
from examples.mixture.study import METHODS
from examples.shared.measures import Spread
from examples.shared.report import QUICK, Table, many, plus_minus, render, signed

ABOUT = {
    "exact": "the formula",
    "150 steps": "a network, hardly trained",
    "200 steps": "the same, trained a little longer",
    "even labels": "the formula for data with wrong labels of every class",
    "uneven labels": "the formula for data with wrong labels: none 0, a third 1, two thirds 2",
}


def text_table(metrics: dict[str, Any]) -> str:
    """Return what the command prints."""
    seeds, summary = metrics["seeds"], metrics["summary"]
    lines = [f"energy distance from held-out data in the plane, {many(len(seeds))}: mean ± standard deviation", ""]
    lines.append(f"{'':14}" + "".join(f"{name:>17}" for name in summary["methods"]))
    for method in METHODS:
        cells = (values[method] for values in summary["methods"].values())
        lines.append(f"{method:14}" + "".join(f"{plus_minus(cell):>17}" for cell in cells))
    lines += ["", "claims"]
    for row in metrics["claims"]:
        lines.append(f"{row['verdict']:14} {row['denoiser']:14} {row['claim']}")
        lines.append(f"{'':30}{row['what']}: {number(row['value'])}")
    return "\n".join(lines + (["", QUICK] if metrics["quick"] else []))


def page(metrics: dict[str, Any], shown: list[dict]) -> str:
    """Return the report. `shown` holds, for each seed, what `run_seed` returns for the pictures."""
    methods = metrics["summary"]["methods"]
    return render(
        "mixture/report.html",
        metrics=metrics,
        config=metrics["config"],
        seeds=metrics["seeds"],
        pictures=draw(metrics, shown),
        claims=claim_table(metrics["claims"]),
        results=Table(
            [("", ""), *((name, ABOUT[name]) for name in methods)],
            [[method, *(plus_minus(values[method]) for values in methods.values())] for method in METHODS],
        ),
    )


def claim_table(claims: list[dict]) -> Table:
    """Return a row for each claim; a claim is written once, at the first of its rows."""
    rows, last = [], None
    for row in claims:
        claim = "" if row["claim"] == last else row["claim"]
        last = row["claim"]
        rows.append([claim, row["denoiser"], row["what"], number(row["value"]), row["verdict"]])
    return Table([(title, "") for title in ("claim", "denoiser", "figure", "mean [95 %]", "")], rows)


def number(value: Spread) -> str:
    """Format a difference with enough digits for its size."""
    return signed(value, 4 if abs(value["mean"]) < 0.02 else 3)
