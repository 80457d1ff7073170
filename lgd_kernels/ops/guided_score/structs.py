"""Arguments of the op, in the order of the structs in csrc/guided_score/guided_score.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.arguments import Omega


class GuidedScore(NamedTuple):
    cond: Tensor
    uncond: Tensor
    omega: Omega


class GuidedScoreBackward(NamedTuple):
    upstream: Tensor
    cond: Tensor | None  # cond and uncond are absent if omega gets no gradient
    uncond: Tensor | None
    omega: Omega
    cond_dtype: torch.dtype
    uncond_dtype: torch.dtype
    wanted: list[bool]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return self.upstream.dtype, self.cond_dtype, self.uncond_dtype
