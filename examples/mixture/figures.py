"""Draw the pictures of the study in the plane."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from examples.mixture.claims import tested
from examples.mixture.plane import undoing
from examples.mixture.study import METHODS
from examples.shared.measures import Spread, spread
from examples.shared.pictures import BLUE, COLOURS, GREY, INK, drawn, half_width
from lgd_kernels.omega.plot import heat as omega_heat

OF_METHOD = {**COLOURS, "loss constant": "#e3bd7c", "loss interval": "#8fb8d1"}
OF_CLASS = ("#2a7f8e", "#c8553d", "#6a4c93")
BESIDE = ("interval", "loss constant", "loss interval", "learned", "fitted", "L2")  # beside the curve of constants
SCATTERED = ("unguided", "constant", "interval", "learned", "L2")


def draw(metrics: dict, shown: list[dict]) -> dict[str, str]:
    """Return all pictures by name. `shown` holds, for each seed, what `run_seed` returns for the pictures."""
    seeds, config = metrics["seeds"], metrics["config"]
    return drawn(
        lambda: {
            "curves": curves(seeds, config["constants"]),
            "paired": differences(metrics["summary"]["paired"]),
            "samples": samples(shown[0]),
            "path": paths(seeds, config),
            "heat": heat(shown, config["sampling_steps"]),
            "bias": bias(metrics["summary"]["l2_bias"]),
        }
    )


def curves(seeds: list[dict], constants: list[float]) -> Figure:
    """Draw whole runs and the loss against a constant omega, a column for each denoiser."""
    names = list(seeds[0]["denoisers"])
    figure = Figure(figsize=(13.5, 5.6))
    grid = figure.subplots(2, len(names), height_ratios=(1.7, 1), squeeze=False)
    end = max(constants)
    for column, name in enumerate(names):
        above, below = grid[:, column]
        runs = np.array([seed["denoisers"][name]["constants"]["energy"] for seed in seeds])  # [seeds, constants]
        loss = np.array([seed["denoisers"][name]["constants"]["loss"] for seed in seeds])
        for panel, values in ((above, runs), (below, loss - loss[:, :1])):
            panel.plot(constants, values.T, color=OF_METHOD["constant"], lw=0.6, alpha=0.4)
            mean = values.mean(0)
            panel.plot(constants, mean, color=OF_METHOD["constant"], lw=2)
            least = int(mean.argmin())
            panel.plot(constants[least], mean[least], "o", ms=9, mfc="none", mec=INK, mew=1.2)
            panel.set_xlim(-0.05 * end, 1.5 * end)
            panel.set_xticks([0, 0.5, 1, 1.5, 2] if end == 2 else constants)
        for i, method in enumerate(BESIDE):
            value = spread(tested(seeds, name, method))
            at, colour = end * (1.09 + 0.07 * i), OF_METHOD[method]
            above.errorbar(at, value["mean"], half_width(value), fmt="o", ms=5, color=colour, label=method)
        floor = max(1e-4, min(runs.mean(0).min(), *(np.mean(tested(seeds, name, m)) for m in BESIDE)))
        top = max(runs.mean(0).max(), *(np.mean(tested(seeds, name, m)) for m in BESIDE))
        above.set_yscale("symlog", linthresh=3e-3)
        above.set_ylim(-5e-4 if floor < 3e-3 else 0.5 * floor, 1.3 * top)
        below.set_ylim(1.6 * min((loss - loss[:, :1]).mean(0).min(), -0.004), 0.09)
        below.axhline(0, color=GREY, lw=0.7)
        above.set_title(name)
        below.set_xlabel("constant omega")
    grid[0, 0].set_ylabel("energy distance (test)")
    grid[1, 0].set_ylabel("loss − loss at 0")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(BESIDE))
    return figure


def differences(paired: dict) -> Figure:
    """Draw learned - other for each denoiser, a row for each method."""
    figure = Figure(figsize=(13.5, 3.3))
    panels = figure.subplots(1, len(paired), sharey=True)
    others = [method for method in METHODS if method not in ("learned", "baked")]
    for panel, (name, found) in zip(panels, paired.items(), strict=True):
        for i, method in enumerate(others):
            value = found[f"learned - {method}"]
            panel.errorbar(value["mean"], i, xerr=half_width(value), fmt="o", ms=5, color=OF_METHOD[method], capsize=2)
        panel.axvline(0, color=INK, lw=0.8)
        panel.set_title(name)
        panel.set_xscale("symlog", linthresh=0.02)
        reach = max(0.004, 1.4 * max(abs(end) for label, value in found.items() for end in ends(value)))
        panel.set_xlim(-reach, reach)
        scale = (0.002, 0.01) if reach < 0.05 else (0.02, 0.1) if reach < 0.5 else (0.1, 1)
        ticks = [tick for tick in scale if tick <= reach]
        panel.set_xticks([-tick for tick in reversed(ticks)] + [0, *ticks])
        panel.set_xticklabels([f"{tick:g}".replace("-", "−") for tick in panel.get_xticks()], fontsize=8)
        panel.minorticks_off()
        panel.grid(axis="x", color="#e3e5e8", lw=0.6)
    panels[0].set_yticks(range(len(others)), others)
    panels[0].invert_yaxis()
    figure.supxlabel("learned − other", fontsize=9)
    return figure


def ends(value: Spread) -> list[float]:
    """Return the ends of the interval of a mean; the mean, for a single value."""
    return value["interval95"] or [value["mean"]]


def samples(shown: dict) -> Figure:
    """Draw data and the samples of some methods, a row for each denoiser."""
    names = [name for name in shown if name != "real"]
    figure = Figure(figsize=(11.5, 1.9 * len(names)))
    grid = figure.subplots(len(names), 1 + len(SCATTERED), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(grid, names, strict=True):
        sets = [shown["real"], *(shown[name]["samples"][method] for method in SCATTERED)]
        for panel, points in zip(row, sets, strict=True):
            for one, colour in zip(points, OF_CLASS, strict=True):
                panel.scatter(*one.T.numpy(), s=4, lw=0, color=colour, alpha=0.6)
            panel.set_aspect("equal")
            panel.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        row[0].set_ylabel(name)
    for panel, method in zip(grid[0], ("data", *SCATTERED), strict=True):
        panel.set_title(method, color=OF_METHOD.get(method, INK))
    return figure


def paths(seeds: list[dict], config: dict) -> Figure:
    """Draw omega along the sampling path of each denoiser."""
    names = list(seeds[0]["denoisers"])
    figure = Figure(figsize=(13.5, 3.2))
    panels = figure.subplots(1, len(names))
    for panel, name in zip(panels, names, strict=True):
        found = {
            method: np.array([seed["denoisers"][name]["omega_path"][method] for seed in seeds])
            for method in ("learned", "fitted", "L2")
        }  # [seeds, steps, C]
        t = 1 - np.arange(found["learned"].shape[1]) / found["learned"].shape[1]
        for c, colour in enumerate(OF_CLASS):
            mean, std = found["learned"][..., c].mean(0), found["learned"][..., c].std(0)
            panel.fill_between(t, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
            panel.plot(t, mean, color=colour, lw=1.8, label=f"class {c}")
            panel.plot(t, found["fitted"][..., c].mean(0), color=colour, lw=1, ls="--")
        panel.plot(t, found["L2"].mean((0, 2)), color=GREY, lw=1.2, ls=":", label="L2, fitted")
        best = np.mean([seed["denoisers"][name]["chosen"]["constant"] for seed in seeds])
        panel.axhline(best, color=INK, lw=0.8, label="best constant")
        if name.endswith("labels"):
            ideal = undoing(config["wrong"], torch.tensor(config[name.split()[0]]))
            for c, colour in enumerate(OF_CLASS):
                panel.plot(1.0, ideal[c], "D", ms=5, color=colour, clip_on=False, mec="white", zorder=4)
        panel.set(title=name, xlabel="t: noise → data", xlim=(1, 0))
        panel.set_ylim(-0.03, max(0.5, 1.05 * max(panel.get_ylim()[1], 0)))
    panels[0].set_ylabel("omega(c, s = t − step, t)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=5)
    return figure


def heat(shown: list[dict], steps: int) -> Figure:
    """Draw learned omega over (s, t), mean over the seeds."""
    names = [name for name in shown[0] if name != "real"]
    mean = {name: torch.stack([show[name]["omega"] for show in shown]).mean(0).numpy() for name in names}
    sheets = {name: mean[name].mean(2) for name in names[:-1]}
    sheets |= {f"uneven, class {c}": mean[names[-1]][..., c] for c in range(mean[names[-1]].shape[2])}
    figure = Figure(figsize=(13.5, 2.2))
    panels = figure.subplots(1, len(sheets), sharey=True)
    for panel, (title, sheet) in zip(panels, sheets.items(), strict=True):
        held = np.triu(np.ones_like(sheet, bool), 1)
        image = omega_heat(panel, sheet, title, max(1.0, float(sheet[held].max())))
        panel.plot([1 / steps, 1], [0, 1 - 1 / steps], color=BLUE, lw=1)
        panel.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        figure.colorbar(image, ax=panel, shrink=0.55)
    panels[0].set_ylabel("s")
    return figure


def bias(rows: list[dict]) -> Figure:
    """Draw the L2 bias that was found against the formula, at churn 0 and 1."""
    figure = Figure(figsize=(4.8, 3.8))
    panel = figure.subplots()
    for churn, colour in ((0.0, BLUE), (1.0, "#b3263e")):
        some = [row for row in rows if row["churn"] == churn]
        expected, means = [row["expected"] for row in some], [row["found"]["mean"] for row in some]
        halves = [half_width(row["found"]) for row in some]
        panel.errorbar(expected, means, halves, fmt="o", ms=5, color=colour, capsize=2, label=f"churn {churn:g}")
    top = 1.1 * max(row["expected"] for row in rows)
    panel.plot([0, top], [0, top], color=INK, lw=0.8, ls="--")
    panel.set(xlabel="signal_t A / B", ylabel="omega of the least L2 loss", xlim=(0, top), ylim=(0, top))
    panel.legend(loc="upper left")
    return figure
