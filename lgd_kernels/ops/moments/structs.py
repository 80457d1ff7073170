"""Arguments of the op, in the order of the struct in csrc/moments/moments.h."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lgd_kernels.runtime.columns import Columns


class Moments(NamedTuple):
    read: Columns
    products: list[int]
    centred: bool  # of columns less their means; products are then `every_product`, and the sums become the means


class MomentsBackward(NamedTuple):
    upstream: Tensor
    call: Moments
    wanted: list[bool]  # for each tensor
