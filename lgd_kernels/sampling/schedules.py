"""Map the times of a step to its noise levels.

A schedule defines its time argument, the weights of data and noise at a time, `x_t = signal x0 + noise z`, and how the
unit interval (0 = data, 1 = noise) maps onto its times, so that one sampler works with all schedules.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.runtime.shown import brief, readable, span
from lgd_kernels.sampling import plan_checks


class Schedule:
    """Map times to noise levels: the base class. Subclasses define `signal_noise`, `gap`, `log_snr`, `from_unit` and
    `span`."""

    span: tuple[float, float]  # the valid times, inclusive
    _dtypes = "float32 or float64 (t.float(); half would lose the gap)"

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(signal, noise)` at t, in the dtype of t."""
        raise NotImplementedError

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        """Return `signal_s noise_t - signal_t noise_s`, without the cancellation of that difference."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """Return `2 log(signal / noise)`: +inf at the data, -inf where the signal is 0."""
        raise NotImplementedError

    def from_unit(self, u: Tensor) -> Tensor:
        """Return the schedule's time for u in [0, 1], 0 at the data and 1 at the noise."""
        raise NotImplementedError

    def levels(self, t: float | Tensor, s: float | Tensor) -> Levels:
        """Compute the `levels` argument of `guided_step` for a step from t to s, nearer the data.

        Args:
            t, s: times of one shape, `[B]`, on one device, float32 or float64 (integers for `Discrete`); one of the
                two may be a number. The levels have the dtype of the times; float64 levels keep float64 precision
                through the step's coefficients.

        Differentiable in t and s; the ops take levels as constants. With s = t the step does not change the sample.
        Raises ValueError for s > t, and for times that are NaN, infinite or outside `span`, where they are on the CPU
        (never a device sync); on a GPU s > t gives a negative gap, and NaN in the step.

        >>> import torch, lgd_kernels as lgd
        >>> lgd.RectifiedFlow().levels(torch.tensor([0.75]), torch.tensor([0.5])).gap
        tensor([0.2500])
        """
        t, s = self._pair(t, s)
        return Levels(*self.signal_noise(t), *self.signal_noise(s), self.gap(t, s))

    def _pair(self, t: float | Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return both times as tensors, or raise TypeError or ValueError."""
        name = f"{type(self).__name__}.levels"
        for given, time in (("t", t), ("s", s)):
            if isinstance(time, Tensor):
                checks.dense(name, given, time)
        if isinstance(t, Tensor):
            s = self._like(s, t, name)
        elif isinstance(s, Tensor):
            t = self._like(t, s, name)
        else:
            raise TypeError(f"{name}: `t` and `s` are numbers, expected tensors [B]: torch.full((B,), t)")
        if self._counts(t) and self._counts(s):
            t, s = t.long(), s.long()  # an unsigned type has no -1
        if t.shape != s.shape or t.dtype != s.dtype or t.device != s.device:
            raise ValueError(
                f"{name}: `s` is {list(s.shape)} {s.dtype} on {s.device}, expected that of `t`: "
                f"{list(t.shape)} {t.dtype} on {t.device}"
            )
        if t.dtype not in (torch.float32, torch.float64) and not self._counts(t):
            raise TypeError(f"{name}: `t` has dtype {t.dtype}, expected {self._dtypes}")
        if readable(t):
            if bool((s > t).any()):
                raise ValueError(
                    f"{name}: `s` must be nearer the data than `t`, or equal to it, in every sample; got "
                    f"s = {brief(s)}, t = {brief(t)}"
                )
            (low, high), first, last = self.span, s.min().item(), t.max().item()  # NaN if any of them is
            if not (low <= first and last <= high and last < math.inf):
                span = f"[{low:g}, {high:g}]{'' if high < math.inf else ' and be finite'}"
                raise ValueError(f"{name}: times must lie in {span}; got s = {brief(s)}, t = {brief(t)}")
        return t, s

    def _like(self, time: float | Tensor, other: Tensor, name: str) -> Tensor:
        """Return a time as a tensor: a number becomes a tensor like the other time."""
        if isinstance(time, Tensor):
            return time
        if isinstance(time, bool) or not isinstance(time, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name}: a time is a {type(time).__name__}, expected a tensor [B] or a number")
        symbolic = isinstance(time, (torch.SymInt, torch.SymFloat))
        finite = symbolic or isinstance(time, numbers.Integral) or math.isfinite(time)  # isfinite raises for 10**400
        if not other.is_floating_point() and not (finite and time == int(time)):
            raise TypeError(f"{name}: a time is {time}, expected an integer, as the other time has dtype {other.dtype}")
        like = other if other.is_floating_point() else other.long()
        if finite and not symbolic:
            most = (torch.finfo if like.is_floating_point() else torch.iinfo)(like.dtype).max
            if abs(time) > most:
                raise ValueError(f"{name}: a time is {time}, expected a number that {like.dtype} holds")
        return torch.full_like(like, time)

    def _counts(self, t: Tensor) -> bool:
        """Return whether t counts steps, as the integer times of `Discrete` do."""
        return False


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Mix data and noise linearly: signal 1 - t, noise t. The time is t in [0, 1].

    >>> import torch, lgd_kernels as lgd
    >>> lgd.RectifiedFlow().signal_noise(torch.tensor([0.25]))
    (tensor([0.7500]), tensor([0.2500]))
    """

    span = (0.0, 1.0)

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        return t - s

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def from_unit(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class VPCosine(Schedule):
    """Preserve the variance with signal cos(pi t / 2) and noise sin(pi t / 2). The time is t in [0, 1].

    >>> import torch, lgd_kernels as lgd
    >>> lgd.VPCosine().signal_noise(torch.tensor([1.0]))
    (tensor([0.]), tensor([1.]))
    """

    span = (0.0, 1.0)

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _sin_quarter(1 - t), _sin_quarter(t)  # cos(pi/2) is negative in float32

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        return _sin_quarter(t - s)

    def log_snr(self, t: Tensor) -> Tensor:
        signal, noise = self.signal_noise(t)
        return 2 * (torch.log(signal) - torch.log(noise))

    def from_unit(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Preserve the variance in continuous time t in [0, 1]: signal exp(-I(t) / 2), I the integral of beta from 0 to t.

    beta rises linearly from `beta_min` to `beta_max`, as in DDPM; with `scaled` the square root of beta does, as in
    Stable Diffusion. Their signals at t = 1 are not 0, but 0.0066 and 0.069. `Discrete` has the exact tables.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.VPLinear.stable_diffusion().signal_noise(torch.ones(1))[0]
    tensor([0.0690])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    scaled: bool = False

    span = (0.0, 1.0)

    def __post_init__(self) -> None:
        plan_checks.positive("VPLinear", beta_min=self.beta_min, beta_max=self.beta_max)
        if self.beta_min > self.beta_max:
            raise ValueError(
                f"VPLinear: `beta_min` is {self.beta_min:g}, expected at most `beta_max`, {self.beta_max:g}"
            )
        if not isinstance(self.scaled, bool):
            raise TypeError(f"VPLinear: `scaled` is {self.scaled!r}, expected True or False")

    @classmethod
    def ddpm(cls) -> VPLinear:
        """Make the continuous limit of 1000 steps of beta 1e-4 to 0.02."""
        return cls(0.1, 20.0)

    @classmethod
    def stable_diffusion(cls) -> VPLinear:
        """Make the continuous limit of 1000 steps of beta 0.00085 to 0.012, scaled linear."""
        return cls(0.85, 12.0, scaled=True)

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._levels(t.double())
        return signal.to(t.dtype), noise.to(t.dtype)

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        # (signal_s^2 noise_t^2 - signal_t^2 noise_s^2) / (sum), whose numerator is signal_s^2 - signal_t^2
        (signal_t, noise_t), (signal_s, noise_s) = self._levels(t.double()), self._levels(s.double())
        risen = -torch.expm1(-self._between(s.double(), t.double()))
        total = signal_s * noise_t + signal_t * noise_s
        return (signal_s**2 * risen / torch.where(total == 0, 1, total)).to(t.dtype)  # 0/0 at s = t = 0

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._between(torch.zeros_like(t), t)))

    def from_unit(self, u: Tensor) -> Tensor:
        return u

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._between(torch.zeros_like(t), t)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def _between(self, s: Tensor, t: Tensor) -> Tensor:
        """Compute the integral of beta from s to t, with t - s as a factor."""
        if not self.scaled:
            return (t - s) * (self.beta_min + (s + t) * ((self.beta_max - self.beta_min) / 2))
        low, rise = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)
        return (t - s) * (low**2 + low * rise * (s + t) + rise**2 / 3 * (s * s + s * t + t * t))


