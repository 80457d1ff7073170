"""Arguments of the op, in the order of the structs in csrc/guided_energy/guided_energy.h."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lgd_kernels.ops.guided_energy.targets import Expected, Renoise
from lgd_kernels.runtime.arguments import ABSENT, Number, Omega, Seed, StepScalars
from lgd_kernels.runtime.levels import Levels, OmegaLookup


class Target(NamedTuple):
    data: Tensor  # [B, k, ...], or x0 [B, ...]
    kind: str  # "tensor", or what is made from x0: "renoise" or "expected"
    k: int
    seed: Seed

    @staticmethod
    def of(target: Tensor | Renoise | Expected, first_sample: int) -> Target:
        if isinstance(target, Renoise):
            return Target(target.x0, "renoise", target.particles, Seed.of(target.seed, first_sample))
        if isinstance(target, Expected):
            return Target(target.x0, "expected", 1, ABSENT)
        return Target(target, "tensor", target.shape[1], ABSENT)


class GuidedEnergy(NamedTuple):
    x: Tensor
    cond: Tensor
    uncond: Tensor
    noise: Tensor | None
    scalars: StepScalars
    seed: Seed
    target: Target

    @staticmethod
    def of(
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        omega: float | Tensor | OmegaLookup,
        levels: Levels,
        target: Tensor | Renoise | Expected,
        *,
        prediction: str = "x0",
        churn: float | Tensor = 0.0,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
    ) -> GuidedEnergy:
        """Make the struct from what users pass. Noise that would be multiplied by 0 is left out."""
        if isinstance(churn, (int, float)) and churn == 0:
            noise, seed = noise if noise is not None and noise.requires_grad else None, None
        scalars = StepScalars(Omega.of(omega, x), list(levels), prediction, Number.of(churn, x))
        return GuidedEnergy(
            x, cond, uncond, noise, scalars, Seed.of(seed, first_sample), Target.of(target, first_sample)
        )

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        return self.x, self.cond, self.uncond, self.noise, self.target.data

    def without_data(self) -> GuidedEnergy:
        """Return the struct with omega alone: its gradient needs no more."""
        absent: Any = None  # no code path reads these fields
        scalars = StepScalars(self.scalars.omega, [], self.scalars.prediction, Number(None, 0.0))
        target = Target(absent, self.target.kind, self.target.k, ABSENT)
        return GuidedEnergy(absent, absent, absent, None, scalars, ABSENT, target)


class EnergyOptions(NamedTuple):
    beta: float
    lam: float
    unbiased: bool


class EnergyCall(NamedTuple):
    """All that the operator takes."""

    forward: GuidedEnergy
    options: EnergyOptions


class GuidedEnergyBackward(NamedTuple):
    forward: GuidedEnergy
    to_targets: Tensor  # weights of the pairs, [B, m, k]
    to_particles: Tensor  # [B, m (m - 1) / 2]
    wanted: list[bool]  # of x, cond, uncond, noise and the target's tensor


class SavedEnergy(NamedTuple):
    """All that the gradients are made of."""

    upstream: Tensor
    slope: Tensor
    statistics: Tensor
    m: int
    forward: GuidedEnergy  # without data if omega alone gets a gradient
    options: EnergyOptions
    wanted: list[bool]  # of x, cond, uncond, noise, omega and the target's tensor

    @property
    def wanted_data(self) -> list[bool]:
        return [*self.wanted[:4], self.wanted[5]]


class EnergyDerivative(NamedTuple):
    """Of the loss in omega, of that order, from statistics (csrc/guided_energy/energy_curve.h)."""

    m: int
    k: int
    options: EnergyOptions
    order: int
