"""Solvers as coefficients: a whole run is a table, made once, and a step is one combine.

Every function here takes a schedule and the times of a run, `[N + 1]` from the noise to the data, and returns a
`StepPlan`: for each call of the network, how the next sample, and what the solver has to remember, follow from the
sample, the guided prediction and what it remembered. Coefficients are computed in float64 where the times are (integers
of `Discrete` follow its dtype: `Discrete(..., dtype=torch.float64)`). Times `[N + 1, B]` give every sample of a batch
a run of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lgd_kernels import checks, step_rows
from lgd_kernels.levels import Levels, OmegaLookup, arithmetic_dtype, omega_at, step_coefficients, x0_coefficients
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.ops.guided_score.api import guided_score
from lgd_kernels.rules import Rule
from lgd_kernels.schedules import EDM, Schedule


@dataclass(frozen=True, eq=False)
class StepPlan:
    """A run of N calls of the network. After call i, with g the guided prediction at `times[i]` and z fresh noise,

        x    <- table[i, 0] . (x, g, kept, z)
        kept <- table[i, 1] . (x, g, kept, z)      only where the solver remembers something: P = 2, else P = 1

    `times [N, B]` with a `table [N, B, P, 4]` are a run of its own for each sample. A table of five factors has one
    more, of what was kept a call earlier, which is handed on and not written again.

    `start` is the noise to add to the first sample, for samplers that add noise before they call the network.

    >>> import torch, lgd_kernels as lgd
    >>> plan = one_step(lgd.RectifiedFlow(), torch.tensor([1.0, 0.5, 0.0]))
    >>> x = torch.full((1, 1), 2.0)
    >>> for i, t in enumerate(plan.times):
    ...     x, kept = plan.step(i, x, cond=torch.ones(1, 1))
    >>> x
    tensor([[1.]])
    """

    times: Tensor  # [N] or [N, B], of each call of the network
    table: Tensor  # [N, P, 4] or [N, B, P, 4]: factors of x, g, kept and z; 5: and of what was kept before
    start: float | Tensor = 0.0  # a number, or [B]

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def remembers(self) -> bool:
        return self.table.shape[-2] == 2

    @property
    def deep(self) -> bool:
        """Whether what was kept a call earlier is asked for too: `kept` is then a tuple, the newest first."""
        return self.table.shape[-1] == 5

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StepPlan:
        """Times and table there; the table in `dtype`. Once, before the loop: then a step copies nothing."""
        start = self.start.to(device) if isinstance(self.start, Tensor) else self.start
        table = self.table.to(device, dtype or self.table.dtype)
        return replace(self, times=self.times.to(device), table=table, start=start)

    def step(
        self,
        index: int | Tensor,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        omega: float | Tensor | OmegaLookup = 0.0,
        kept: Tensor | tuple[Tensor, ...] | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
        rule: Rule | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """One step: `(x, kept)` after call `index` of the network. One pass, without a rule that takes moments.

        Args:
            index: of the call; an int; or an int64 tensor on the device of the data, which nothing waits for: 0-dim, or
                `[B]`, where every sample is at a call of its own.
            x, cond, uncond, omega, rule: as in `guided_step`; without uncond, cond is the guided prediction.
            kept: what the step before returned; None in the first. (With `index` a tensor: zeros like x, there; a tuple
                of two where the plan is `deep`.)
            noise, seed, first_sample: as in `guided_step`, for solvers that draw. `step` draws z from the seed alone:
                give another one to each step.

        Differentiable in x, cond, uncond, omega, kept and noise. Raises TypeError or ValueError as `combine` does.
        """

        if rule is not None:
            cond, uncond = guided_score(cond, cond if uncond is None else uncond, omega, rule=rule, impl=impl), None
        history = () if kept is None else kept if isinstance(kept, tuple) else (kept,)
        if len(history) > 1 and len(history) > 1 + self.deep:
            most = "two, the newest first" if self.deep else "one: this plan is not `deep`"
            raise ValueError(f"StepPlan.step: `kept` is a tuple of {len(history)}, expected at most {most}")
        short = seed is None and isinstance(index, int)
        if short and step_rows.fits(self.table, x, omega, cond, uncond, noise, *history):
            found = step_rows.step(self, index, x, cond, uncond, omega, history, noise, impl)
            return self._and_kept(found.unbind(0), history)
        tensors = [tensor for tensor in (x, cond, uncond, *history) if tensor is not None]
        wide, batch = arithmetic_dtype(*tensors, noise), x.shape[0]
        table = self.table.to(x.device, wide)
        row = self._row(table, index, batch)  # [B, P, 4]
        self._check(index, len(history), noise, seed)
        factors, columns = [row[..., 0], row[..., 1]], [0, 1]
        if uncond is not None:
            checks.omega("StepPlan.step", omega, "x", x)
            w = omega_at(omega, x.new_empty(0, dtype=wide))
            factors.append(row[..., 1] * (w[:, None] if w.ndim else w))
            columns.append((1, 2))
        for place in range(len(history)):
            factors.append(row[..., (2, 4)[place]])
            columns.append(len(tensors) - len(history) + place)
        drawn = {}
        if noise is not None:
            factors.append(row[..., 3])
            columns.append(len(tensors))
            tensors.append(noise)
        elif seed is not None:
            drawn = {"noise_scale": row[..., 3], "seed": seed, "first_sample": first_sample}
        found = combine(tensors, torch.stack(factors, -1), columns=columns, impl=impl, **drawn)
        return self._and_kept(found, history)

    def _and_kept(self, found: tuple[Tensor, ...], history: tuple[Tensor, ...]):
        """The next sample, and what the next step asks for."""
        if not self.remembers:
            return found[0], None
        return found if not self.deep else (found[0], (found[1], *history[:1]))

    def _row(self, table: Tensor, index: int | Tensor, batch: int) -> Tensor:
        if table.ndim == 4 and table.shape[1] != batch:
            raise ValueError(f"StepPlan.step: `x` has {batch} samples, expected {table.shape[1]}, as the plan's times")
        if table.ndim == 4 and isinstance(index, Tensor):
            return table[index, torch.arange(batch, device=table.device)]
        row = table.index_select(0, index.reshape(-1)) if isinstance(index, Tensor) else table[index]
        row = row if row.ndim == 3 else row.unsqueeze(0)
        return row.expand(batch, *row.shape[1:])

    def _check(self, index, depth, noise, seed) -> None:
        """Where the table can be looked at for nothing, that this row has what it asks for."""
        if noise is not None and seed is not None:
            raise ValueError("StepPlan.step: `noise` and `seed` were both given, expected one of them")
        if isinstance(index, Tensor) or self.table.device.type != "cpu" or torch.compiler.is_compiling():
            return
        asked = self.table[index, ..., 0, :].reshape(-1, self.table.shape[-1]).ne(0).any(0)
        _, _, remembered, drawn, *before = asked.tolist()
        if (remembered and depth == 0) or (any(before) and depth < 2):
            said = "None" if depth == 0 else "what one step returned"
            raise ValueError(f"StepPlan.step: `kept` is {said} in step {index}, expected what the step before returned")
        if drawn and noise is None and seed is None:
            raise ValueError(f"StepPlan.step: step {index} adds noise but there is none; pass seed=... or noise=...")


def one_step(
    schedule: Schedule,
    times: Tensor,
    *,
    to: Tensor | None = None,
    prediction: str = "x0",
    churn: float | Tensor = 0.0,
) -> StepPlan:
    """The step of `guided_step`, at every time: DDIM (churn 0), DDPM (churn 1), Euler for rectified flow and for EDM,
    ancestral Euler for EDM (churn 1); any eta with `churn_from_eta`, churn being `[N]`, or `[N, B]` as the times.

    With `to` `[N]`, step i goes from `times[i]` to `to[i]`, and times are `[N]` too.

    Source: arXiv 2510.00815, Eq. 2; 2010.02502.
    """
    at = times[:-1] if to is None else times
    a, b, v = step_coefficients(schedule.levels(at, times[1:] if to is None else to), prediction, churn)
    return StepPlan(at, _table(a, b, z=v))


def consistency(schedule: Schedule, times: Tensor, *, prediction: str = "x0") -> StepPlan:
    """To the data and back: `x_s = signal_s x0(x, g) + noise_s z`, the step in which nothing of x stays (h = 0), as
    consistency models and LCM take it. Source: arXiv 2303.01469, Algorithm 1; 2310.04378."""
    levels = _levels(schedule, times)
    alpha, beta = x0_coefficients(levels, prediction)
    return StepPlan(times[:-1], _table(levels.signal_s * alpha, levels.signal_s * beta, z=levels.noise_s))


def edm_euler(sigmas: Tensor, *, prediction: str = "x0", after: bool = True, **churning) -> StepPlan:
    """Euler with added noise, for sigmas `[N + 1]` that end at 0: up to sigma_hat = sigma (1 + gamma), then down.

    Args:
        after: whether the network is called after the noise was added, at sigma_hat, as in the paper; or before, at
            sigma, on the sample without it, as diffusers does. (Its v it then reads at sigma, not at sigma_hat, where
            ours belongs: with churn, only eps agrees.)
        churning: s_churn, s_tmin, s_tmax, s_noise: gamma = min(s_churn / N, sqrt(2) - 1) for s_tmin <= sigma <= s_tmax.

    Source: Karras et al., arXiv 2206.00364, Algorithm 2, without its correction.
    """
    raised, added = _raised(sigmas, **churning)
    a, b, _ = step_coefficients(_levels(EDM(), torch.cat((raised, sigmas[-1:])), sigmas[1:]), prediction, 0.0)
    if not after:
        return StepPlan(sigmas[:-1], _table(a, b, z=a * added))
    return StepPlan(raised, _table(a, b, z=_late(added)), _start(added))


def edm_heun(sigmas: Tensor, *, prediction: str = "x0", **churning) -> StepPlan:
    """Heun's method, for sigmas `[N + 1]`: 2 N - 1 calls where they end at 0, else 2 N. `churning` as in `edm_euler`.

        d = (x - x0(x)) / sigma_hat;   x' = x + (s - sigma_hat) d;   x <- x + (s - sigma_hat) (d + d') / 2

    After the first call of a step, kept is x + (s - sigma_hat) d / 2, which the second completes.

    Source: Karras et al., arXiv 2206.00364, Algorithm 2.
    """
    raised, added = _raised(sigmas, **churning)
    t, s, h = raised, sigmas[1:], sigmas[1:] - raised
    x, g = _slope(t, prediction)
    first = torch.cat((_table(1 + h * x, h * g), _table(1 + h / 2 * x, h / 2 * g)), -2)
    ends, none = s == 0, torch.zeros_like(h)
    x, g = (torch.where(ends, none, h / 2 * one) for one in _slope(torch.where(ends, 1.0, s), prediction))
    x, kept = torch.where(ends, 1.0, x), torch.where(ends, none, 1.0)  # where it ends, the sample stays
    second = torch.cat((_table(x, g, kept=kept, z=_late(added)), _table(none, none)), -2)
    calls = torch.stack((torch.ones_like(ends), ~ends), 1).reshape(2 * len(h), -1).any(-1)
    times, table = torch.stack((t, s), 1).flatten(0, 1), torch.stack((first, second), 1).flatten(0, 1)
    return StepPlan(times[calls], table[calls], _start(added))


def adams_bashforth(sigmas: Tensor, *, prediction: str = "x0") -> StepPlan:
    """Second order in sigma, one call a step; the first step is Euler's. Kept is the slope d.

        x <- x + h ((1 + h / (2 h')) d - h / (2 h') d'),   h' and d' the step before

    k-diffusion's and diffusers' LMS with order 2. The integrals of the interpolating line are exact here.
    """
    h = sigmas.diff(dim=0)
    share = torch.cat((torch.zeros_like(h[:1]), h[1:] / (2 * h[:-1])))
    x, g = _slope(sigmas[:-1], prediction)
    forward = h * (1 + share)
    table = _table(1 + forward * x, forward * g, kept=-h * share)
    return StepPlan(sigmas[:-1], torch.cat((table, _table(x, g)), -2))


def dpm_solver_2m(
    schedule: Schedule,
    times: Tensor,
    *,
    prediction: str = "x0",
    stochastic: bool = False,
    first_order: Tensor | None = None,
) -> StepPlan:
    """DPM-Solver++ 2M and its SDE (midpoint) form: the step of `one_step`, churn 0 or 1, from an extrapolated x0.

        x0' = x0 + (x0 - x0 before) / (2 r),   r = h before / h,   h = ln(signal_s / noise_s) - ln(signal_t / noise_t)

    First order in the first step, in one to s = 0, where h is infinite, and where `first_order` `[N]` says so. Kept is
    x0. Source: Lu et al., arXiv 2211.01095.
    """
    levels = _levels(schedule, times)
    a, b, v = step_coefficients(levels, "x0", float(stochastic))
    _, ratio, _ = _ratios(levels, first_order)
    share = ratio / 2
    alpha, beta = x0_coefficients(levels, prediction)
    ahead = b * (1 + share)
    table = _table(a + ahead * alpha, ahead * beta, kept=-b * share, z=v)
    return StepPlan(times[:-1], torch.cat((table, _table(alpha, beta)), -2))


def unipc(
    schedule: Schedule,
    times: Tensor,
    *,
    prediction: str = "x0",
    variant: str = "bh2",
    first_order: Tensor | None = None,
) -> StepPlan:
    """UniPC of order 2, which predicts x0: its corrector is folded into the step after, so a step is one combine.

    x0_i is found at call i, at the x_i that the step before predicted. With h of a step and h' of the one before it, in
    ln(signal / noise), r = h / h', E = 1 - e^-h, B = E ("bh2") or h ("bh1"), and a, b the factors of `one_step`,

        corrected = x_i + signal_s B ((f - p) (x0_i - x0_{i-1}) + (p - 1/2) r (x0_{i-1} - x0_{i-2}))
        x_{i+1}   = a corrected + b x0_i + signal_s B r / 2 (x0_i - x0_{i-1})

    with signal_s, B, f, p and r of the step before in the first line, of this step in the second;

        f = (1 - E / h) / B,   p = r / (1 + r) (f - (1 - 2 (1 - E / h) / h) / B)

    First order (r = 0, f - p = 1/2) in the first step, in one to s = 0, and where `first_order` `[N]` says so. Where h
    is infinite "bh1" is not defined, and that step is not corrected. Kept are x0_i and x0_{i-1}.

    With its corrector a run converges with order 3. Source: Zhao et al., arXiv 2302.04867; the predictor's p is 1/2,
    as in diffusers' UniPCMultistepScheduler of solver_order 2.
    """
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: `variant` is {variant!r}, expected bh1 or bh2")
    levels = _levels(schedule, times)
    a, b, _ = step_coefficients(levels, "x0", 0.0)
    h, ratio, second = _ratios(levels, first_order)
    none = torch.zeros_like(h)
    size = -torch.expm1(-h) if variant == "bh2" else h
    new, old = _corrected(h, ratio, second, size)
    size = levels.signal_s * size
    ahead = torch.where(second, size * ratio / 2, none)
    new, old = (torch.where(torch.isfinite(size), size * one, none) for one in (new, old))
    new, old = (a * torch.cat((torch.zeros_like(one[:1]), one[:-1])) for one in (new, old))  # at the next call
    alpha, beta = x0_coefficients(levels, prediction)
    to_x0 = new + b + ahead
    table = _table(a + to_x0 * alpha, to_x0 * beta, kept=old - new - ahead)
    table = torch.cat((table, _table(alpha, beta)), -2)
    before = torch.stack((-old, none), -1).unsqueeze(-1)
    return StepPlan(times[:-1], torch.cat((table, before), -1))


def _ratios(levels: Levels, first_order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """h of every step; its ratio to the one before, 0 where a step is of first order; and which are of second."""
    h = -torch.log1p(-levels.gap / (levels.signal_s * levels.noise_t))
    ratio = torch.cat((torch.full_like(h[:1], torch.inf), h[1:] / h[:-1]))
    second = torch.isfinite(ratio) & (h > 0)
    if first_order is not None:
        second = second & ~first_order.reshape(first_order.shape + (1,) * (h.ndim - first_order.ndim))
    return h, torch.where(second, ratio, torch.zeros_like(h)), second


def _corrected(h: Tensor, ratio: Tensor, second: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """What UniPC's corrector adds to a prediction, in units of signal_s B: factors of the newest difference of x0 and
    of the one before it. `size`: B."""
    one = 1 + torch.expm1(-h) / h
    first, then = one / size, (1 - 2 * one / h) / size
    share = (first - then) * ratio / (1 + ratio)
    half = torch.full_like(h, 0.5)
    return torch.where(second, first - share, half), torch.where(second, (share - 0.5) * ratio, torch.zeros_like(h))


def _levels(schedule: Schedule, times: Tensor, to: Tensor | None = None) -> Levels:
    return schedule.levels(times[:-1], times[1:] if to is None else to)


def _table(x: Tensor, g: Tensor, kept: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """One output: `[N, 1, 4]`, or `[N, B, 1, 4]`."""
    none = torch.zeros_like(x)
    return torch.stack((x, g, none if kept is None else kept, none if z is None else z), -1).unsqueeze(-2)


def _slope(sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """`(x - x0) / sigma` as factors of x and of the prediction, at signal 1."""
    one = torch.ones_like(sigma)
    alpha, beta = x0_coefficients(Levels(one, sigma, one, sigma, sigma), prediction)
    return (1 - alpha) / sigma, -beta / sigma


def _late(added: Tensor) -> Tensor:
    """The noise of a step goes in at the end of the one before."""
    return torch.cat((added[1:], torch.zeros_like(added[:1])))


def _start(added: Tensor) -> float | Tensor:
    return float(added[0]) if added.ndim == 1 else added[0]


def _raised(
    sigmas: Tensor, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """sigma_hat of every step, and how much noise gets there: `s_noise sqrt(sigma_hat^2 - sigma^2)`."""
    at = sigmas[:-1]
    gamma = min(s_churn / len(at), math.sqrt(2) - 1)
    gamma = torch.where((at >= s_tmin) & (at <= s_tmax), gamma, 0.0).to(at.dtype)
    return at * (1 + gamma), s_noise * at * torch.sqrt(gamma * (2 + gamma))
