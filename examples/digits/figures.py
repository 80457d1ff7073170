"""Draw the pictures of the digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from examples.digits.data import CLASSES
from examples.shared.pictures import BLUE, COLOURS, GREY, INK, drawn
from lgd_kernels.omega.plot import heat

MOST_SEEDS = 4  # panels side by side
DEFAULTS = {"beta": 1.75, "lam": 1.0, "particles": 4, "delta": 0.1}
ON_LINE: dict[str, Any] = {
    "fontsize": 8,
    "weight": "bold",
    "ha": "center",
    "va": "center",
    "bbox": {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "none"},
}


def draw(metrics: dict, shown: list[dict]) -> dict[str, str]:
    """Return all pictures by name. `shown` holds what `study.run_seed` returns under "show", for each seed."""
    seeds = metrics["seeds"]

    def pictures() -> dict[str, Figure]:
        found = {
            "path": omega_path(seeds),
            "heat": omega_heat(seeds, torch.stack([show["omega"] for show in shown]).mean(0)),
            "classes": energy_by_class(seeds),
            "samples": sample_grids(shown[0]["real"], shown[0]["samples"], wrong_share(seeds[:1])),
            "choice": validation(seeds[0]),
            "reward": reward_against_energy(seeds),
        }
        return found | ({"ablations": ablations(seeds)} if seeds[0]["ablations"] else {})

    return drawn(pictures)


def wrong_share(seeds: list[dict]) -> np.ndarray:
    """Return the share of each class's captions that are wrong, [10], mean over the seeds."""
    return np.mean([seed["wrong_captions"] for seed in seeds], 0)


def class_colours(share: np.ndarray) -> list:
    """Return a colour for each class: from blue, all captions right, to red, three in four wrong, in every run."""
    return [colormaps["turbo"](0.08 + 0.84 * min(1.0, value / 0.75)) for value in share]


def omega_path(seeds: list[dict]) -> Figure:
    """Draw omega along the sampling path, a panel for each seed and a line for each class."""
    share = wrong_share(seeds)
    seeds = seeds[:MOST_SEEDS]
    figure = Figure(figsize=(3.6 * len(seeds) + (3.6 if len(seeds) == 1 else 1.3), 3.5))
    panels = figure.subplots(1, len(seeds), sharey=True, squeeze=False)[0]
    for panel, seed in zip(panels, seeds, strict=True):
        path = np.array(seed["omega_path"])  # [steps, 10]
        t = 1 - np.arange(len(path)) / len(path)
        for c, colour in enumerate(class_colours(share)):
            panel.plot(t, path[:, c], color=colour, lw=1.6, label=f"{c}: {100 * share[c]:.0f} % wrong")
            at = min(len(t) - 1, round(len(t) * (0.04 + 0.04 * c)))  # staggered, to tell crossing lines apart
            panel.text(t[at], path[at, c], c, color=colour, **ON_LINE)
        interval = seed["chosen"]["interval"]
        inside = (t - 0.5 / len(t) >= interval["low"]) & (t - 0.5 / len(t) <= interval["high"])
        panel.step(t, interval["omega"] * inside, color=INK, lw=1, ls=":", where="post", label="best interval")
        panel.axhline(seed["chosen"]["constant"]["omega"], color=INK, lw=1, ls="--", label="best constant")
        panel.set(title=f"seed {seed['seed']}", xlabel="t: noise → data", xlim=(1, 0))
    panels[0].set_ylabel("omega(c, s = t − step, t)")
    panels[0].set_ylim(bottom=-0.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="class: captions")
    return figure


def omega_heat(seeds: list[dict], omega: Tensor) -> Figure:
    """Draw omega [51 (s), 51 (t), 10] for the two cleanest and the two noisiest classes."""
    share = wrong_share(seeds)
    order = np.argsort(share, kind="stable")
    classes = [*order[:2], *order[-2:]]
    figure = Figure(figsize=(11.5, 3.1))
    panels = figure.subplots(1, 4, sharey=True)
    steps = torch.ones(omega.shape[:2], dtype=torch.bool).triu(1)
    top = max(float(omega[steps][:, classes].max()), 0.1)
    for panel, c in zip(panels, classes, strict=True):
        image = heat(panel, omega[..., c], f"class {c}: {100 * share[c]:.0f} % of captions wrong", top)
        step = 1 / len(seeds[0]["omega_path"])
        panel.plot([step, 1], [0, 1 - step], color=BLUE, lw=1)
    panels[0].set_ylabel("s")
    figure.colorbar(image, ax=panels, label="omega", shrink=0.9)
    return figure


