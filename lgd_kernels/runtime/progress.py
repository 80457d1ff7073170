"""Draw a progress bar in a terminal or a notebook, and nothing in a pipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Track = Callable[[Sequence[T], str], Iterable[T]]
Report = Callable[[int, int], None]  # (done, total)


def silent(items: Sequence[T], label: str) -> Iterable[T]:
    """Return the items and draw nothing."""
    return items


def bars(prefix: str) -> Track:
    """Return `track(items, label)`, which draws a bar while its items are taken.

    The bar is on stderr in a terminal. A notebook shows `tqdm.auto` if tqdm is installed. Elsewhere it is `silent`.
    """

    def track(items: Sequence[T], label: str) -> Iterator[T]:
        bar = _bar(f"{prefix} {label:<22}")
        for i, item in enumerate(items):
            bar(i, len(items))
            yield item
        bar(len(items), len(items))

    return track if _seen() else silent


def report(op: str, progress: bool | Report | None) -> Report | None:
    """Return a function of (done, total) for the argument `progress` of an op, or None for no bar.

    True draws a bar as `bars` does, if a terminal or notebook can show it. None and False draw nothing. A function is
    returned itself.

    >>> report("energy_mmd", print)(3, 8)
    3 8
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return _bar(op) if _seen() else None
    if not callable(progress):
        raise TypeError(
            f"{op}: `progress` is a {type(progress).__name__}, expected True for a bar, or a function of (done, total)"
        )
    return progress


def _seen() -> bool:
    """Return whether a terminal or a notebook can show a bar."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, whose stderr is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def _tqdm(label: str) -> Report | None:
    """Return a tqdm bar (a widget if ipywidgets is installed), or None if tqdm is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends ipywidgets
            from tqdm.auto import tqdm
    except ImportError:
        return None
    bar = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        bar = tqdm(desc=label.strip(), total=total, leave=False) if bar is None else bar
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return show


def _bar(label: str) -> Report:
    """Return a bar that is drawn while done < total and erased at the end."""
    if _in_notebook() and (bar := _tqdm(label)) is not None:
        return bar
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
