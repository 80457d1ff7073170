"""The table and the self-contained HTML report of the study in the plane."""

from __future__ import annotations

from html import escape
from pathlib import Path

from examples.mixture_study import METHODS
from examples.report import STYLE, figure, many, plus_minus, signed

VERDICTS = {"holds": "yes", "does not hold": "no", "not shown": "open"}
OWN_STYLE = """
td.yes { color: #1d7a46; font-weight: 600 } td.no { color: #b3263e; font-weight: 600 } td.open { color: #8a8f98 }
table.claims td { white-space: normal; text-align: left; vertical-align: top }
"""
ABOUT = {
    "exact": "the formula",
    "150 steps": "a network, hardly trained",
    "200 steps": "the same, trained a little longer",
    "even labels": "the formula for data with wrong labels of every class",
    "uneven labels": "the formula for data with wrong labels: none 0, a third 1, two thirds 2",
}
CAPTIONS = {
    "curves": "Above: energy distance of whole runs from test data as omega is one constant: thin lines the seeds, "
    "thick their mean, the ring its least. Dots with bars: mean and 95 % interval of the other methods (of the seeds, "
    "not paired). Below: the self-consistency loss of the same constants on held-out data, less its value at 0.",
    "paired": "Learned − other in energy distance on test data, paired by seed: mean and 95 % interval. Left of 0 "
    "learned is better. Each panel has a scale of its own, linear up to 0.02 and logarithmic beyond.",
    "samples": "Seed 0, one colour for each class, all methods from the same noise.",
    "path": "omega along the sampling path, mean over the seeds; the band is the standard deviation. Dashed: the "
    "fitted table. Grey: the table fitted to the L2 loss, mean over the classes. Black: the constant with the best "
    "runs. Diamonds: what undoes wrong labels at pure noise.",
    "heat": "Learned omega for a step from t to s, mean over the seeds and, but for the uneven labels, over the "
    "classes. The blue line is the sampling path.",
    "bias": "The omega with the least L2 loss of an exact denoiser, found and by the formula, each at one (s, t): mean "
    "and 95 % interval over the seeds.",
}


def text_table(metrics: dict) -> str:
    """What the study prints."""
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
    if metrics["quick"]:
        lines += ["", "--quick: the machinery was run, the figures mean nothing"]
    return "\n".join(lines)


def number(value: dict) -> str:
    """With enough digits for what it is."""
    return signed(value, 4 if abs(value["mean"]) < 0.02 else 3)


def write_report(path: Path, metrics: dict, shown: list[dict]) -> None:
    """One HTML file with its pictures inside."""
    from examples.mixture_figures import draw

    path.write_text(page(metrics, draw(metrics, shown)), encoding="utf-8")


def page(metrics: dict, pictures: dict[str, str]) -> str:
    config, seeds = metrics["config"], metrics["seeds"]
    quick = '<p class="warn">--quick: the machinery was run, the figures mean nothing.</p>' if metrics["quick"] else ""
    versions = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in metrics["versions"].items())
    shown = {name: figure(picture, CAPTIONS[name]) for name, picture in pictures.items()}
    grid = len(seeds[0]["denoisers"]["exact"]["validation"]["interval"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Learned guidance in the plane</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}{OWN_STYLE}</style></head><body>
<h1>Learned guidance in the plane</h1>
<p class="lead">A mixture of Gaussians in three classes is known in closed form, and so is its denoiser: one can see
what guidance <i>g = c + omega (c − u)</i> mends and what it spoils. {many(len(seeds))}.</p>{quick}
<h2>Claims</h2>{claim_table(metrics["claims"])}
<p class="note">Mean over {many(len(seeds))}, in brackets its 95 % t-interval. Differences are of the energy distance on
test data and paired by seed. "holds" and "does not hold": the interval lies on one side of 0; for an equality, it
contains the expected value or it does not. "not shown": neither. "constant" and "interval" are those with the best
whole runs on validation data, "loss constant" and "loss interval" those with the least self-consistency loss.</p>
<h2>Energy distance from test data</h2>{results(metrics)}
<p class="note">2E|x − y| − E|x − x'| − E|y − y'|, unbiased, mean over the classes; mean ± standard deviation over the
seeds.
Chosen on validation data with this figure: constant among {len(config["constants"])}, interval among {grid}, per class
from both, for each class alone. Not chosen by it: loss constant, loss interval, learned, baked (21 x 21 knots), fitted
(a table of 9 x 9 knots, without a network), L2 (the same with beta 2, lam 0).</p>
{shown["curves"]}{shown["paired"]}
<h2>Samples</h2>{shown["samples"]}
<h2>What was learned</h2>{shown["path"]}{shown["heat"]}
<h2>The bias of the L2 loss</h2>{shown["bias"]}
<h2>Settings</h2>
<p class="note">{config["sampling_steps"]} sampling steps, churn 0; learned with churn 1, 4 particles, beta 1.75, lam 1,
{config["omega_steps"]} steps of batch {config["batch"]} from {config["fit_items"]} cached items,
delta {1 / config["sampling_steps"]:g}. {config["validation_samples"]} samples per class
and setting for validation, {config["test_samples"]} for test. {100 * config["wrong"]:.0f} % of the labels are drawn
anew. {versions}. {sum(seed["seconds"] for seed in seeds):.0f} s in total, whatever else was running.</p>
</body></html>
"""


def claim_table(rows: list[dict]) -> str:
    body, last = "", None
    for row in rows:
        claim = "" if row["claim"] == last else escape(row["claim"])
        last = row["claim"]
        body += (
            f"<tr><td>{claim}</td><td>{row['denoiser']}</td><td>{escape(row['what'])}</td><td>{number(row['value'])}</td>"
            f'<td class="{VERDICTS[row["verdict"]]}">{row["verdict"]}</td></tr>'
        )
    head = "".join(f"<th>{title}</th>" for title in ("claim", "denoiser", "figure", "mean [95 %]", ""))
    return f'<div class="wide"><table class="claims"><tr>{head}</tr>{body}</table></div>'


def results(metrics: dict) -> str:
    methods = metrics["summary"]["methods"]
    head = "".join(f"<th>{name}<br><small>{ABOUT[name]}</small></th>" for name in methods)
    rows = "".join(
        f'<tr class="{method}"><td>{method}</td>'
        + "".join(f"<td>{plus_minus(values[method])}</td>" for values in methods.values())
        + "</tr>"
        for method in METHODS
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'
