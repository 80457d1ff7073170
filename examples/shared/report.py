"""Format figures as text, and render reports: one HTML file with its pictures and the style sheet inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from examples.shared.measures import Spread

FOLDER = Path(__file__).parents[1]  # templates are named from here: digits/report.html
QUICK = "--quick: a test of the code; the figures mean nothing"


class Table(NamedTuple):
    """Hold a table: titles of the columns, each with a hint or "", and rows of text; the first column is their name."""

    head: list[tuple[str, str]]
    rows: list[list[str]]


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of the values. Text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"many": many, "percent": percent}
    return environment.get_template(template).render(quick=QUICK, **values)


def plus_minus(value: Spread) -> str:
    """Format mean ± standard deviation.

    >>> plus_minus({"mean": 0.5, "std": 0.25})
    '0.500 ± 0.250'
    """
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def signed(value: Spread, digits: int = 3) -> str:
    """Format a difference with its 95 % interval."""
    interval = value["interval95"]
    mean = f"{value['mean']:+.{digits}f}"
    return mean + (f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else "")


def percent(share: float, digits: int = 0) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def many(number: int, noun: str = "seed") -> str:
    """Format a count with its noun.

    >>> many(1), many(2, "thread")
    ('1 seed', '2 threads')
    """
    return f"{number} {noun}" + ("s" if number > 1 else "")
