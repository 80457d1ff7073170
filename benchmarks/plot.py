"""Time against bytes, with this run's own copy as the ceiling: one panel for each op."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.environment import in_words
from benchmarks.report import compact, digits, seconds
from benchmarks.timing import spread

OURS = {"cpu": "#1f5fae", "triton": "#1f5fae", "cuda": "#6a3d9a", "reference": "#333333"}
PEERS = (("eager", "#999999", "o"), ("compiled, coeff", "#f4a261", "v"), ("compiled", "#d1495b", "D"))
APART = 1.09  # rows of one size stand side by side, by this factor; each has its own copy's time as a dash


def roofline(run: dict, path: Path) -> Path:
    """Draws a run; into a folder, as roofline.png. Returns where."""
    if not path.suffix:
        path = path / "roofline.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in run["rows"] if any(timed(one) for one in row["variants"])]
    panels = [list(group) for _, group in itertools.groupby(rows, lambda row: row["op"])]
    heights = [max(3.6, 0.155 * len(panel) + 0.8) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, sum(heights) + 1), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        draw(axis, panel)
    axes[-1, 0].set_xlabel("bytes that must move (rows of one size stand side by side)")
    figure.suptitle("\n".join(in_words(run["environment"])), fontsize=7.5, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw(axis, rows: list[dict]) -> None:
    copies = sorted({row["bytes"]: spread(row["copy"]["direct"])[0] for row in rows}.items())
    axis.plot(*zip(*copies, strict=True), color="#2a9d8f", linewidth=1, alpha=0.5, zorder=1)
    beside, key = {}, []
    for number, row in enumerate(sorted(rows, key=lambda row: row["bytes"]), start=1):
        place = next((size for size in beside if abs(row["bytes"] / size - 1) < 0.05), row["bytes"])
        beside[place] = beside.get(place, -1) + 1
        at = place * APART ** beside[place]
        points = [(spread(one["samples"]["direct"])[0], one) for one in row["variants"] if timed(one)]
        axis.plot([at, at], [min(points, key=first)[0], max(points, key=first)[0]], color="#dddddd", zorder=1)
        ceiling = spread(row["copy"]["direct"])[0]
        axis.scatter(
            at, ceiling, s=150, color="#2a9d8f", marker="_", linewidth=2.5, label="copy: the ceiling", zorder=2
        )
        for median, one in points:
            mark(axis, at, median, one, number)
        dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}[row["dtype"]]
        key.append(f"{number:2}  {compact(row['shape'])} {dtype} {row['case']}: {row['kind']}")
    axis.set(xscale="log", yscale="log", ylabel="time of a call", title=rows[0]["op"])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{digits(value / 1e6)} MB"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    names = axis.get_legend_handles_labels()
    unique = dict(zip(names[1], names[0], strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=8, frameon=False, loc="upper left")
    axis.text(1.01, 1.0, "\n".join(key), transform=axis.transAxes, fontsize=7, va="top", family="monospace")


def mark(axis, at: float, median: float, one: dict, number: int) -> None:
    """Ours with the number of its row, which the key explains; baselines small."""
    if one["ours"]:
        axis.scatter(at, median, s=95, color=OURS[one["name"]], label=f"ours: {one['name']}", zorder=4)
        axis.annotate(str(number), (at, median), color="white", fontsize=6.5, ha="center", va="center", zorder=5)
    else:
        name, color, marker = next(peer for peer in PEERS if one["name"].startswith(peer[0]))
        label = {"compiled, coeff": "compiled, coefficients given (does less)"}.get(name, name)
        axis.scatter(at, median, s=26, color=color, marker=marker, label=label, zorder=3)


def timed(one: dict) -> bool:
    return bool(one["samples"])


def first(pair):
    return pair[0]
