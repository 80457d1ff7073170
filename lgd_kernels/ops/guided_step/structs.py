"""Arguments of the op, in the order of the structs in csrc/guided_step/guided_step.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.arguments import Number, Omega, Seed, StepScalars
from lgd_kernels.runtime.levels import Levels, OmegaLookup


class GuidedStep(NamedTuple):
    x: Tensor
    cond: Tensor
    uncond: Tensor
    noise: Tensor | None
    scalars: StepScalars
    seed: Seed

    @staticmethod
    def of(
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        omega: float | Tensor | OmegaLookup,
        levels: Levels,
        *,
        prediction: str,
        churn: float | Tensor,
        noise: Tensor | None,
        seed: int | Tensor | None,
        first_sample: int,
    ) -> GuidedStep:
        """Make the struct from what users pass. Noise that would be multiplied by 0 is left out."""
        if isinstance(churn, (int, float)) and churn == 0:
            noise, seed = noise if noise is not None and noise.requires_grad else None, None
        scalars = StepScalars(Omega.of(omega, x), list(levels), prediction, Number.of(churn, x))
        return GuidedStep(x, cond, uncond, noise, scalars, Seed.of(seed, first_sample))


class GuidedStepBackward(NamedTuple):
    upstream: Tensor
    cond: Tensor | None  # cond and uncond are absent if omega gets no gradient
    uncond: Tensor | None
    scalars: StepScalars
    cond_dtype: torch.dtype
    uncond_dtype: torch.dtype
    noise_dtype: torch.dtype
    wanted: list[bool]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.upstream.dtype, self.cond_dtype, self.uncond_dtype, self.noise_dtype
