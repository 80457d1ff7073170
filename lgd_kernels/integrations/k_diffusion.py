"""k-diffusion's samplers on our kernels, and its denoiser with learned guidance. k-diffusion itself is not needed.

A sampler is called as there, `sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)`, with
`model(x, sigma [B], **extra_args)` the denoised x0 and sigmas `[N + 1]` from noise to data, the last of them 0 or not:

    model = GuidedDenoiser(denoiser, omega, sigmas)
    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": c, "uncond": u, "condition": labels})

As in k-diffusion, samplers run without grad; with `grad=True` they keep the grad mode of the caller. They accept
`disable`, and show no progress bar. Every step is one pass over memory: the factors of a run are a table
(`lgd_kernels.solvers`), computed in float64.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor, nn

import lgd_kernels as lgd
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.sampling import plan_checks, solvers
from lgd_kernels.sampling.sampler import seed_of
from lgd_kernels.sampling.schedules import EDM
from lgd_kernels.sampling.step_plan import StepPlan

CHURNED: ContextVar[Tensor | None] = ContextVar("CHURNED", default=None)  # sigma_hat of the current run
NEAR = 1e-3  # relative: float16 rounds by 5e-4; neighbours of a run are further apart, or the nearest of them is taken


class GuidedDenoiser(nn.Module):
    """A denoiser for the samplers: `cond + omega(c, s, t) (cond - uncond)`, x0 by x0.

    Args:
        denoiser: `denoiser(x, sigma, cond=..., **kwargs) -> x0`, as k-diffusion wraps a network. If its third parameter
            has another name, `cond` is passed to it by position.
        omega: a float, `[B]`, or a function `omega(c, s, t)` of sigmas `[B]`: t is the sigma of the sample, s the sigma
            that the step goes to, which `next_sigma` finds in `sigmas` on the device. omega = scale - 1.
        sigmas: of the run, for functions.
        rule: as in `guided_score`, in x0 space.
        keyword: the name of the denoiser's parameter that takes the condition, such as "class_cond", if it is neither
            `cond` nor the third.
        s_churn, s_tmin, s_tmax: as passed to k-diffusion's own samplers, so that s is found when they call at
            sigma_hat. The samplers of this module pass them on themselves, unless the GuidedDenoiser is compiled.

    Called as `(x, sigma, cond=..., uncond=..., condition=None, **kwargs)`; condition is the c of omega, cond by
    default, and kwargs go to the denoiser. Where omega is the number 0 the denoiser is called once.

    >>> model = GuidedDenoiser(lambda x, sigma, cond: cond.expand_as(x), 0.5)
    >>> model(torch.zeros(1, 2), torch.ones(1), cond=torch.tensor([[3.0]]), uncond=torch.tensor([[1.0]]))
    tensor([[4., 4.]])
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        omega: float | Tensor | Callable[[Tensor, Tensor, Tensor], Tensor],
        sigmas: Tensor | None = None,
        *,
        rule: Rule | None = None,
        impl: Impl | None = None,
        keyword: str | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
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
        self.raised = None
        if s_churn and sigmas is not None:
            self.raised = _raised(sigmas, **_churning("GuidedDenoiser", sigmas, s_churn, s_tmin, s_tmax))

    def forward(self, input: Tensor, sigma: Tensor, cond, uncond, condition: Tensor | None = None, **kwargs) -> Tensor:
        omega = self.omega
        if isinstance(omega, (int, float)) and omega == 0 and self.rule is None:
            return self._denoised(input, sigma, cond, kwargs)
        if callable(omega) and not isinstance(omega, Tensor):
            t = sigma if sigma.dtype == torch.float64 else sigma.float()
            raised = self.raised
            if raised is None and not torch.compiler.is_compiling():
                raised = CHURNED.get()
            omega = omega(cond if condition is None else condition, next_sigma(self.sigmas, sigma, raised), t)
        c, u = (self._denoised(input, sigma, one, kwargs) for one in (cond, uncond))
        return lgd.guided_score(c, u, omega, rule=self.rule, impl=self.impl)

    def _denoised(self, x: Tensor, sigma: Tensor, cond, kwargs: dict) -> Tensor:
        if self.keyword is None:
            return self.denoiser(x, sigma, cond, **kwargs)
        return self.denoiser(x, sigma, **{self.keyword: cond}, **kwargs)


