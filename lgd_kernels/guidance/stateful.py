"""Rules with state: APG's momentum, and feedback guidance. The caller owns the object that holds the state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.guidance import rule_checks
from lgd_kernels.guidance.rules import Guidance, PairMoments, PerSample, Rule
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, Prediction, step_coefficients


class Momentum:
    """Apply a rule to `D + b m` in the place of D, where m is what the rule was applied to in the step before.

    The object is for one run: call `reset()`, or make another, before the next.

        rule = Momentum(functools.partial(rules.apg, eta=0.0, radius=15.0), -0.5)

    Sadat et al., arXiv 2410.02416 (their beta is b, negative; diffusers' adaptive_projected_guidance_momentum). Writing
    the new m, in the dtype of cond, takes one more pass. No gradient flows into the steps before. m is in the space of
    the prediction: with `rule_space="x0"` the prediction must be x0.

    >>> import torch
    >>> rule = Momentum(lambda m, omega: Guidance(1.0, omega), 0.5)
    >>> c, u = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> rule.difference(c, u), rule.difference(c, u)
    (tensor([[1.]]), tensor([[1.5000]]))
    """

    def __init__(self, rule: Rule, b: float) -> None:
        rule_checks.rule("Momentum", rule)
        self.rule, self.b = rule, b
        self.running: Tensor | None = None

    def __call__(self, m: PairMoments, omega: Tensor) -> Guidance:
        return self.rule(m, omega)

    def reset(self) -> None:
        self.running = None

    def difference(self, cond: Tensor, uncond: Tensor, impl: Impl | None = None) -> Tensor:
        """Compute the new running difference, shaped like cond."""
        if self.running is None:
            found = combine((cond, uncond), _row(cond, 1.0), columns=((0, 1),), impl=impl)
        else:
            factors = _row(cond, 1.0, self.b)
            found = combine((cond, uncond, self.running), factors, columns=((0, 1), 2), impl=impl)
        self.running = found.detach()
        return found


class Feedback:
    """Feedback guidance: compute the weight from how much of the sample so far the condition explains.

        w = e^L / (e^L - (1 - pi))                 omega = w - 1, plain cfg
        L <- clamp(L + tau (2 b <x' - mu_c, D> + b^2 ||D||^2) / (2 v) + delta, L_min, L_max)    after each step
        L_min = ln((1 - pi) w_max / (w_max - 1)),  L_0 = 0

    with mu_c and v the mean and variance of the step with churn 1 from the conditional prediction, b the factor of the
    prediction in that step, and x' the sample after the step taken. A step to s = 0, where v = 0, leaves L as it is.

        feedback = Feedback(batch, pi=0.8)
        x_s = guided_step(x, c, u, feedback.omega, levels, ...); feedback.update(x_s, x, c, u, levels, prediction)

    Koulischer et al., arXiv 2506.06085. tau and delta depend on the model; the defaults are our neutral choice.

    >>> Feedback(2, pi=0.5).omega
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        batch: int,
        *,
        pi: float,
        tau: PerSample = 1.0,
        delta: PerSample = 0.0,
        w_max: float = 10.0,
        l_max: float = 3.0,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.count("Feedback", "batch", batch)
        checks.number("Feedback", "pi", pi, 0.0, 1.0)
        if not 0 < pi < 1:
            raise ValueError(f"Feedback: `pi` is {pi}, expected a share in (0, 1)")
        checks.number("Feedback", "w_max", w_max, -math.inf, math.inf)
        checks.number("Feedback", "l_max", l_max, -math.inf, math.inf)
        if not 1 < w_max < math.inf:
            raise ValueError(f"Feedback: `w_max` is {w_max}, expected a weight above 1 (w = 1 + omega)")
        self.pi, self.tau, self.delta = pi, tau, delta
        self.bounds = math.log((1 - pi) * w_max / (w_max - 1)), l_max
        self.log_ratio = torch.zeros(batch, dtype=torch.float64, device=device)

    @property
    def omega(self) -> Tensor:
        ratio = torch.exp(self.log_ratio)
        return (1 - self.pi) / (ratio - (1 - self.pi))

    @torch.no_grad()
    def update(
        self,
        x_s: Tensor,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        levels: Levels,
        prediction: Prediction = "x0",
        impl: Impl | None = None,
    ) -> None:
        """Update L after a step from x at t to x_s at s."""
        checks.samples("Feedback.update", x_s=x_s, x=x, cond=cond, uncond=uncond)
        checks.levels("Feedback.update", levels, prediction, "x_s", x_s)
        a, b, v = step_coefficients(Levels(*(level.double() for level in levels)), prediction, 1.0)
        one, none = torch.ones_like(a), torch.zeros_like(a)
        rows = (one, -a, -b, none), (none, none, none, one)  # x' - mu_c, and D
        factors = torch.stack([torch.stack(row, 1) for row in rows], 1)
        columns = 0, 1, 2, (2, 3)
        dots = combine((x_s, x, cond, uncond), factors, columns=columns, moments=True, written=0, impl=impl).dots
        dots = dots.double()
        moved = (2 * b * dots[:, 0, 1] + b * b * dots[:, 1, 1]) / (2 * torch.where(v > 0, v * v, 1.0))
        after = (self.log_ratio + self.tau * moved + self.delta).clamp(*self.bounds)
        self.log_ratio = torch.where(v > 0, after, self.log_ratio)


def _row(like: Tensor, *factors: float) -> Tensor:
    """Return the same coefficients for each sample."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    ones = torch.ones(like.shape[0], dtype=wide, device=like.device)
    return torch.stack([ones * factor for factor in factors], 1)
