"""Arguments of the op, in the order of the struct in csrc/dynamic_threshold/dynamic_threshold.h."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.levels import arithmetic_dtype


class DynamicThreshold(NamedTuple):
    x0: Tensor
    quantile: float
    max_value: float

    @staticmethod
    def of(x0: Tensor, quantile: float, max_value: float) -> DynamicThreshold:
        """Make the struct from what users pass. A max_value that the arithmetic cannot hold is infinite."""
        most = torch.finfo(arithmetic_dtype(x0)).max
        return DynamicThreshold(x0, float(quantile), math.inf if max_value > most else float(max_value))

    def position(self) -> tuple[int, float]:
        """Return (rank, weight) of the quantile in a sample of x0."""
        return position(self.quantile, self.x0[0].numel())


class DynamicThresholdBackward(NamedTuple):
    upstream: Tensor
    order: Tensor  # [B, 2]: the two elements that the quantile lies between
    call: DynamicThreshold


def position(quantile: float, count: int) -> tuple[int, float]:
    """Return (rank, weight): the quantile of `count` elements lies from the one of this rank, from 0, so far towards
    the next."""
    at = quantile * (count - 1)
    rank = math.floor(at)
    return rank, at - rank
