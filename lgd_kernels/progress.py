"""A progress bar for a terminal, and silence for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Track = Callable[[Sequence[T], str], Iterable[T]]


def silent(items: Sequence[T], label: str) -> Iterable[T]:
    return items


def bars(prefix: str) -> Track:
    """`track(items, label)`, which draws a bar on stderr while its items are taken, or `silent` without a terminal."""

    def track(items: Sequence[T], label: str) -> Iterator[T]:
        drawn = -1
        for i, item in enumerate(items):
            percent = 100 * i // len(items)
            if percent != drawn:
                drawn = percent
                filled = "█" * (percent // 4)
                sys.stderr.write(f"\r\033[K{prefix} {label:<22} {filled:░<25} {percent:3d} %")
                sys.stderr.flush()
            yield item
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()

    return track if sys.stderr.isatty() else silent
