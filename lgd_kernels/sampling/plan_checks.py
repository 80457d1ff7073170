"""Check the arguments of schedules and solvers. Messages name the function and the argument; no check waits for a
device."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.runtime.checks import NO_DATA_IN_EPS, dense, prediction_name
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.runtime.shown import brief, readable


def times(plan: str, name: str, value: Tensor) -> None:
    """Raise TypeError or ValueError unless times are `[N + 1]` or `[N + 1, B]`, from the noise to the data."""
    _tensor(plan, name, value)
    if value.ndim not in (1, 2) or not value.shape[0]:
        raise ValueError(
            f"{plan}: `{name}` has shape {list(value.shape)}, expected [N + 1], or [N + 1, B] for a run of each sample"
        )
    rises = value[1:] > value[:-1]
    if readable(rises) and bool(rises.any()):
        at = _first(rises)
        raise ValueError(
            f"{plan}: `{name}` rises at {name}[{at + 1}], from {_shown(value[at])} to {_shown(value[at + 1])}, "
            f"expected times from the noise to the data; {name}.flip(0) reverses a run from the data to the noise"
        )


def sigmas(plan: str, value: Tensor, prediction: str) -> None:
    """Check times that are sigmas: finite, and of a dtype with enough digits for their differences."""
    prediction_name(plan, prediction)
    times(plan, "sigmas", value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{plan}: `sigmas` has dtype {value.dtype}, expected float32 or float64; sigmas.double()")
    if readable(value) and not bool(((value >= 0) & (value < math.inf)).all()):
        raise ValueError(f"{plan}: `sigmas` must lie in [0, inf); got {brief(value)}")


def levels(plan: str, schedule: Any, t: Tensor, s: Tensor, prediction: str) -> Levels:
    """Compute the levels of all steps, or raise; an eps prediction needs a signal above 0."""
    prediction_name(plan, prediction)
    if isinstance(schedule, type) or not callable(getattr(schedule, "levels", None)):
        what = schedule.__name__ if isinstance(schedule, type) else f"a {type(schedule).__name__}"
        raise TypeError(f"{plan}: `schedule` is {what}, expected a schedule, such as lgd_kernels.RectifiedFlow()")
    try:
        found = schedule.levels(t, s)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{plan}: `times`: {error}") from error
    if prediction == "eps" and readable(found.signal_t) and bool((found.signal_t == 0).any()):
        raise ValueError(f"{plan}: the signal is 0 at `times[{_first(found.signal_t == 0)}]`, {NO_DATA_IN_EPS}")
    return found


def ends(plan: str, times: Tensor, to: Tensor) -> None:
    """Check the times `[N]` or `[N, B]` at which steps start and end."""
    _tensor(plan, "times", times)
    _tensor(plan, "to", to)
    if times.ndim not in (1, 2):
        raise ValueError(f"{plan}: `times` has shape {list(times.shape)}, expected [N] or [N, B]")
    if to.shape != times.shape:
        raise ValueError(
            f"{plan}: `to` has shape {list(to.shape)}, expected {list(times.shape)}: step i goes from times[i] to to[i]"
        )


def churn(plan: str, value: float | Tensor, like: Tensor) -> None:
    """Check that churn is in [0, 1]: a number, or a tensor with an entry for each step (and for each sample, if samples
    have times of their own)."""
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{plan}: `churn` has dtype {value.dtype}, expected a float dtype")
        dense(plan, "churn", value)
        pairs = zip(value.shape, like.shape, strict=False)
        if value.ndim and (value.ndim != like.ndim or any(one not in (1, other) for one, other in pairs)):
            hint = "; churn[:, None] is the same for all samples" if value.shape == like.shape[:1] else ""
            raise ValueError(
                f"{plan}: `churn` has shape {list(value.shape)}, expected {list(like.shape)}, one for each step{hint}"
            )
        inside = not readable(value) or bool(((value >= 0) & (value <= 1)).all())
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{plan}: `churn` is a {type(value).__name__}, expected a float or a tensor [N]")
    else:
        inside = 0 <= value <= 1
    if not inside:
        raise ValueError(f"{plan}: `churn` is {brief(value)}, expected values in [0, 1]")


def positive(where: str, **values: float) -> None:
    """Raise TypeError or ValueError unless each value is a positive finite number."""
    _numbers(where, values, "a positive finite number", lambda value: 0 < value < math.inf)


def at_least_0(where: str, **values: float) -> None:
    """Raise TypeError or ValueError unless each value is 0 or more, perhaps infinite."""
    _numbers(where, values, "0 or more", lambda value: value >= 0)


def finite_at_least_0(where: str, **values: float) -> None:
    """Raise TypeError or ValueError unless each value is finite, and 0 or more."""
    _numbers(where, values, "a finite number, 0 or more", lambda value: 0 <= value < math.inf)


def _numbers(where: str, values: dict[str, float], expected: str, fits: Callable[[float], bool]) -> None:
    """Raise TypeError or ValueError unless each value is a real number that fits."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{where}: `{name}` is a {type(value).__name__}, expected a float")
        if not fits(value):
            raise ValueError(f"{where}: `{name}` is {value}, expected {expected}")


def order(plan: str, value: int, most: int) -> None:
    """Raise TypeError or ValueError unless an order is an int from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{plan}: `order` is a {type(value).__name__}, expected an int from 1 to {most}")
    if not 1 <= value <= most:
        raise ValueError(f"{plan}: `order` is {value}, expected 1 to {most}")


def first_order(plan: str, value: Tensor | None, like: Tensor) -> None:
    """Raise TypeError or ValueError unless the value is None, or a bool for each step."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        what = f"has dtype {value.dtype}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise TypeError(f"{plan}: `first_order` {what}, expected a bool tensor [N]")
    dense(plan, "first_order", value)
    if value.shape not in (like.shape, like.shape[:1]):
        raise ValueError(
            f"{plan}: `first_order` has shape {list(value.shape)}, expected [N] = {list(like.shape[:1])}, one for each "
            "step"
        )


def finite(plan: str, table: Tensor) -> None:
    """Raise ValueError for factors that are not finite: of a faulty schedule, or at the limits of a dtype."""
    if readable(table) and not bool(table.isfinite().all()):
        raise ValueError(
            f"{plan}: factors of call {_first(~table.isfinite())} are not finite in {table.dtype}; give times in "
            "float64, or look at the schedule's levels there"
        )


def _tensor(plan: str, name: str, value: Tensor) -> None:
    """Raise TypeError unless times are a dense tensor of a real dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{plan}: `{name}` is a {type(value).__name__}, expected a tensor of times; torch.tensor({name})"
        )
    dense(plan, name, value)
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{plan}: `{name}` has dtype {value.dtype}, expected times of a real dtype")


def _shown(value: Tensor) -> str:
    return brief(value) if value.ndim else f"{value.item():g}"


def _first(found: Tensor) -> int:
    """Return the first step in which an entry is true."""
    return int(found.reshape(found.shape[0], -1).any(1).nonzero()[0])
