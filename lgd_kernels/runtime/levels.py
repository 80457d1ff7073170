"""Specify the scalars of a sample in plain PyTorch: its omega in a table, and the coefficients of its step.

`csrc/common/levels.h` and `triton_common.py` compute the same numbers inside the kernels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lgd_kernels.runtime.shown import brief, kind

Prediction = Literal["x0", "eps", "v", "flow"]
PREDICTIONS = get_args(Prediction)  # the position is the code in csrc/common/levels.h
_TIMES = (torch.float32, torch.float64)
_VALUES = (*_TIMES, torch.bfloat16, torch.float16)


class Levels(NamedTuple):
    """Hold the noise levels of a step from t to s (nearer the data), each `[B]`: `x_t = signal_t x0 + noise_t z`.

    All coefficients of a step follow from `gap = signal_s noise_t - signal_t noise_s`. Computed from rounded levels,
    gap loses digits (4e-5 over 1000 steps in float32), so the schedule gives it in closed form: see `Schedule.levels`.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(t=torch.tensor([0.75]), s=torch.tensor([0.25]))
    >>> levels.signal_s * levels.noise_t - levels.signal_t * levels.noise_s, levels.gap
    (tensor([0.5000]), tensor([0.5000]))
    """

    signal_t: Tensor
    noise_t: Tensor
    signal_s: Tensor
    noise_s: Tensor
    gap: Tensor

    def __repr__(self) -> str:
        return f"Levels({', '.join(f'{name}={brief(value)}' for name, value in zip(self._fields, self, strict=True))})"

    def to(self, *args, **options) -> Levels:
        """Return all five on another device or in another dtype (float32 or float64), like `torch.Tensor.to`."""
        return Levels(*(tensor.to(*args, **options) for tensor in self))


class OmegaLookup(NamedTuple):
    """Hold a table and each sample's place in it; `OmegaTable.at` makes it, and kernels read it."""

    values: Tensor  # [C, S, T]
    s_knots: Tensor  # [S], increasing
    t_knots: Tensor  # [T], increasing
    c: Tensor  # [B] int64
    s: Tensor  # [B]
    t: Tensor  # [B]

    def __repr__(self) -> str:
        where = ", ".join(f"{name}={brief(getattr(self, name))}" for name in ("c", "s", "t"))
        return f"OmegaLookup({where}, values {list(self.values.shape)} {kind(self.values)})"

    def to(self, device: torch.device | str) -> OmegaLookup:
        """Return table, c, s and t on another device."""
        return OmegaLookup(*(tensor.to(device) for tensor in self))


def is_whole(lookup: OmegaLookup, like: Tensor) -> bool:
    """Return whether kernels may read a lookup: its shapes and dtypes are as `OmegaTable.at` makes them for `like`."""
    values, s_knots, t_knots, c, s, t = lookup
    for tensor in lookup:
        if not isinstance(tensor, Tensor) or tensor.device != like.device or tensor.layout is not torch.strided:
            return False
    shape = values.shape
    return (
        len(shape) == 3 and 0 not in shape and s_knots.shape == shape[1:2] and t_knots.shape == shape[2:]
        and c.shape == s.shape == t.shape == like.shape[:1] and c.dtype is torch.int64 and values.dtype in _VALUES
        and s_knots.dtype is t_knots.dtype and s_knots.dtype in _TIMES and s.dtype is t.dtype and s.dtype in _TIMES
    )  # fmt: skip


def lookup_problem(lookup: OmegaLookup, like: Tensor, like_name: str) -> str:
    """Describe what is wrong with a lookup, for an error message."""
    values, batch = lookup.values, list(like.shape[:1])
    for name, tensor in zip(lookup._fields, lookup, strict=True):
        if not isinstance(tensor, Tensor):
            return f"`omega.{name}` is a {type(tensor).__name__}, expected a tensor"
        if tensor.layout is not torch.strided:
            return f"`omega.{name}` has layout {tensor.layout}, expected a dense tensor; .to_dense() makes one"
        if name in ("c", "s", "t") and list(tensor.shape) != batch:
            shape = list(tensor.shape)
            return (
                f"`omega` was looked up for `{name}` of shape {shape}, expected [B] = {batch}, one for each sample of "
                f"`{like_name}`"
            )
    if values.ndim != 3 or not values.numel():
        return f"`omega.values` has shape {list(values.shape)}, expected [C, S, T], none of them 0"
    for name, size in (("s_knots", values.shape[1]), ("t_knots", values.shape[2])):
        if (found := list(getattr(lookup, name).shape)) != [size]:
            return f"`omega.{name}` has shape {found}, expected [{size}] for values of shape {list(values.shape)}"
    dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in zip(lookup._fields, lookup, strict=True))
    return (
        f"`omega` has dtypes {dtypes}, expected floats for values, int64 for c, and float32 or float64 for the others: "
        "one for both knots, one for s and t"
    )