def next_sigma(sigmas: Tensor, sigma: Tensor, raised: Tensor | None = None) -> Tensor:
    """Where a step from each sigma `[B]` goes: the largest of `sigmas` below it, or 0 if there is none.

    Samplers call at sigmas that were rounded, or went through a logarithm. So a sigma within a relative distance of
    1e-3 (bfloat16: 8e-3) from one of the run counts as the nearest one, and a sigma above all of them counts as the
    first. The order of `sigmas` does not matter. Returns float32 `[B]`, or float64 if sigma is; does not wait for the
    device.

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
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf,
    s_noise=1.0, *, seed=None, grad=False, impl=None,
) -> Tensor:  # fmt: skip
    """Euler's method: Algorithm 2 of Karras et al. (arXiv 2206.00364) without its correction. With churn,

        sigma_hat = sigma (1 + min(s_churn / N, sqrt(2) - 1))   where s_tmin <= sigma <= s_tmax,
        x += s_noise sqrt(sigma_hat^2 - sigma^2) z              before the call, which is at sigma_hat

    z comes from `torch.randn_like`, once a step, as in k-diffusion; with `seed` (an int, a 0-dim tensor or `[B]`) the
    kernel draws it. Without churn nothing is drawn.
    """
    times, churning = _host("sample_euler", sigmas), _churning("sample_euler", sigmas, s_churn, s_tmin, s_tmax)
    _check_seed("sample_euler", seed, s_churn)

    def plan() -> StepPlan:
        return solvers.edm_euler(times, s_noise=s_noise, **churning) if s_churn else solvers.one_step(EDM(), times)

    return _run(model, x, sigmas, plan, extra_args, callback, impl, grad, _fresh(x, sigmas, s_churn), seed, churning)


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    seed=None, *, grad=False, impl=None,
) -> Tensor:  # fmt: skip
    """Euler down to sigma_down, then noise up to the next sigma:

        sigma_up = min(s, eta sqrt(s^2 (t^2 - s^2) / t^2)),   sigma_down = sqrt(s^2 - sigma_up^2)

    Noise comes from `noise_sampler(sigma, sigma_next)`, called where sigma_next is above 0; or, with `seed` (an int, a
    0-dim tensor or `[B]`), is drawn inside the kernel, step i from seed + (i << 32); else from `torch.randn_like`, as
    in k-diffusion.
    """
    times = _host("sample_euler_ancestral", sigmas)
    t, s = times[:-1], times[1:]
    noise_sampler = noise_sampler or (lambda sigma, sigma_next: torch.randn_like(x))

    def plan() -> StepPlan:
        plan_checks.sigmas("sample_euler_ancestral", times, "x0")
        plan_checks.churning("sample_euler_ancestral", eta=eta, s_noise=s_noise)
        over = torch.where(t == 0, 1.0, t)
        up = torch.minimum(s, eta * torch.sqrt(s * s * (t - s) * (t + s)) / over)
        kept = torch.where(t == s, 1.0, torch.sqrt((s - up) * (s + up)) / over)
        none = torch.zeros_like(kept)
        return StepPlan(t, torch.stack((kept, 1 - kept, none, s_noise * up), -1).unsqueeze(1))

    def draw(step: int) -> Tensor | None:
        return noise_sampler(sigmas[step], sigmas[step + 1]) if step >= 0 and s[step] > 0 else None

    return _run(model, x, sigmas, plan, extra_args, callback, impl, grad, draw, seed)


def sample_heun(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf,
    s_noise=1.0, *, seed=None, grad=False, impl=None,
) -> Tensor:  # fmt: skip
    """Heun's method (Algorithm 2 of arXiv 2206.00364): 2 N - 1 calls where the last sigma is 0. Churn, noise and seed
    are those of `sample_euler`."""
    times, churning = _host("sample_heun", sigmas), _churning("sample_heun", sigmas, s_churn, s_tmin, s_tmax)
    _check_seed("sample_heun", seed, s_churn)

    def plan() -> StepPlan:
        return solvers.edm_heun(times, s_noise=s_noise, **churning)

    return _run(model, x, sigmas, plan, extra_args, callback, impl, grad, _fresh(x, sigmas, s_churn), seed, churning)


def sample_dpmpp_2m(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, grad=False, impl=None
) -> Tensor:  # fmt: skip
    """DPM-Solver++ 2M (arXiv 2211.01095): second order, one call a step."""
    times = _host("sample_dpmpp_2m", sigmas)

    def plan() -> StepPlan:
        return solvers.dpm_solver_2m(EDM(), times)

    return _run(model, x, sigmas, plan, extra_args, callback, impl, grad)


def _run(
    model, x, sigmas, plan, extra_args, callback, impl, grad, draw=None, seed=None, churning=None
) -> Tensor:  # fmt: skip
    """The loop. `callback` gets what k-diffusion's gets: x, i, sigma, sigma_hat and denoised, once a step.

    `plan()` makes the plan. `draw(step)` is the noise that goes in at the end of a step, -1 for what goes in before the
    first, or None.
    """
    if len(sigmas) < 2:
        return x
    sigmas, plan = sigmas.to(x.device), plan().to(x.device)
    times = plan.times.to(sigmas.dtype)
    kept, ones = None, x.new_ones(x.shape[0], dtype=sigmas.dtype)
    calls = 1 if len(plan) < len(sigmas) else 2  # of a step; the last of Heun's has one
    churned = _raised(sigmas, **churning) if churning and churning["s_churn"] else None
    with _churned(churned), contextlib.nullcontext() if grad else torch.no_grad():
        z = draw(-1) if draw is not None and seed is None else None
        if plan.start and seed is not None:
            whole = {"noise_scale": plan.start, "seed": seed_of(seed, len(plan))}
            x = lgd.combine((x,), ones.unsqueeze(1), impl=impl, **whole)
        elif plan.start:
            x = torch.add(x, z, alpha=plan.start)
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
            x, kept = plan.step(i, x, denoised, kept=kept, impl=impl, **drawn)
    return x


@contextlib.contextmanager
def _churned(raised: Tensor | None):
    """Set sigma_hat for every GuidedDenoiser that is called in this block, also inside another model."""
    token = CHURNED.set(raised)
    try:
        yield
    finally:
        CHURNED.reset(token)


def _raised(sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float) -> Tensor:
    """sigma_hat and sigma of every step, `[2, N]`."""
    at = sigmas[:-1]
    gamma = min(s_churn / max(len(at), 1), math.sqrt(2) - 1)
    return torch.stack((torch.where((at >= s_tmin) & (at <= s_tmax), at * (gamma + 1), at), at))


def _churning(name: str, sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float) -> dict:
    """Check the settings, and round the bounds to the dtype of the sigmas, in which k-diffusion compares them."""
    s_tmin, s_tmax = (float(one) if isinstance(one, Tensor) else one for one in (s_tmin, s_tmax))  # sigmas.min()
    plan_checks.churning(name, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    if s_churn == math.inf:
        raise ValueError(f"{name}: `s_churn` is {s_churn}, expected a finite number, 0 or more")
    low, high = torch.tensor([s_tmin, s_tmax], dtype=sigmas.dtype, device="cpu").tolist()
    return {"s_churn": s_churn, "s_tmin": low, "s_tmax": high}


def _check_seed(name: str, seed, s_churn: float) -> None:
    if seed is not None and not s_churn:
        raise ValueError(
            f"{name}: `seed` was given, but `s_churn` is 0 and nothing is drawn; pass s_churn=... or leave `seed` out"
        )


def _fresh(x: Tensor, sigmas: Tensor, s_churn: float) -> Callable[[int], Tensor | None] | None:
    """Draw noise as k-diffusion does: once for each step of a run, even if the step adds none."""
    steps = len(sigmas) - 1
    return (lambda step: torch.randn_like(x) if step < steps - 1 else None) if s_churn else None


def _host(name: str, sigmas: Tensor) -> Tensor:
    """In float64 on the host, once before a run: factors are made there."""
    _check(name, sigmas)
    return sigmas.detach().cpu().double()


def _check(name: str, sigmas: Tensor) -> None:
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        said = sigmas.dtype if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise TypeError(f"{name}: `sigmas` is a {said}, expected a tensor of floats [N + 1]")
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError(f"{name}: `sigmas` has shape {list(sigmas.shape)}, expected [N + 1], from noise to data")


def _keyword(denoiser: Callable[..., Tensor]) -> str | None:
    """The name of the parameter that takes the condition; None to pass it as the third positional argument."""
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
