"""Read clean pairs (x0, c) to learn from: two tensors, or a dataset of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor
from torch.utils.data import Dataset, default_collate

Pair = tuple[Tensor, Tensor]  # (x0 [N, ...], c [N, ...])
Pairs = Dataset | Sequence  # N pairs (x0 [...], c)
Data = Pair | Pairs


def size_of(data: Data) -> int:
    """Return the number of pairs.

    >>> import torch
    >>> size_of((torch.zeros(5, 2), torch.zeros(5)))
    5
    """
    if _tensors(data):
        x0, c = data
        if len(x0) != len(c) or not len(x0):
            raise ValueError(f"data: x0 holds {len(x0)} items and c {len(c)}, expected the same number, 1 or more")
        return len(x0)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data is a {type(data).__name__}, expected (x0 [N, ...], c [N, ...]) or a dataset with __len__ and "
            "__getitem__"
        )
    if not len(data):
        raise ValueError("data holds 0 items, expected 1 or more")
    return len(data)


def items_of(data: Data, items: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x0 [B, ...], c [B, ...]) of the items, int64 `[B]`, by `__getitems__` if the dataset has this method.

    >>> import torch
    >>> items_of([(torch.zeros(2), 7), (torch.ones(2), 8)], torch.tensor([1]))
    (tensor([[1., 1.]]), tensor([8]))
    """
    if _tensors(data):
        x0, c = (one[items.to(one.device)] for one in data)
        return x0, c
    index = items.tolist()
    several = getattr(data, "__getitems__", None)
    pairs = several(index) if several else [data[i] for i in index]
    bad = next((pair for pair in pairs if not isinstance(pair, (tuple, list)) or len(pair) != 2), None)
    if bad is not None:
        said = f"{type(bad).__name__} of {len(bad)}" if isinstance(bad, (tuple, list)) else type(bad).__name__
        raise TypeError(
            f"data: an item of the {type(data).__name__} is a {said}, expected a pair (x0, c); two tensors are passed "
            "as (x0, c)"
        )
    x0, c = default_collate(pairs)
    return x0, c


def _tensors(data: Data) -> TypeGuard[Pair]:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, Tensor) for one in data)
