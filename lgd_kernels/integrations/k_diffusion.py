"""Run k-diffusion's samplers on our kernels, with learned guidance. k-diffusion itself is not needed.

Call a sampler as in k-diffusion, `sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)`:
`model(x, sigma [B], **extra_args)` returns the denoised x0; sigmas `[N + 1]` fall from noise to data, to 0 or above:

    model = GuidedDenoiser(denoiser, omega, sigmas)
    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": c, "uncond": u, "condition": labels})

As in k-diffusion, samplers run without grad; with `grad=True` they keep the grad mode of the caller. Samplers show no
progress bar; `disable` has no effect. Every step is one pass over memory: the factors of a run are a table
(`lgd_kernels.solvers`), computed in float64.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lgd_kernels as lgd
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.sampling import plan_checks, solvers
from lgd_kernels.sampling.sampler import seed_of, started
from lgd_kernels.sampling.schedules import EDM
from lgd_kernels.sampling.step_plan import StepPlan

CHURNED: ContextVar[Tensor | None] = ContextVar("CHURNED", default=None)  # sigma_hat of the current run
NEAR = 1e-3  # relative: float16 rounds by 5e-4; of several sigmas of a run as near as this, the nearest counts


class GuidedDenoiser(nn.Module):
    """Guide a denoiser for the samplers: `cond + omega(c, s, t) (cond - uncond)`, where cond and uncond are its x0.

    Args:
        denoiser: `denoiser(x, sigma, cond=..., **kwargs) -> x0`, as k-diffusion wraps a network. If the third parameter
            has another name, the condition is passed by position.
        omega: a float, `[B]`, or a function `omega(c, s, t)` of sigmas `[B]`: t is the sigma of the sample, s the sigma
            that the step goes to, which `next_sigma` finds in `sigmas` on the device. omega = scale - 1.
        sigmas: of the run; needed if omega is a function.
        rule: as in `guided_score`, in x0 space.
        keyword: the name of the denoiser's parameter that takes the condition, such as "class_cond", if this parameter
            is neither `cond` nor the third.
        s_churn, s_tmin, s_tmax: as passed to k-diffusion's own samplers, so that `next_sigma` finds s when they call at
            sigma_hat. The samplers of this module set them, unless the GuidedDenoiser is compiled.

    Call it as `(x, sigma, cond=..., uncond=..., condition=None, **kwargs)`; condition is the c of omega, cond by
    default, and kwargs go to the denoiser. If omega is the number 0 the denoiser is called once.

    >>> model = GuidedDenoiser(lambda x, sigma, cond: cond.expand_as(x), 0.5)
    >>> model(torch.zeros(1, 2), torch.ones(1), cond=torch.tensor([[3.0]]), uncond=torch.tensor([[1.0]]))
    tensor([[4., 4.]])
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        omega: float | Tensor | Callable[[Any, Tensor, Tensor], Tensor],
        sigmas: Tensor | None = None,
        *,
        rule: Rule | None = None,
        impl: Impl | None = None,
        keyword: str | None = None,
        s_churn: float = 0.0,
        s_tmin: float | Tensor = 0.0,
        s_tmax: float | Tensor = math.inf,
    ) -> None:
        super().__init__()
        if callable(omega) and not isinstance(omega, Tensor) and sigmas is None:
            raise ValueError(
                "GuidedDenoiser: `sigmas` is None, expected those of the run, from which s of omega(c, s, t) is taken"
            )
        if not callable(denoiser):
            raise TypeError(
                f"GuidedDenoiser: `denoiser` is a {type(denoiser).__name__}, expected a function (x, sigma, cond) -> x0"
            )
        if sigmas is not None:
            _check("GuidedDenoiser", sigmas)
        self.denoiser, self.omega, self.sigmas, self.rule, self.impl = denoiser, omega, sigmas, rule, impl
        self.keyword = _keyword(denoiser) if keyword is None else keyword
        self.raised: Tensor | None = None
        if s_churn and sigmas is not None:
            self.raised = _raised(sigmas, _churn("GuidedDenoiser", sigmas, s_churn, s_tmin, s_tmax))

    def forward(
        self, input: Tensor, sigma: Tensor, cond: Any, uncond: Any, condition: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return the guided x0."""
        omega = self.omega
        if isinstance(omega, (int, float)) and omega == 0 and self.rule is None:
            return self._denoised(input, sigma, cond, kwargs)
        if callable(omega) and not isinstance(omega, Tensor):
            assert self.sigmas is not None
            t = sigma if sigma.dtype == torch.float64 else sigma.float()
            raised = self.raised
            if raised is None and not torch.compiler.is_compiling():
                raised = CHURNED.get()
            omega = omega(cond if condition is None else condition, next_sigma(self.sigmas, sigma, raised), t)
        c, u = (self._denoised(input, sigma, one, kwargs) for one in (cond, uncond))
        return lgd.guided_score(c, u, omega, rule=self.rule, impl=self.impl)

    def _denoised(self, x: Tensor, sigma: Tensor, cond: Any, kwargs: dict[str, Any]) -> Tensor:
        """Call the denoiser with one condition."""
        if self.keyword is None:
            return self.denoiser(x, sigma, cond, **kwargs)
        return self.denoiser(x, sigma, **{self.keyword: cond}, **kwargs)


def next_sigma(sigmas: Tensor, sigma: Tensor, raised: Tensor | None = None) -> Tensor:
    """Return where a step from each sigma `[B]` goes: the largest of `sigmas` below it, or 0 if there is none.

    Samplers round sigmas, or compute them through a logarithm. So a sigma within a relative distance of 1e-3 (bfloat16:
    8e-3) from one of the run counts as the nearest of the run, and a sigma above all of them counts as the first. The
    order of `sigmas` does not matter. Returns float32 `[B]`, or float64 if sigma is float64; never a device sync.

    Args:
        raised: `[2, N]`, sigma_hat and sigma of each step of a run with churn: a sigma near a sigma_hat counts as the
            sigma of that step.

    >>> next_sigma(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([4.0, 2.000001, 1.5, 1.0]))
    tensor([2., 1., 1., 0.])
    """
    near = max(NEAR, torch.finfo(sigma.dtype).eps, torch.finfo(sigmas.dtype).eps)
    kept = torch.float64 if sigma.dtype == torch.float64 else torch.float32
    wide = torch.promote_types(sigmas.dtype, kept)
    run, t = sigmas.to(sigma.device, wide), sigma.to(wide).unsqueeze(-1)
    starts, counted = run, run
    if raised is not None:
        starts, counted = (torch.cat((run, one)) for one in raised.to(run))
    t = torch.minimum(t, starts.amax())
    nearest = (starts - t).abs().argmin(-1, keepdim=True)
    t = torch.where((starts[nearest] - t).abs() <= near * t, counted[nearest], t)
    return torch.where(run < t, run, torch.zeros_like(run)).amax(-1).to(kept)


def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float | Tensor = 0.0,
    s_tmax: float | Tensor = math.inf,
    s_noise: float = 1.0,
    *,
    seed: int | Tensor | None = None,
    grad: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Sample with Euler's method: Algorithm 2 of Karras et al. (arXiv 2206.00364) without its correction. With churn,

        sigma_hat = sigma (1 + min(s_churn / N, sqrt(2) - 1))   where s_tmin <= sigma <= s_tmax,
        x += s_noise sqrt(sigma_hat^2 - sigma^2) z              before the call, which is at sigma_hat

    z comes from `torch.randn_like`, once a step, as in k-diffusion; with `seed` (an int, a 0-dim tensor or `[B]`) the
    kernel draws z. Without churn nothing is drawn.
    """
    times, churn = _host("sample_euler", sigmas), _churn("sample_euler", sigmas, s_churn, s_tmin, s_tmax)
    _check_seed("sample_euler", seed, s_churn)
    run = _Run(model, x, sigmas, extra_args, callback, impl, grad)
    draw = _fresh(x, sigmas, s_churn)
    plan = partial(solvers.edm_euler, times, s_noise=s_noise, **churn._asdict())
    plan = plan if s_churn else partial(solvers.one_step, EDM(), times)
    return _sampled(run, plan, draw=draw, seed=seed, churn=churn)


def sample_euler_ancestral(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int | Tensor | None = None,
    *,
    grad: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Sample with Euler steps down to sigma_down, then noise up to the next sigma:

        sigma_up = min(s, eta sqrt(s^2 (t^2 - s^2) / t^2)),   sigma_down = sqrt(s^2 - sigma_up^2)

    Noise comes from `noise_sampler(sigma, sigma_next)`, called where sigma_next is above 0; or, with `seed` (an int, a
    0-dim tensor or `[B]`), the kernel draws it, step i from seed + (i << 32); else from `torch.randn_like`, as in
    k-diffusion.
    """
    times = _host("sample_euler_ancestral", sigmas)
    t, s = times[:-1], times[1:]
    fresh = noise_sampler or (lambda sigma, sigma_next: torch.randn_like(x))

    def plan() -> StepPlan:
        plan_checks.sigmas("sample_euler_ancestral", times, "x0")
        plan_checks.at_least_0("sample_euler_ancestral", eta=eta)
        plan_checks.finite_at_least_0("sample_euler_ancestral", s_noise=s_noise)
        over = torch.where(t == 0, 1.0, t)
        up = torch.minimum(s, eta * torch.sqrt(s * s * (t - s) * (t + s)) / over)
        kept = torch.where(t == s, 1.0, torch.sqrt((s - up) * (s + up)) / over)
        none = torch.zeros_like(kept)
        return StepPlan(t, torch.stack((kept, 1 - kept, none, s_noise * up), -1).unsqueeze(1))

    def draw(step: int) -> Tensor | None:
        return fresh(sigmas[step], sigmas[step + 1]) if step >= 0 and s[step] > 0 else None

    return _sampled(_Run(model, x, sigmas, extra_args, callback, impl, grad), plan, draw=draw, seed=seed)


def sample_heun(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float | Tensor = 0.0,
    s_tmax: float | Tensor = math.inf,
    s_noise: float = 1.0,
    *,
    seed: int | Tensor | None = None,
    grad: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Sample with Heun's method (Algorithm 2 of arXiv 2206.00364): 2 N - 1 calls if the last sigma is 0. Churn, noise
    and seed are those of `sample_euler`."""
    times, churn = _host("sample_heun", sigmas), _churn("sample_heun", sigmas, s_churn, s_tmin, s_tmax)
    _check_seed("sample_heun", seed, s_churn)
    run = _Run(model, x, sigmas, extra_args, callback, impl, grad)
    draw = _fresh(x, sigmas, s_churn)
    plan = partial(solvers.edm_heun, times, s_noise=s_noise, **churn._asdict())
    return _sampled(run, plan, draw=draw, seed=seed, churn=churn)


def sample_dpmpp_2m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    grad: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Sample with DPM-Solver++ 2M (arXiv 2211.01095): second order, one call a step."""
    times = _host("sample_dpmpp_2m", sigmas)
    run = _Run(model, x, sigmas, extra_args, callback, impl, grad)
    return _sampled(run, partial(solvers.dpm_solver_2m, EDM(), times))


class _Run(NamedTuple):
    """Hold the arguments that all samplers share."""

    model: Callable[..., Tensor]
    x: Tensor
    sigmas: Tensor
    extra_args: dict[str, Any] | None
    callback: Callable[[dict[str, Any]], Any] | None
    impl: Impl | None
    grad: bool


class _Churn(NamedTuple):
    """Hold settings of churn that were checked."""

    s_churn: float
    s_tmin: float
    s_tmax: float


def _sampled(
    run: _Run,
    plan: Callable[[], StepPlan],
    *,
    draw: Callable[[int], Tensor | None] | None = None,
    seed: int | Tensor | None = None,
    churn: _Churn | None = None,
) -> Tensor:
    """Run the loop on the plan that `plan()` makes. `callback` gets what k-diffusion's gets, once a step.

    `draw(step)` returns the noise that is added at the end of a step, or None; step -1 is before the first.
    """
    model, x, sigmas, extra_args, callback, impl, grad = run
    if len(sigmas) < 2:
        return x
    sigmas, steps = sigmas.to(x.device), plan().to(x.device)
    times = steps.times.to(sigmas.dtype)
    kept, ones = None, x.new_ones(x.shape[0], dtype=sigmas.dtype)
    drawn: dict[str, Any]
    calls = 1 if len(steps) < len(sigmas) else 2  # of a step; the last of Heun's has one
    raised = _raised(sigmas, churn) if churn is not None and churn.s_churn else None
    with _churned(raised), contextlib.nullcontext() if grad else torch.no_grad():
        z = draw(-1) if draw is not None and seed is None else None
        if steps.start and seed is not None:
            x = started(x, steps, seed, impl=impl)
        elif steps.start and z is not None:
            x = torch.add(x, z, alpha=float(steps.start))
        for i, sigma in enumerate(times):
            step, within = divmod(i, calls)
            denoised = model(x, sigma * ones, **(extra_args or {}))
            if callback is not None and within == 0:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigma, "denoised": denoised})
            drawn = {}
            if seed is not None:
                drawn["seed"] = seed_of(seed, i)
            elif draw is not None and within == calls - 1:
                drawn["noise"] = draw(step)
            x, kept = steps.step(i, x, denoised, kept=kept, impl=impl, **drawn)
    return x


@contextlib.contextmanager
def _churned(raised: Tensor | None) -> Iterator[None]:
    """Set sigma_hat for every GuidedDenoiser that is called in this block, also inside another model."""
    token = CHURNED.set(raised)
    try:
        yield
    finally:
        CHURNED.reset(token)


def _raised(sigmas: Tensor, churn: _Churn) -> Tensor:
    """Compute sigma_hat and sigma of every step, `[2, N]`."""
    at = sigmas[:-1]
    gamma = min(churn.s_churn / max(len(at), 1), math.sqrt(2) - 1)
    return torch.stack((torch.where((at >= churn.s_tmin) & (at <= churn.s_tmax), at * (gamma + 1), at), at))


def _churn(name: str, sigmas: Tensor, s_churn: float, s_tmin: float | Tensor, s_tmax: float | Tensor) -> _Churn:
    """Check the settings, and round the bounds to the dtype of the sigmas, in which k-diffusion compares them."""
    least, most = (float(one) if isinstance(one, Tensor) else one for one in (s_tmin, s_tmax))  # as sigmas.min()
    plan_checks.finite_at_least_0(name, s_churn=s_churn)
    plan_checks.at_least_0(name, s_tmin=least, s_tmax=most)
    return _Churn(s_churn, *torch.tensor([least, most], dtype=sigmas.dtype, device="cpu").tolist())


def _check_seed(name: str, seed: int | Tensor | None, s_churn: float) -> None:
    """Raise ValueError for a seed without churn."""
    if seed is not None and not s_churn:
        raise ValueError(
            f"{name}: `seed` was given, but `s_churn` is 0 and nothing is drawn; pass s_churn=... or leave `seed` out"
        )


def _fresh(x: Tensor, sigmas: Tensor, s_churn: float) -> Callable[[int], Tensor | None] | None:
    """Return a function that draws noise as k-diffusion does: once for each step, even if the step adds none."""
    steps = len(sigmas) - 1
    return (lambda step: torch.randn_like(x) if step < steps - 1 else None) if s_churn else None


def _host(name: str, sigmas: Tensor) -> Tensor:
    """Copy the sigmas to the host in float64, once before a run: the factors are computed there."""
    _check(name, sigmas)
    return sigmas.detach().cpu().double()


def _check(name: str, sigmas: Tensor) -> None:
    """Raise TypeError or ValueError unless sigmas are floats `[N + 1]`."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        said = sigmas.dtype if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise TypeError(f"{name}: `sigmas` is a {said}, expected a tensor of floats [N + 1]")
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError(f"{name}: `sigmas` has shape {list(sigmas.shape)}, expected [N + 1], from noise to data")


def _keyword(denoiser: Callable[..., Tensor]) -> str | None:
    """Return the name of the parameter that takes the condition; None if it is the third positional one."""
    function = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    try:
        known = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "cond"
    third = known[2:3]
    if "cond" in [one.name for one in known if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]:
        return "cond"
    if third and third[0].kind in (third[0].POSITIONAL_ONLY, third[0].POSITIONAL_OR_KEYWORD):
        if third[0].default is inspect.Parameter.empty:
            return None
    if any(one.kind is one.VAR_KEYWORD for one in known):
        return "cond"
    if len(known) == 3 or any(one.kind is one.VAR_POSITIONAL for one in known):
        return None
    raise ValueError(
        f"GuidedDenoiser: `denoiser` takes ({', '.join(map(str, known))}), expected (x, sigma, cond); "
        "keyword=... names the parameter that takes the condition"
    )
