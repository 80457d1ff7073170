"""A progress bar for a terminal, and silence for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Track = Callable[[Sequence[T], str], Iterable[T]]
Report = Callable[[int, int], None]  # (how much is done, of how much)


def silent(items: Sequence[T], label: str) -> Iterable[T]:
    return items


def bars(prefix: str) -> Track:
    """`track(items, label)`, which draws a bar on stderr while its items are taken, or `silent` without a terminal."""

    def track(items: Sequence[T], label: str) -> Iterator[T]:
        bar = _bar(f"{prefix} {label:<22}")
        for i, item in enumerate(items):
            bar(i, len(items))
            yield item
        bar(len(items), len(items))

    return track if sys.stderr.isatty() else silent


def report(op: str, progress: bool | Report | None) -> Report | None:
    """What the argument `progress` of an op asks for: a function of (done, total), or None for silence.

    True draws a bar on stderr, or nothing without a terminal; None and False say nothing; a function is called itself.

    >>> report("energy_mmd", print)(3, 8)
    3 8
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return _bar(op) if sys.stderr.isatty() else None
    if not callable(progress):
        raise TypeError(
            f"{op}: `progress` is a {type(progress).__name__}, expected True for a bar, or a function of (done, total)"
        )
    return progress


def _bar(label: str) -> Report:
    """Draws while done < total, and wipes itself away at the end."""
    drawn = -1

    def show(done: int, total: int) -> None:
        nonlocal drawn
        percent = 100 * done // max(total, 1)
        if done >= total:
            sys.stderr.write("\r\033[K")
        elif percent != drawn:
            drawn = percent
            filled = "█" * (percent // 4)
            sys.stderr.write(f"\r\033[K{label} {filled:░<25} {percent:3d} %")
        else:
            return
        sys.stderr.flush()

    return show
