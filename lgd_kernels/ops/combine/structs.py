"""Arguments of the op, in the order of the struct in csrc/combine/combine.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.arguments import ABSENT, Seed
from lgd_kernels.runtime.columns import Columns


class Combine(NamedTuple):
    read: Columns
    coefficients: Tensor  # [B', P, K]
    constant: Tensor | None  # [B', P]
    noise_scale: Tensor | None  # [B', P]; absent: nothing is drawn
    seed: Seed
    low: float
    high: float
    dtype: torch.dtype  # of the outputs

    @staticmethod
    def plain(tensors: list[Tensor], columns: list[int], coefficients: Tensor, dtype: torch.dtype) -> Combine:
        """Make the struct of a combine without source, constant, noise and clamp."""
        read = Columns(tensors, columns, None, 0)
        return Combine(read, coefficients, None, None, ABSENT, -torch.inf, torch.inf, dtype)

    def without_clamp(self, dtype: torch.dtype) -> Combine:
        return self._replace(low=-torch.inf, high=torch.inf, dtype=dtype)


class CombineMoments(NamedTuple):
    combine: Combine
    written: int  # how many of the outputs are written, from the first
    wide: bool  # arithmetic and moments are float64 for every dtype


class CombineBackward(NamedTuple):
    upstream: Tensor
    call: Combine
    wanted: list[bool]  # for coefficients, constant, noise_scale and each tensor


class CombineMomentsBackward(NamedTuple):
    upstream: tuple[Tensor, Tensor]  # of the outputs, and of the moments
    call: CombineMoments
    wanted: list[bool]  # as above
