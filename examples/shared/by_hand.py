"""Search the guidance that is set by hand: one constant, or one weight on an interval of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

Setting = tuple[float, float, float]  # omega, low, high; a constant is an interval of all times


class ByHand(NamedTuple):
    """Hold every setting of a search, and the best of each kind on validation data."""

    constants: list[Setting]
    intervals: list[Setting]
    tables: Tensor  # [settings, steps, C], the constants first
    found: Tensor  # [settings]: the primary figure of each
    constant: int  # the index of the best constant
    interval: int  # the index of the best interval
    per_class: Tensor  # [C]: the index of the best setting for each class alone
    per_class_found: float

    @property
    def settings(self) -> list[Setting]:
        """Return the constants and then the intervals."""
        return self.constants + self.intervals

    def best(self) -> dict[str, Tensor]:
        """Return the table [steps, C] of each kind of guidance by hand, and of none."""
        return {
            "unguided": torch.zeros_like(self.tables[0]),
            "constant": self.tables[self.constant],
            "interval": self.tables[self.interval],
            "per class": self.tables[self.per_class, :, torch.arange(self.tables.shape[2])].T,
        }


def search(
    constants: Sequence[float],
    omegas: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    steps: int,
    classes: int,
    validate: Callable[[Tensor, str], Tensor],
) -> ByHand:
    """Try every constant, and every interval of the given weights and ends with low < high.

    Args:
        validate: returns the primary figure [settings, C] of tables [settings, steps, C], under a label.
    """
    every = [(omega, 0.0, 1.0) for omega in constants]
    intervals = [(omega, low, high) for omega, low, high in product(omegas, lows, highs) if low < high]
    settings = every + intervals
    tables = torch.stack([interval_table(*setting, steps, classes) for setting in settings])
    by_class = validate(tables, f"grid of {len(settings)}")
    found = by_class.mean(1)
    return ByHand(
        every,
        intervals,
        tables,
        found,
        constant=int(found[: len(every)].argmin()),
        interval=len(every) + int(found[len(every) :].argmin()),
        per_class=by_class.argmin(0),
        per_class_found=float(by_class.min(0).values.mean()),
    )


def interval_table(omega: float, low: float, high: float, steps: int, classes: int) -> Tensor:
    """Return a limited interval [steps, classes]: omega in steps whose middle lies in [low, high], 0 elsewhere."""
    middle = 1 - (torch.arange(steps) + 0.5) / steps
    return (omega * ((middle >= low) & (middle <= high)))[:, None].expand(-1, classes)