class StepCoefficients(NamedTuple):
    """Hold a step as a linear map, each `[B]`: `x_s = x * x_t + guided * g + noise * z`, g the guided prediction."""

    x: Tensor
    guided: Tensor
    noise: Tensor


def step_coefficients(levels: Levels, prediction: str, churn: float | Tensor) -> StepCoefficients:
    """Compute the coefficients of one churn-DDIM step (arXiv 2510.00815, Eq. 2, 8 and 23).

        q = gap / (signal_s noise_t)        r = 1 - q        h = 1 - churn^2 q
        x_s = (noise_s / noise_t) h x_t + signal_s q (1 + churn^2 r) x0 + noise_s sqrt(churn^2 q (2 - churn^2 q)) z

    with x0 written in terms of x_t and the prediction. s = t is the identity. NaN where the step is not defined:
    gap < 0 (s after t), churn outside [0, 1], "eps" where signal_t = 0.
    """
    gap, q = levels.gap, _share(levels)
    churn = churn.to(gap.dtype) if isinstance(churn, Tensor) else torch.ones_like(gap) * churn
    return _coefficients(levels, prediction, q, churn * churn * q, (churn >= 0) & (churn <= 1))


def coefficients_of_h(levels: Levels, prediction: str, h: float | Tensor) -> StepCoefficients:
    """Compute the coefficients of a step that keeps the share h of the noise in x_t, 1 - h in place of churn^2 q.

    h = 1 is a step without noise. h = 1 - q is churn 1; a smaller h adds more noise than any churn, also at s = t. NaN
    as in `step_coefficients`, and where h is outside [0, 1].
    """
    h = h.to(levels.gap.dtype) if isinstance(h, Tensor) else torch.ones_like(levels.gap) * h
    return _coefficients(levels, prediction, _share(levels), 1 - h, (h >= 0) & (h <= 1))


def _share(levels: Levels) -> Tensor:
    """Return q = gap / (signal_s noise_t), and 0 where s = t: there it is 0/0 at t = 0 and at t = 1."""
    stays = levels.gap == 0
    return torch.where(stays, 0, levels.gap / torch.where(stays, 1, levels.signal_s * levels.noise_t))


def _coefficients(levels: Levels, prediction: str, q: Tensor, renewed: Tensor, allowed: Tensor) -> StepCoefficients:
    """Compute the coefficients for `renewed` = 1 - h, and NaN where the step is not defined."""
    _, noise_t, signal_s, noise_s, gap = levels
    one = torch.ones_like(gap)
    ratio = torch.where(noise_t == 0, one, noise_s / torch.where(noise_t == 0, one, noise_t))
    to_x = ratio * (1 - renewed)
    to_x0 = signal_s * (q + renewed * (1 - q))
    noise = noise_s * torch.sqrt(renewed * (2 - renewed))

    x0_of_x, x0_of_g = x0_coefficients(levels, prediction)
    defined = (gap >= 0) & allowed
    if prediction == "eps":
        defined = defined & (levels.signal_t != 0)
    nan = torch.full_like(gap, torch.nan)
    coefficients = (to_x + to_x0 * x0_of_x, to_x0 * x0_of_g, noise)
    return StepCoefficients(*(torch.where(defined, value, nan) for value in coefficients))