def energy_by_class(seeds: list[dict]) -> Figure:
    """Draw the energy distance of each class, a bar for each method."""
    share = wrong_share(seeds)
    figure = Figure(figsize=(11.5, 3.3))
    panel = figure.subplots()
    width = 0.85 / len(COLOURS)
    for i, (name, colour) in enumerate(COLOURS.items()):
        values = np.array([seed["test"][name]["energy_per_class"] for seed in seeds])  # [seeds, 10]
        at = np.arange(CLASSES) + width * (i - (len(COLOURS) - 1) / 2)
        panel.bar(at, values.mean(0), 0.9 * width, color=colour, label=name)
        if len(seeds) > 1:
            panel.scatter(at[None].repeat(len(seeds), 0), values, s=5, color=INK, lw=0, zorder=3)
    panel.set_xticks(range(CLASSES), [f"{c}\n{100 * value:.0f} %" for c, value in enumerate(share)])
    panel.set(xlabel="class, and share of its captions that are wrong", ylabel="energy distance (test)")
    panel.legend(ncols=4, loc="upper left")
    return figure


def sample_grids(real: Tensor, samples: Tensor, share: np.ndarray) -> Figure:
    """Draw real [10, 8, 64] and samples [methods, 10, 8, 64], a sheet for each with a row for each class."""
    sheets = {"real (test split)": real, **dict(zip(COLOURS, samples, strict=True))}
    figure = Figure(figsize=(13.5, 2.2))
    for panel, (name, images) in zip(figure.subplots(1, len(sheets)), sheets.items(), strict=True):
        panel.imshow(tile(images), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        panel.set_yticks([10 * c + 4.5 for c in range(CLASSES)], range(CLASSES), weight="bold")
        for label, colour in zip(panel.get_yticklabels(), class_colours(share), strict=True):
            label.set_color(colour)
        panel.set_xticks([])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_title(name, color=COLOURS.get(name, INK))
    return figure


def tile(images: Tensor) -> np.ndarray:
    """Return one sheet of the 8 x 8 pictures [rows, columns, 64], with white borders of one pixel."""
    rows, columns = images.shape[:2]
    cells = torch.nn.functional.pad(images.view(rows, columns, 8, 8), (1, 1, 1, 1), value=-1.0)
    return cells.permute(0, 2, 1, 3).reshape(rows * 10, columns * 10).clamp(-1, 1).numpy()


def validation(seed: dict) -> Figure:
    """Draw the primary figure of every setting on the validation split."""
    found, chosen = seed["validation"], seed["chosen"]
    figure = Figure(figsize=(9.5, 3.1))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
    omega, _, _, energy = np.array(found["interval"]).T
    left.scatter(omega, energy, s=12, color=COLOURS["interval"], alpha=0.5, lw=0, label="intervals")
    left.plot(*np.array(found["constant"]).T, "o-", ms=4, color=COLOURS["constant"], label="constant")
    left.set(xlabel="omega", ylabel="energy distance (validation)", title="guidance by hand")
    runs: dict[tuple, list] = {}
    for run in found["learned"]:
        runs.setdefault((run["delta"], run["s_min"]), []).append((run["steps"], run["energy"]))
    for i, ((delta, s_min), points) in enumerate(runs.items()):
        label, alpha = f"delta {delta:g}, s_min {s_min:g}", 1 - i / (len(runs) + 1)
        right.plot(*np.array(points).T, "o-", ms=4, color=COLOURS["learned"], alpha=alpha, label=label)
    right.set(xlabel="training steps of omega", title="learned")
    low = min(pick["validation"] for pick in chosen.values())
    left.set_ylim(0.8 * low, 3 * low)
    for panel in (left, right):
        panel.legend(loc="upper right")
    return figure


def reward_against_energy(seeds: list[dict]) -> Figure:
    """Draw the reward of each gamma against its energy distance."""
    sweeps = np.array([[(row["reward"], row["energy"]) for row in seed["reward"]] for seed in seeds])
    figure = Figure(figsize=(5.6, 3.4))
    panel = figure.subplots()
    if len(seeds) > 1:
        for sweep in sweeps:
            panel.plot(*sweep.T, color=COLOURS["learned"], alpha=0.25, lw=0.8, marker=".", ms=4)
    mean = sweeps.mean(0)  # [gammas, 2]
    panel.plot(*mean.T, "o-", color=COLOURS["learned"], ms=5)
    for row, point in zip(seeds[0]["reward"], mean, strict=True):
        panel.annotate(f"{row['gamma']:g}", point, textcoords="offset points", xytext=(6, 5), weight="bold")
    panel.set(xlabel="reward: log-probability of the digit asked for", ylabel="energy distance (test)", title="gamma")
    return figure


def ablations(seeds: list[dict]) -> Figure:
    """Draw the primary figure against each number that was changed, a panel for each."""
    found = {name: np.array([seed["ablations"][name] for seed in seeds]) for name in seeds[0]["ablations"]}
    figure = Figure(figsize=(2.9 * len(found), 2.8))
    for panel, (name, values) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        tried, energy = values[0, :, 0], values[:, :, 1]
        panel.scatter(tried[None].repeat(len(seeds), 0), energy, s=8, color=GREY, lw=0)
        panel.plot(tried, energy.mean(0), "o-", ms=4, color=COLOURS["learned"])
        panel.axvline(DEFAULTS[name], color=INK, lw=0.8, ls="--")
        panel.set_xlabel({"particles": "m"}.get(name, name))
        if name == "particles":
            panel.set_xscale("log", base=2)
    figure.axes[0].set_ylabel("energy distance (test)")
    return figure
