"""Compute a step with given A, B and V, x_s = A x + B g + V z, and its log density, from combines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.ops.combine.api import Combined, combine
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.columns import Column
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup, StepCoefficients, omega_at
from lgd_kernels.runtime.shown import brief, readable

Weight = float | Tensor | OmegaLookup | None


def check_weight(op: str, uncond: Tensor | None, omega: Weight, name: str, like: Tensor) -> None:
    """Check that omega is given with `uncond`, and only then."""
    if uncond is not None and omega is None:
        raise TypeError(f"{op}: `omega` is missing, expected a float or a tensor [B] to guide with; omega=0.0 does not")
    if uncond is None and omega is not None:
        raise ValueError(f"{op}: `omega` was given without `uncond`, expected both or neither")
    if omega is not None:
        checks.omega(op, omega, name, like)


def given(op: str, coefficients: Sequence[float | Tensor], x: Tensor) -> StepCoefficients:
    """Check (A, B, V) and return them in float64, each `[B]`."""
    if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
        what = f"{len(coefficients)} values" if isinstance(coefficients, (tuple, list)) else type(coefficients).__name__
        raise TypeError(f"{op}: `coefficients` is {what}, expected (A, B, V), each a float or a tensor [B]")
    found = []
    for n, one in enumerate(coefficients):
        checks.per_sample(op, f"coefficients[{n}]", one, "x", x)
        wide = one.double() if isinstance(one, Tensor) else x.new_ones(x.shape[0], dtype=torch.float64) * one
        found.append(wide)
    if readable(found[2]) and not checks.smallest(found[2].detach()) >= 0:
        raise ValueError(
            f"{op}: `coefficients[2]` is {brief(coefficients[2])}, expected 0 or more: the standard deviation"
        )
    return StepCoefficients(*found)


def draw(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    omega: Weight,
    coefficients: StepCoefficients,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    impl: Impl | None,
) -> Tensor:
    """Draw `A x + B g + V z` as `guided_step` does, in the dtype of x and without a gradient: a combine."""
    with torch.no_grad():
        tensors, factors, columns = _mean(x, cond, uncond, omega, coefficients)
        if noise is not None:
            columns, factors = [*columns, len(tensors)], [*factors, coefficients.noise]
            tensors = [*tensors, noise]
        scale = None if seed is None else coefficients.noise
        found = combine(
            tensors,
            torch.stack(factors, 1),
            columns=columns,
            noise_scale=scale,
            seed=seed,
            first_sample=first_sample,
            impl=impl,
        )
    assert isinstance(found, Tensor)
    return found.detach()  # also from forward mode, which no_grad does not turn off


def residual(
    x_s: Tensor,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    omega: Weight,
    coefficients: StepCoefficients,
    impl: Impl | None,
) -> Tensor:
    """Compute `||x_s - A x - B g||^2` of each sample in float64: a combine that writes nothing."""
    tensors, factors, columns = _mean(x, cond, uncond, omega, coefficients)
    moved: list[Column] = [0, *((one[0] + 1, one[1] + 1) if isinstance(one, tuple) else one + 1 for one in columns)]
    signed = torch.stack([torch.ones_like(factors[0]), *(-one for one in factors)], 1)
    found = combine([x_s, *tensors], signed, columns=moved, moments=True, written=0, wide=True, impl=impl)
    assert isinstance(found, Combined)
    return found.dots[:, 0, 0]


def mean(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    omega: Weight,
    coefficients: StepCoefficients,
    impl: Impl | None,
) -> Tensor:
    """Compute `A x + B g` in float32, or float64 if x is: a combine, with gradients."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tensors, factors, columns = _mean(wide, cond, uncond, omega, coefficients)
    found = combine(tensors, torch.stack(factors, 1), columns=columns, impl=impl)
    assert isinstance(found, Tensor)
    return found


def log_normal(squares: Tensor, scale: Tensor, count: int, drawn: bool) -> Tensor:
    """Compute log p of a normal from `residual`; where `scale` is 0, 0 for an x_s that was drawn, NaN for another."""
    still = scale == 0 if drawn else torch.zeros_like(scale, dtype=torch.bool)
    variance = torch.where(scale > 0, scale * scale, torch.where(still, 1.0, torch.nan))
    found = -squares / (2 * variance) - count / 2 * torch.log(2 * torch.pi * variance)
    return torch.where(still, 0.0, found)


def _mean(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    omega: Weight,
    coefficients: StepCoefficients,
) -> tuple[list[Tensor], list[Tensor], list[Column]]:
    """Return tensors, factors `[B]` and columns of `A x + B cond + B omega (cond - uncond)`."""
    a, b, _ = coefficients
    if uncond is None or omega is None:
        return [x, cond], [a, b], [0, 1]
    return [x, cond, uncond], [a, b, b * omega_at(omega, a)], [0, 1, (1, 2)]
