"""Style the pictures of the reports, and encode them for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from examples.shared.measures import Spread

COLOURS = {  # of a method, the same in every report
    "unguided": "#8a8f98",
    "constant": "#d08c2e",
    "interval": "#3a7ca5",
    "per class": "#7fb3a2",
    "learned": "#b3263e",
    "baked": "#d4717f",
    "fitted": "#6a4c93",
    "L2": "#b7a99a",
}
GREY, INK, BLUE = "#8a8f98", "#222222", "#3a7ca5"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def drawn(pictures: Callable[[], dict[str, Figure]]) -> dict[str, str]:
    """Draw pictures in the style of the reports; return them by name as PNG data URIs."""
    with matplotlib.rc_context(STYLE):
        return {name: _png(figure) for name, figure in pictures().items()}


def half_width(value: Spread) -> float:
    """Return half the width of a 95 % interval; 0 for a single value."""
    return value["interval95"][1] - value["mean"] if value["interval95"] else 0.0


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
