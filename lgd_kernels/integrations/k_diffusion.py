"""k-diffusion's samplers on our kernels, and its denoiser with learned guidance. k-diffusion itself is not needed.

A sampler is called as there, `sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None)`, with
`model(x, sigma [B], **extra_args)` the denoised x0 and sigmas `[N + 1]` from noise to data, the last of them 0 or not:

    model = GuidedDenoiser(denoiser, omega, sigmas)
    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": c, "uncond": u, "condition": labels})

Every step is one pass over memory: the factors of a run are a table (`lgd_kernels.solvers`), worked out in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels import plan_checks, solvers
from lgd_kernels.impls import Impl
from lgd_kernels.rules import Rule
from lgd_kernels.sampler import seed_of
from lgd_kernels.schedules import EDM
from lgd_kernels.solvers import StepPlan


class GuidedDenoiser:
    """A denoiser for the samplers: `cond + omega(c, s, t) (cond - uncond)`, x0 by x0.

    Args:
        denoiser: `denoiser(x, sigma, condition) -> x0`, as k-diffusion wraps a network.
        omega: a float, `[B]`, or a function `omega(c, s, t)` of sigmas `[B]`: t where the sample is, s the next one in
            `sigmas` that is below t (0 below the last), found on the device. omega = scale - 1.
        sigmas: of the run, for functions.
        rule: as in `guided_score`, in x0 space.

    Called as `(x, sigma, cond=..., uncond=..., condition=None)`; condition is the c of omega, cond by default. Where
    omega is the number 0 the denoiser is called once.

    >>> model = GuidedDenoiser(lambda x, sigma, c: c.expand_as(x), 0.5)
    >>> model(torch.zeros(1, 2), torch.ones(1), cond=torch.tensor([[3.0]]), uncond=torch.tensor([[1.0]]))
    tensor([[4., 4.]])
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
        omega: float | Tensor | Callable[[Tensor, Tensor, Tensor], Tensor],
        sigmas: Tensor | None = None,
        *,
        rule: Rule | None = None,
        impl: Impl | None = None,
    ) -> None:
        if callable(omega) and not isinstance(omega, Tensor) and sigmas is None:
            raise ValueError("GuidedDenoiser: `sigmas` is None, expected those of the run: omega(c, s, t) asks for s")
        self.denoiser, self.omega, self.sigmas, self.rule, self.impl = denoiser, omega, sigmas, rule, impl

    def __call__(self, x: Tensor, sigma: Tensor, cond, uncond, condition: Tensor | None = None) -> Tensor:
        omega = self.omega
        if isinstance(omega, (int, float)) and omega == 0 and self.rule is None:
            return self.denoiser(x, sigma, cond)
        if callable(omega) and not isinstance(omega, Tensor):
            omega = omega(cond if condition is None else condition, next_sigma(self.sigmas, sigma), sigma)
        c, u = self.denoiser(x, sigma, cond), self.denoiser(x, sigma, uncond)
        return lgd.guided_score(c, u, omega, rule=self.rule, impl=self.impl)


def next_sigma(sigmas: Tensor, sigma: Tensor) -> Tensor:
    """The largest of `sigmas` below each sigma `[B]`, 0 where there is none; nothing waits for it.

    >>> next_sigma(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([4.0, 1.5, 1.0]))
    tensor([2., 1., 0.])
    """
    sigmas = sigmas.to(sigma)
    return torch.where(sigmas < sigma[:, None], sigmas, torch.zeros_like(sigmas)).amax(1)


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, *, impl=None) -> Tensor:
    """Euler's method (Algorithm 2 of Karras et al., arXiv 2206.00364, without noise and correction)."""
    plan = solvers.one_step(EDM(), _host(sigmas))
    return _run(model, x, sigmas, plan, extra_args, callback, impl)


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    seed=None, *, impl=None,
) -> Tensor:  # fmt: skip
    """Euler down to sigma_down, then noise up to the next sigma:

        sigma_up = min(s, eta sqrt(s^2 (t^2 - s^2) / t^2)),   sigma_down = sqrt(s^2 - sigma_up^2)

    Noise comes from `noise_sampler(sigma, sigma_next)`; or, with `seed` (an int, a 0-dim tensor or `[B]`), is drawn
    inside the kernel, step i from seed + (i << 32); else from `torch.randn_like`, as there.
    """
    plan_checks.sigmas("sample_euler_ancestral", _host(sigmas), "x0")
    plan_checks.churning("sample_euler_ancestral", eta=eta, s_noise=s_noise)
    t, s = _host(sigmas)[:-1], _host(sigmas)[1:]
    over = torch.where(t == 0, 1.0, t)
    up = torch.minimum(s, eta * torch.sqrt(s * s * (t - s) * (t + s)) / over)
    kept = torch.where(t == s, 1.0, torch.sqrt((s - up) * (s + up)) / over)
    none = torch.zeros_like(kept)
    plan = StepPlan(t, torch.stack((kept, 1 - kept, none, s_noise * up), -1).unsqueeze(1))
    return _run(model, x, sigmas, plan, extra_args, callback, impl, noise_sampler or _like(x, seed), seed)


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, *, impl=None) -> Tensor:
    """Heun's method (Algorithm 2 of arXiv 2206.00364, without noise): 2 N - 1 calls where the last sigma is 0."""
    plan = solvers.edm_heun(_host(sigmas))
    return _run(model, x, sigmas, plan, extra_args, callback, impl)


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, impl=None) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095): second order, one call a step."""
    plan = solvers.dpm_solver_2m(EDM(), _host(sigmas))
    return _run(model, x, sigmas, plan, extra_args, callback, impl)


def _run(model, x, sigmas, plan, extra_args, callback, impl, noise_sampler=None, seed=None) -> Tensor:
    """The loop. `callback` gets what k-diffusion's gets: x, i, sigma, sigma_hat and denoised, once a step."""
    sigmas, plan = sigmas.to(x.device), plan.to(x.device)
    times = plan.times.to(sigmas.dtype)
    kept, ones, step = None, x.new_ones(x.shape[0], dtype=sigmas.dtype), 0
    for i, sigma in enumerate(times):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        starts = len(plan) == len(sigmas) - 1 or i % 2 == 0  # the second call of a Heun step is no step
        if callback is not None and starts:
            callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        step += starts
        drawn = {}
        if seed is not None:
            drawn["seed"] = seed_of(seed, i)
        elif noise_sampler is not None:
            drawn["noise"] = noise_sampler(sigmas[i], sigmas[i + 1])
        x, kept = plan.step(i, x, denoised, kept=kept, impl=impl, **drawn)
    return x


def _host(sigmas: Tensor) -> Tensor:
    """In float64 on the host, once before a run: factors are made there."""
    return sigmas.detach().cpu().double()


def _like(x: Tensor, seed):
    return None if seed is not None else lambda sigma, sigma_next: torch.randn_like(x)
