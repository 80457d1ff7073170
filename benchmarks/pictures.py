"""A run in four pictures: roofline, time against size, speed-up with its spread, memory. Every row is in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks.environment import in_words
from benchmarks.report import bytes_, compact, seconds, times
from benchmarks.timing import spread

SPREAD = "#12457f"
STYLES = (  # by the beginning of a variant's name: colour and marker
    ("FusedScheduler", "#59a5e8", "P"),
    ("LearnedGuidance", "#59a5e8", "X"),
    ("eager", "#9a9a9a", "o"),
    ("compiled", "#d1495b", "D"),
    ("diffusers", "#e09f3e", "s"),
    ("geomloss", "#2a9d8f", "v"),
    ("KeOps", "#7b4b94", "^"),
)
OURS, CEILING, PRODUCT = ("#12457f", "o"), "#5fb3a8", "#b08968"


def every(run: dict, folder: Path) -> list[Path]:
    """Draws all; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    run = run | {"rows": [row for row in run["rows"] if any(one["samples"] for one in row["variants"])]}
    drawn = {"roofline": roofline, "sizes": sizes, "speedup": speedup, "memory": memory}
    return [save(draw(run), run, folder / f"{name}.png") for name, draw in drawn.items()]


def save(figure, run: dict, path: Path) -> Path:
    figure.suptitle("\n".join(in_words(run["environment"])), fontsize=7, color="#777777")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def roofline(run: dict):
    """Time against what bounds it: bytes, with a copy of as many; flops, with matrix products of as many."""
    by_flops = [row for row in run["rows"] if row["flops"]]
    panels = [([row for row in run["rows"] if not row["flops"] and row["op"] != "energy_mmd"], "bytes", "copy")]
    panels += [(by_flops, "flops", "product")] if by_flops else []
    figure, axes = plt.subplots(1, len(panels), figsize=(6.6 * len(panels), 5.6), squeeze=False, layout="constrained")
    names = {"copy": "a copy of as many bytes, this run", "product": "a matrix product of as many flops, this run"}
    for axis, (rows, size, ceiling) in zip(axes[0], panels, strict=True):
        at = {}
        for row in rows:
            at.setdefault(row[size], []).append(spread(row[ceiling]["direct"])[0])
            for one, middle in timed(row):
                color, marker = style(one)
                axis.scatter(
                    row[size], middle, s=34, color=color, marker=marker, label=label(one), alpha=0.85, zorder=3
                )
        line = sorted((place, min(found)) for place, found in at.items())
        color = CEILING if ceiling == "copy" else PRODUCT
        axis.plot(*zip(*line, strict=True), color=color, linewidth=2, marker="_", markersize=14, label=names[ceiling])
        units = {"bytes": lambda value, _: bytes_(int(value)), "flops": lambda value, _: f"{value / 1e9:g} GFLOP"}
        logarithmic(axis, units[size], lambda value, _: seconds(value))
        axis.set(xlabel=f"{size} that the op needs at least", ylabel="time of a call")
        legend(axis)
    return figure