def x0_coefficients(levels: Levels, prediction: str) -> tuple[Tensor, Tensor]:
    """Return the coefficients `[B]` of `x0 = first * x_t + second * p`, p the prediction."""
    signal, noise = levels.signal_t, levels.noise_t
    if prediction == "x0":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "eps":
        return 1 / signal, -noise / signal
    if prediction == "v":
        square = signal * signal + noise * noise
        return signal / square, -noise / torch.sqrt(square)
    return 1 / (signal + noise), -noise / (signal + noise)  # flow: the prediction is z - x0


def omega_at(omega: float | Tensor | OmegaLookup, like: Tensor) -> Tensor:
    """Return omega as a tensor in the dtype and on the device of `like`: `[B]`, or 0-dim if it is one number."""
    if isinstance(omega, OmegaLookup):
        cells, weights, known = table_cells(omega, like.dtype)
        corners = omega.values.reshape(-1)[cells].to(weights.dtype)  # [B, 4]
        found = (corners * weights).sum(-1)
        return torch.where(known, found, torch.full_like(found, torch.nan)).to(like.dtype)
    if isinstance(omega, Tensor):
        return omega.to(like.dtype)
    return torch.ones((), dtype=like.dtype, device=like.device) * omega  # under compilation no constant of the graph


def table_cells(lookup: OmegaLookup, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Find the four cells around each sample's (s, t): flat indices `[B, 4]`, weights `[B, 4]` in at least the
    precision of `dtype`, and whether c is in range `[B]`.

    Interpolation is bilinear between knots and clamped outside. A corner with s >= t holds no step; it takes the value
    of the last row before the diagonal in its column, or, in a column without such a row, of the first column with one.
    """
    values, s_knots, t_knots, c, s, t = lookup
    rows, row_weights = _bracket(s_knots, s, dtype)  # [B, 2] each
    columns, column_weights = _bracket(t_knots, t, dtype)
    first_column = (t_knots <= s_knots[0]).sum().clamp(max=t_knots.numel() - 1)
    last_row = ((s_knots[:, None] < t_knots[None, :]).sum(0) - 1).clamp(min=0)  # [T]
    columns = columns.clamp(min=first_column)[:, None, :]  # [B, 1, 2]
    rows = torch.minimum(rows[:, :, None], last_row[columns])  # [B, 2, 2]
    known = (c >= 0) & (c < values.shape[0])
    item = torch.where(known, c, torch.zeros_like(c))[:, None, None]
    cells = (item * values.shape[1] + rows) * values.shape[2] + columns
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return cells.flatten(1), weights.flatten(1), known


def table_gradient(lookup: OmegaLookup, grad_omega: Tensor) -> Tensor:
    """Compute the gradient to `lookup.values`: spread each sample's gradient over its four cells, in a fixed order."""
    cells, weights, known = table_cells(lookup, grad_omega.dtype)
    spread = grad_omega[:, None].to(weights.dtype) * weights
    spread = torch.where(known[:, None], spread, torch.zeros_like(spread)).flatten()
    total = torch.zeros(lookup.values.numel(), dtype=weights.dtype, device=weights.device)
    if total.device.type == "cpu":
        total = total.index_add(0, cells.flatten(), spread)  # adds one row after the other
    else:
        total = total.index_put((cells.flatten(),), spread, accumulate=True)  # sorts first, so it uses no float atomics
    return total.view(lookup.values.shape).to(lookup.values.dtype)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float32, or float64 if a tensor is."""
    return widest(*[tensor.dtype for tensor in tensors if tensor is not None])


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return float32, or float64 if a dtype is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]` (or 0-dim) to broadcast with `[B, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def sum_samples(tensor: Tensor) -> Tensor:
    """Sum `[B, ...]` over each sample, to `[B]`."""
    return tensor.sum(tuple(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor


def _bracket(knots: Tensor, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the two knots around each point and their weights, `[B, 2]` each."""
    dtype = torch.promote_types(torch.promote_types(knots.dtype, at.dtype), dtype)
    knots, at = knots.to(dtype), at.to(dtype)
    left = ((knots <= at[:, None]).sum(-1) - 1).clamp(0, max(knots.numel() - 2, 0))
    right = (left + 1).clamp(max=knots.numel() - 1)
    width = torch.where(right > left, knots[right] - knots[left], torch.ones_like(at))
    weight = ((at - knots[left]) / width).clamp(0, 1)
    return torch.stack((left, right), -1), torch.stack((1 - weight, weight), -1)
