"""The argument checks of solvers. Messages name the plan and the argument; values are read only without waiting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.runtime.checks import NO_DATA_IN_EPS, dense, prediction_name
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.runtime.shown import brief, readable


def times(plan: str, name: str, value: Tensor) -> None:
    """`[N + 1]` or `[N + 1, B]`, from the noise to the data."""
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
    """Times that are sigmas, of a float dtype that has digits enough for their differences."""
    prediction_name(plan, prediction)
    times(plan, "sigmas", value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{plan}: `sigmas` has dtype {value.dtype}, expected float32 or float64; sigmas.double()")
    if readable(value) and not bool(((value >= 0) & (value < math.inf)).all()):
        raise ValueError(f"{plan}: `sigmas` must lie in [0, inf); got {brief(value)}")


def levels(plan: str, schedule, t: Tensor, s: Tensor, prediction: str) -> Levels:
    """Levels of all steps; an eps prediction needs a signal above 0."""
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
    """Times `[N]` or `[N, B]` of steps, and where each of them goes."""
    _tensor(plan, "times", times)
    _tensor(plan, "to", to)
    if times.ndim not in (1, 2):
        raise ValueError(f"{plan}: `times` has shape {list(times.shape)}, expected [N] or [N, B]")
    if to.shape != times.shape:
        raise ValueError(
            f"{plan}: `to` has shape {list(to.shape)}, expected {list(times.shape)}: step i goes from times[i] to to[i]"
        )


def churn(plan: str, value: float | Tensor, like: Tensor) -> None:
    """In [0, 1]: a number, or a tensor with an entry for each step, and for each sample's where they have times."""
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


def churning(plan: str, **values: float) -> None:
    """The churn settings of `edm_euler` and `edm_heun`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{plan}: `{name}` is a {type(value).__name__}, expected a float")
        if not (0 <= value < math.inf or (value == math.inf and name != "s_noise")):
            most = "a finite number, 0 or more" if name == "s_noise" else "0 or more"
            raise ValueError(f"{plan}: `{name}` is {value}, expected {most}")


def first_order(plan: str, value: Tensor | None, like: Tensor) -> None:
    """None, or a bool for each step."""
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
    """Factors are finite: a schedule of the user's own, or times at the limits of a dtype, may break that."""
    if readable(table) and not bool(table.isfinite().all()):
        raise ValueError(
            f"{plan}: factors of call {_first(~table.isfinite())} are not finite in {table.dtype}; give times in "
            "float64, or look at the schedule's levels there"
        )


def _tensor(plan: str, name: str, value: Tensor) -> None:
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
    """The first step in which something is true."""
    return int(found.reshape(found.shape[0], -1).any(1).nonzero()[0])