def sizes(run: dict):
    """Time against size, a panel for each op and case of which there are several sizes."""
    groups = {}
    for row in run["rows"]:
        groups.setdefault((row["op"], row["case"], row["kind"], row["dtype"], len(row["shape"])), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len({row["shape"][0] for row in rows}) > 1}
    groups = {key: alike(rows) for key, rows in groups.items() if len(alike(rows)) > 1}
    across = min(3, max(1, len(groups)))
    down = -(-max(1, len(groups)) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.7 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (key, rows) in zip(axes.flat, groups.items(), strict=False):
        lines = {}
        for row in sorted(rows, key=lambda row: row["shape"][0]):
            for one, middle in timed(row):
                lines.setdefault(one["name"], (one, []))[1].append((row["shape"][0], middle))
        for one, points in lines.values():
            color, marker = style(one)
            ours = {"linewidth": 2, "zorder": 4} if one["ours"] else {"linewidth": 1, "zorder": 3}
            dash = {"linestyle": "--"} if "cdist" in one["name"] else {}
            drawn = {"color": color, "marker": marker, "markersize": 4, "label": label(one, True)}
            axis.plot(*zip(*points, strict=True), **drawn, **ours, **dash)
        rest = compact(rows[0]["shape"][1:]).replace("[", "[n,")
        axis.set_title(f"{key[0]} {key[1]}\n{key[2]}, {rest} {key[3]}", fontsize=8)
        logarithmic(axis, lambda value, _: f"{value:g}", lambda value, _: seconds(value))
        axis.xaxis.set_major_locator(FixedLocator([row["shape"][0] for row in rows]))
        axis.set_xlabel("n")
        legend(axis, fontsize=6.5)
    return figure


def speedup(run: dict):
    """The best other's time over each of ours, with p20..p80 of the rounds: right of 1 is faster."""
    lines = [(row, one) for row in run["rows"] for one in row["variants"] if one["ours"] and one["ratio"]]
    figure, axis = plt.subplots(figsize=(10, 0.24 * len(lines) + 1.6), layout="constrained")
    for place, (_, one) in enumerate(lines):
        middle, low, high = one["ratio"]["direct"]
        axis.plot([low, high], [place, place], color=SPREAD, linewidth=2.4, alpha=0.5, solid_capstyle="round")
        axis.scatter(middle, place, s=26, color=SPREAD, zorder=3)
    axis.axvline(1, color="#333333", linewidth=0.8)
    best = [f"{times(one['ratio']['direct'][0])}  vs {row['best']['direct']}" for row, one in lines]
    rows_of(axis, [f"{named(row)}: {one['name']}" for row, one in lines], best)
    logarithmic(axis, lambda value, _: f"{value:g}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_xlabel(
        "time of the fastest other that does the same / ours: faster to the right; bar: p20..p80 of the rounds"
    )
    return figure


def memory(run: dict):
    """The most that torch's allocator held during a call beyond its inputs, for all that was timed."""
    rows = [row for row in run["rows"] if any(one["memory"] for one, _ in timed(row))]
    figure, axis = plt.subplots(figsize=(10, 0.24 * len(rows) + 2.4), layout="constrained")
    for place, row in enumerate(rows):
        held = [(one, max(one["memory"], 1)) for one, _ in timed(row) if one["memory"] is not None]
        axis.plot([min(h for _, h in held), max(h for _, h in held)], [place, place], color="#dddddd", zorder=1)
        for one, most in sorted(held, key=lambda pair: pair[0]["ours"]):
            color, marker = style(one)
            size = 90 if one["ours"] and (color, marker) == OURS else 30  # others of ours lie on it
            axis.scatter(most, place, s=size, color=color, marker=marker, label=label(one), zorder=3, alpha=0.9)
    rows_of(axis, [named(row) for row in rows], [""] * len(rows))
    logarithmic(axis, lambda value, _: bytes_(int(value)))
    axis.set_xlabel("peak memory of a call beyond its inputs")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), fontsize=7, frameon=False, loc="outside lower center", ncols=8)
    return figure


def timed(row: dict) -> list[tuple[dict, float]]:
    """Its variants that were, with their medians; without those that do less."""
    taken = [one for one in row["variants"] if one["samples"] and (one["ours"] or one["same_work"])]
    return [(one, spread(one["samples"]["direct"])[0]) for one in taken]


def alike(rows: list[dict]) -> list[dict]:
    """Those that differ in their first dimension alone: the most there are."""
    groups = itertools.groupby(sorted(rows, key=lambda row: row["shape"][1:]), lambda row: row["shape"][1:])
    return max((list(group) for _, group in groups), key=len)


def style(one: dict) -> tuple[str, str]:
    return next((style[1:] for style in STYLES if one["name"].startswith(style[0])), OURS)


def label(one: dict, whole: bool = False) -> str:
    named = one["name"] if whole else one["name"].split(" ")[0]
    return f"ours: {named}" if one["ours"] else named


def named(row: dict) -> str:
    kind = "" if row["kind"] == "forward" else ", " + row["kind"].replace("forward + backward", "and backward")
    return f"{row['op']} {row['case']}{kind} {compact(row['shape'])} {row['dtype'].replace('float', 'f')}"


def rows_of(axis, left: list[str], right: list[str]) -> None:
    """A row for each, from the top, named on both sides."""
    axis.set(ylim=(len(left) - 0.4, -0.6))
    axis.set_yticks(range(len(left)), left, fontsize=7)
    for place, text in enumerate(right):
        axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), fontsize=7, va="center", color="#555555")
    axis.grid(axis="y", alpha=0.15)


def logarithmic(axis, x: Callable[[float, int], str], y: Callable[[float, int], str] | None = None) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(x))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if y:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(y))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.2)
    axis.tick_params(labelsize=7)
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)
    axis.spines[["top", "right"]].set_visible(False)


def legend(axis, fontsize: float = 7.5) -> None:
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=fontsize, frameon=False, loc="upper left")
