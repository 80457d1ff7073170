"""Draw omega(c, s, t) as heat maps: t to the right, s upwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.sampling.schedules import Schedule

SHOWN = 6  # conditions in a picture
POINTS = 41  # in each direction
COLOURS = "magma_r"


@torch.no_grad()
def draw(
    omega: Callable[[Any, Tensor, Tensor], Tensor],
    conditions: Tensor,
    schedule: Schedule | None = None,
    ends: tuple[float, float] = (0.0, 1.0),
) -> Any:
    """Draw omega for the first few `conditions`, `[C]` or `[C, E]`, one panel for each: over unit times with a
    schedule, else over times from `ends[0]` to `ends[1]`."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"plot: `schedule` is a {type(schedule).__name__}, expected a schedule, such as lgd_kernels.RectifiedFlow()"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture of omega needs matplotlib: pip install matplotlib") from error

    low, high = (0.0, 1.0) if schedule is not None else ends
    grid = torch.linspace(low, high, POINTS, device=conditions.device)
    i, j = torch.triu_indices(POINTS, POINTS, 1, device=conditions.device)  # s < t
    s, t = (grid[k] if schedule is None else schedule.from_unit(grid[k]) for k in (i, j))
    shown = conditions[:SHOWN]
    sheets = torch.full((len(shown), POINTS, POINTS), math.nan, device="cpu")  # [C, s, t]
    for sheet, c in zip(sheets, shown, strict=True):
        sheet[i.cpu(), j.cpu()] = omega(c[None].expand(len(s), *c.shape), s, t).float().cpu()
    figure = Figure(figsize=(2.4 * len(shown) + 1, 2.8), layout="constrained")
    top = float(sheets.nan_to_num(0).max()) or 1.0
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for k, panel in enumerate(panels):
        image = heat(panel, sheets[k], f"condition {k}", top, (low, high))
    panels[0].set_ylabel("s")
    figure.colorbar(image, ax=panels, label="omega")
    return figure


def heat(panel: Any, values: Tensor, title: str, top: float, ends: tuple[float, float] = (0.0, 1.0)) -> Any:
    """Draw one panel: omega `[s, t]` on an even grid from `ends[0]` to `ends[1]`, blank where s >= t.

    `panel` is a matplotlib Axes. Returns its image."""
    values = torch.as_tensor(values, device="cpu")
    step = torch.ones_like(values, dtype=torch.bool).triu(1)
    sheet = torch.where(step, values, math.nan).numpy()
    image = panel.imshow(sheet, origin="lower", extent=(*ends, *ends), vmin=0, vmax=top, cmap=COLOURS, aspect="equal")
    panel.set(title=title, xlabel="t")
    return image