@dataclass(frozen=True)
class EDM(Schedule):
    """Let the variance explode: signal 1, noise sigma (Karras et al. 2022). The time argument **is sigma**.

    `from_unit` spaces times as they do, `(sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`, with
    exactly 0 at u = 0.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.EDM().levels(t=torch.tensor([80.0]), s=torch.tensor([20.0])).gap
    tensor([60.])
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    span = (0.0, math.inf)

    def __post_init__(self) -> None:
        plan_checks.positive("EDM", sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"EDM: `sigma_min` is {self.sigma_min:g}, expected less than `sigma_max`, {self.sigma_max:g}"
            )
        if math.log(self.sigma_max) > 88 * self.rho:
            raise ValueError(
                f"EDM: `rho` is {self.rho:g}, too small: sigma_max^(1/rho) overflows float32; it is often 7"
            )

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        return t - s

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(t)

    def from_unit(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.where(u > 0, (low + u * (high - low)) ** self.rho, torch.zeros_like(u))


@dataclass(frozen=True, eq=False)
class Discrete(Schedule):
    """Read levels from a model's table `alphas_cumprod` `[N]`. The time is an integer index; **-1 is the data**.

    signal sqrt(alphas_cumprod[t]), noise sqrt(1 - alphas_cumprod[t]), computed in float64 and returned in `dtype`.

    >>> import torch, lgd_kernels as lgd
    >>> table = lgd.Discrete(torch.tensor([0.9, 0.5, 0.1]))
    >>> table.levels(torch.tensor([2]), torch.tensor([-1])).noise_s
    tensor([0.])
    """

    alphas_cumprod: Tensor
    dtype: torch.dtype = torch.float32
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    _dtypes = "integers (t.long()); -1 is the data"

    def __repr__(self) -> str:
        alphas, dtype = self.alphas_cumprod, str(self.dtype).removeprefix("torch.")
        return f"Discrete({alphas.numel()} steps, alphas_cumprod {span(alphas)}, {dtype})"

    def __post_init__(self) -> None:
        alphas = self.alphas_cumprod
        if not isinstance(alphas, Tensor):
            raise TypeError(
                f"Discrete: `alphas_cumprod` is a {type(alphas).__name__}, expected a tensor [N]; torch.as_tensor(...)"
            )
        checks.dense("Discrete", "alphas_cumprod", alphas)
        if not alphas.is_floating_point():
            raise TypeError(f"Discrete: `alphas_cumprod` has dtype {alphas.dtype}, expected floating point")
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Discrete: `dtype` is {self.dtype}, expected torch.float32 or torch.float64")
        if alphas.ndim != 1 or not alphas.numel():
            raise ValueError(f"Discrete: `alphas_cumprod` has shape {list(alphas.shape)}, expected [N]")
        if alphas.device.type == "cpu":
            if not bool(((alphas >= 0) & (alphas <= 1)).all()):
                raise ValueError(
                    f"Discrete: `alphas_cumprod` reaches from {alphas.min():g} to {alphas.max():g}, expected values in "
                    "[0, 1] (a table of DDPM has 20 steps or more)"
                )
            if not bool((alphas.diff() < 0).all()):
                raise ValueError("Discrete: `alphas_cumprod` must decrease: index 0 is next to the data")

    @classmethod
    def ddpm(cls, steps: int = 1000, **options: Any) -> Discrete:
        """Make the table of DDPM: beta linear from 1e-4 to 0.02 (at 1000 steps)."""
        checks.count("Discrete.ddpm", "steps", steps)
        scale = 1000 / steps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64, device="cpu")
        return cls(torch.cumprod(1 - betas, 0), **options)

    @classmethod
    def stable_diffusion(cls, steps: int = 1000, **options: Any) -> Discrete:
        """Make the table of Stable Diffusion: sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (at 1000 steps)."""
        checks.count("Discrete.stable_diffusion", "steps", steps)
        scale = 1000 / steps
        low, high = (8.5e-4 * scale) ** 0.5, (0.012 * scale) ** 0.5
        betas = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu") ** 2
        return cls(torch.cumprod(1 - betas, 0), **options)

    @property
    def span(self) -> tuple[float, float]:  # type: ignore[override]  # the other schedules have a constant
        return (-1, self.alphas_cumprod.numel() - 1)

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._levels(t)
        return signal.to(self.dtype), noise.to(self.dtype)

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        (signal_t, noise_t), (signal_s, noise_s) = self._levels(t), self._levels(s)
        return (signal_s * noise_t - signal_t * noise_s).to(self.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        signal, noise = self._levels(t)
        return (2 * (torch.log(signal) - torch.log(noise))).to(self.dtype)

    def from_unit(self, u: Tensor) -> Tensor:
        return torch.round(u * self.alphas_cumprod.numel()).long() - 1

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Look up `(signal, noise)` at each index, in float64."""
        if not self._counts(t):
            raise TypeError(f"Discrete: `t` has dtype {t.dtype}, expected {self._dtypes}")
        if t.device not in self._tables:
            alphas = torch.cat((torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod.cpu().double()))
            self._tables[t.device] = (alphas.sqrt().to(t.device), (1 - alphas).sqrt().to(t.device))
        signal, noise = self._tables[t.device]
        index = t.long() + 1
        inside = (index >= 0) & (index < signal.numel())
        index = torch.where(inside, index, 0)
        nan = torch.full((), torch.nan, dtype=torch.float64, device=t.device)
        return torch.where(inside, signal[index], nan), torch.where(inside, noise[index], nan)

    def _counts(self, t: Tensor) -> bool:
        return not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool


def _sin_quarter(t: Tensor) -> Tensor:
    """Compute sin(pi t / 2). The factor is a literal: torch 2.11 makes math.pi an input of a graph with dynamic shapes,
    and then traces the graph twice."""
    return torch.sin(1.5707963267948966 * t)
