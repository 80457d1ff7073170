"""The functions `guided_energy` and `guided_energy_curve`: checks of their arguments, then the op."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy import op
from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.ops.guided_energy.structs import EnergyCall, EnergyOptions, GuidedEnergy
from lgd_kernels.ops.guided_energy.targets import Expected, Renoise
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup, Prediction


def guided_energy(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    *,
    prediction: Prediction = "x0",
    churn: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    beta: float = 1.75,
    lam: float = 1.0,
    unbiased: bool = True,
    impl: Impl | None = None,
) -> Tensor:
    """Guide m particles of each item from t to s and measure their energy against k targets, in one pass over memory.

        x_s^j = guided_step(x^j, cond^j, uncond^j, omega, levels, ...)                      j = 1 .. m
        L     = 1/(m k) sum_jk ||x_s^j - y^k||^beta  -  lam/2 * 1/(m (m - 1)) sum_{j != l} ||x_s^j - x_s^l||^beta

    No x_s is stored, and the same pass gives dL/domega exactly. In expectation L is half the squared energy distance
    between the laws of x_s and y (lam = 1), but for the target-target term, which does not depend on omega: L may be
    negative, and only differences mean something. **Targets and particles must come from independent noise**: with one
    shared noise a target depends on its particle and the loss degenerates.

    Args:
        x: particles at t, `[B, m, ...]`. Warns if axis 1 may not be the particles: m > 352, or x looks like images of
            3, 4 or 16 channels.
        cond, uncond: predictions with and without the condition, shaped like x. All tensors of data are float32,
            bfloat16, float16 or float64, mixed as you like.
        omega: a float; a tensor `[B]`; or `OmegaTable.at(c, s, t)`: one for each item. 0 is conditional only.
        levels: `schedule.levels(t, s)`, `[B]` each.
        target: samples of the law that x_s should have: a tensor `[B, k, ...]`; `Renoise(x0, k, seed)`, for
            `signal_s x0 + noise_s z` made in the kernel; or, for beta = 2 and lam = 0, `Expected(x0)`, for the mean
            over z in closed form.
        prediction, churn, noise, seed: of the step, as in `guided_step`; noise is shaped like x. With a seed,
            `philox_normal((B * m, ...), seed, stream=1)` is the noise; with a seed for each item (`[B]`) it is
            `philox_normal((m, ...), seed[b], stream=1)`, whatever the item's place.
        first_sample: index of the first item in the whole batch, where that is split over processes.
        beta: power of the distance, in (0, 2].
        lam: weight of the repulsion between particles, in [0, 1].
        unbiased: mean over the m (m - 1) pairs of different particles; False divides by m^2 instead.
        impl: as in `guided_step`.

    Returns L `[B]`, float32 (float64 where a tensor is). Differences are taken before they are squared, sums of blocks
    are float64: the error is about 1e-7 of the sum of the terms as long as neighbours are not closer than rounding.

    Differentiable in omega, at no further pass, and in x, cond, uncond, noise and the target's tensor (x0) with one
    more; any number of times. Not differentiable in levels and churn. Two points that coincide have slope 0. The same
    inputs give the same bits, on any thread count. Raises TypeError or ValueError, naming the argument, before anything
    is written.

    Source: arXiv 2510.00815, Eq. 9 and 17-22; beta = 1.75, lam = 1, m = 4 and churn = 1 in training are the paper's.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(torch.tensor([1.0]), torch.tensor([0.0]))  # x_s is the guided prediction
    >>> cond, uncond = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [2.0]]])  # m = 2 particles
    >>> target = torch.tensor([[[2.0]]])
    >>> lgd.guided_energy(cond, cond, uncond, 0.0, levels, target, beta=1.0)  # (1 + 1) / 2 - 1/2 * 2
    tensor([0.])
    """
    a = _checked(
        "guided_energy",
        (x, cond, uncond),
        omega,
        levels,
        target,
        prediction=prediction,
        churn=churn,
        noise=noise,
        seed=seed,
        first_sample=first_sample,
    )
    checks.power("guided_energy", beta, lam, unbiased, x.shape[1])
    if isinstance(target, Expected) and not (beta == 2 and lam == 0):
        raise ValueError(
            f"guided_energy: `target` is Expected with beta={beta} and lam={lam}, but only ||.||^2 without repulsion "
            "can be integrated out; pass beta=2, lam=0, or Renoise(x0, particles, seed)"
        )
    return op.guided_energy(EnergyCall(a, EnergyOptions(float(beta), float(lam), unbiased)), impl)


def guided_energy_curve(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    levels: Levels,
    target: Tensor | Renoise,
    *,
    prediction: Prediction = "x0",
    churn: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    impl: Impl | None = None,
) -> EnergyCurve:
    """Compute `guided_energy` as a function of omega, for every omega, beta and lam, from one pass over the data.

    A particle moves on a line as omega changes, `x_s^j = base_j + omega G_j`, so each squared distance is a quadratic
    in omega. The pass leaves their coefficients, `B (2 m k + m + 3 m (m - 1) / 2)` numbers; losses, slopes and minima
    follow from these without the data: see `EnergyCurve.loss`, `.grad`, `.hessian` and `.minimize`.

    Args: those of `guided_energy`, but for omega, beta, lam and unbiased, which come later.

    Nothing but omega is differentiable afterwards. Raises as `guided_energy` does.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(torch.tensor([1.0]), torch.tensor([0.0]))
    >>> cond, uncond = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [2.0]]])
    >>> curve = lgd.guided_energy_curve(cond, cond, uncond, levels, torch.tensor([[[2.5]]]))
    >>> curve.loss(torch.tensor([0.0]), beta=2.0, lam=0.0), curve.minimize(beta=2.0, lam=0.0)
    (tensor([1.2500], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    a = _checked(
        "guided_energy_curve",
        (x, cond, uncond),
        0.0,
        levels,
        target,
        prediction=prediction,
        churn=churn,
        noise=noise,
        seed=seed,
        first_sample=first_sample,
    )
    if isinstance(target, Expected):
        raise ValueError(
            "guided_energy_curve: `target` is Expected, which fixes beta and lam; pass Renoise(x0, particles, seed)"
        )
    return EnergyCurve(op.statistics(a, impl))


def _checked(
    name: str,
    data: tuple[Tensor, Tensor, Tensor],
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    *,
    prediction: str,
    churn: float | Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
) -> GuidedEnergy:
    """Return the arguments as a struct. Raise TypeError or ValueError for the first that is invalid."""
    x, cond, uncond = data
    checks.samples(name, x=x, cond=cond, uncond=uncond, noise=noise)
    checks.particles(name, "x", x)
    checks.omega(name, omega, "x", x)
    checks.levels(name, levels, prediction, "x", x)
    stated, churn = churn, 0.0 if churn is None else churn
    checks.churn(name, churn, "x", x)
    checks.noise(name, churn, noise, seed)
    if seed is not None:
        checks.seed(name, seed, first_sample, x.shape[0], x)
    elif type(first_sample) is not int or first_sample:
        checks.first_sample(name, first_sample)
    if stated is None:
        checks.unused(name, noise, seed)
    if isinstance(target, (Renoise, Expected)):
        checks.like_item(name, "target.x0", target.x0, "x", x, x.shape[2:])
    if isinstance(target, Renoise):
        checks.not_vmapped(name, "target.seed", "the targets")
        checks.count(name, "target.particles", target.particles)
        checks.seed(name, target.seed, first_sample, x.shape[0], x, "target.seed")
    elif not isinstance(target, Expected):
        checks.particles(name, "target", target)
        checks.like_item(name, "target", target, "x", x, (target.shape[1], *x.shape[2:]))
    if x.shape[1] > op.MOST_ROWS or (x.ndim == 4 and x.shape[1] in (3, 4, 16) and min(x.shape[2:]) >= 16):
        _doubt(name, x)
    return GuidedEnergy.of(
        x,
        cond,
        uncond,
        omega,
        levels,
        target,
        prediction=prediction,
        churn=churn,
        noise=noise,
        seed=seed,
        first_sample=first_sample,
    )


def _doubt(name: str, x: Tensor) -> None:
    """Warn about a shape whose second axis may not be particles."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{name}: `x` has shape {list(x.shape)}, which is read as [B, m, ...] with m = {x.shape[1]} particles for "
            f"each item; if that axis holds data, such as image channels, pass x.unsqueeze(1) for one particle. "
            "(Images of one channel are [B, m, 1, H, W].)",
            stacklevel=4,
        )
