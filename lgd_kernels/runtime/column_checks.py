"""The argument checks of `moments` and `combine`: tensors, their columns, and coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.runtime.checks import DATA_DTYPES, dense, same_device, samples
from lgd_kernels.runtime.columns import MOST, Column
from lgd_kernels.runtime.shown import brief, readable


def several(op: str, tensors: Sequence[Tensor]) -> None:
    """Check a list of one to eight tensors `[B, ...]`."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{op}: `tensors` is a {type(tensors).__name__}, expected a list or tuple of tensors [B, ...]")
    if not 1 <= len(tensors) <= MOST:
        raise ValueError(f"{op}: `tensors` has {len(tensors)} entries, expected 1 to {MOST}")
    samples(op, **{f"tensors[{n}]": tensor for n, tensor in enumerate(tensors)})


def columns(op: str, value: Sequence[Column] | None, count: int) -> None:
    """Check one to eight columns, each an index of a tensor or a difference (i, j)."""
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{op}: `columns` is a {type(value).__name__}, expected a list of indices i and differences (i, j)"
        )
    if not 1 <= len(value) <= MOST:
        raise ValueError(f"{op}: `columns` has {len(value)} entries, expected 1 to {MOST}")
    for k, column in enumerate(value):
        named = (column,) if isinstance(column, int) else column
        good = isinstance(named, tuple) and 1 <= len(named) <= 2 and not (named is column and len(named) == 1)
        if not good or any(isinstance(n, bool) or not isinstance(n, int) for n in named):
            raise TypeError(
                f"{op}: `columns[{k}]` is {column!r}, expected an index i of a tensor, or (i, j) for the difference of "
                "two"
            )
        if any(not 0 <= n < count for n in named):
            raise ValueError(f"{op}: `columns[{k}]` is {column!r}, expected indices from 0 to {count - 1}")


def source(op: str, value: Tensor, like: Tensor) -> None:
    """Check int64 `[B']`, and that they are indices of samples if the host can read them without a device sync."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `source` is a {type(value).__name__}, expected an int64 tensor [B']")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: `source` has dtype {value.dtype}, expected int64; source.long()")
    if value.ndim != 1:
        raise ValueError(f"{op}: `source` has shape {list(value.shape)}, expected [B'], a sample for each output")
    dense(op, "source", value)
    same_device(op, "source", value, "tensors[0]", like)
    batch = like.shape[0]
    if value.shape[0] and not batch:
        raise ValueError(f"{op}: `source` names samples, but the tensors have none")
    if readable(value) and not (value.min() >= 0 and value.max() < batch):
        raise ValueError(f"{op}: `source` is {brief(value)}, expected indices from 0 to {batch - 1}")


def coefficients(op: str, value: Tensor, batch: int, count: int, like: Tensor) -> None:
    """Check coefficients `[B, K]`, or `[B, P, K]` with P from one to eight."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `coefficients` is a {type(value).__name__}, expected a tensor [B, K] or [B, P, K]")
    if value.dtype not in DATA_DTYPES:
        raise TypeError(f"{op}: `coefficients` has dtype {value.dtype}, expected float32 or another float; .float()")
    fits = value.ndim in (2, 3) and value.shape[0] == batch and value.shape[-1] == count
    if not fits or (value.ndim == 3 and not 1 <= value.shape[1] <= MOST):
        raise ValueError(
            f"{op}: `coefficients` has shape {list(value.shape)}, expected [B, K] = [{batch}, {count}], one for each "
            f"column, or [B, P, K] for P outputs, up to {MOST}"
        )
    dense(op, "coefficients", value)
    same_device(op, "coefficients", value, "tensors[0]", like)


def per_output(op: str, name: str, value: object, shape: torch.Size, like: Tensor) -> Tensor:
    """Check numbers `[B]`, or `[B, P]` for P outputs, and return them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a tensor {list(shape)}")
    if value.dtype not in DATA_DTYPES:
        raise TypeError(f"{op}: `{name}` has dtype {value.dtype}, expected float32 or another float; .float()")
    if value.shape != shape:
        raise ValueError(
            f"{op}: `{name}` has shape {list(value.shape)}, expected {list(shape)}, like `coefficients` without its "
            "last dimension"
        )
    dense(op, name, value)
    same_device(op, name, value, "tensors[0]", like)
    return value


def bounds(op: str, value: tuple[float | None, float | None] | None) -> tuple[float, float]:
    """Check a clamp, and return (low, high), infinite where there is none."""
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: `clamp` is {value!r}, expected (low, high), either of them None")
    low, high = value
    for bound in value:
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
            raise TypeError(f"{op}: `clamp` is {value!r}, expected two numbers, either of them None")
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if not low <= high:
        raise ValueError(f"{op}: `clamp` is {value!r}, expected low <= high")
    return low, high
