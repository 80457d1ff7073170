"""The public functions that guide: both take a weight for each sample, and both take another rule."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lgd_kernels.guidance import run
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.ops.guided_score import op as score
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.ops.guided_step import op as step
from lgd_kernels.ops.guided_step.structs import GuidedStep
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.arguments import Omega
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import Levels, OmegaLookup, Prediction


def guided_score(
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    *,
    rule: Rule | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Classifier-free guidance with one weight for each sample, in a single pass over memory.

        guided = cond + omega (cond - uncond)

    omega = 0 is the conditional prediction alone; libraries that write `uncond + w (cond - uncond)` mean
    `w = 1 + omega`.

    Args:
        cond, uncond: predictions with the condition and without it, `[B, ...]`; float32, bfloat16, float16 or float64,
            mixed as you like, with any strides. An `uncond` that is `expand`ed over the batch is not copied.
        omega: a float; a tensor `[B]` of any float dtype; or `OmegaTable.at(c, s, t)`, looked up inside the kernel.
        rule: another rule than the one above, from `lgd_kernels.rules` or your own: `guided = k_c cond + k_d (cond -
            uncond)` with coefficients it makes of omega and, in a pass of their own, of moments. It runs on "triton",
            "cpu" and "reference".
        impl: "triton", "cuda", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `[B, ...]`, contiguous, in the dtype of `cond`. Arithmetic is float32 (float64 where a tensor is), rounded
    once. A condition outside the table gives NaN.

    Differentiable in cond, uncond and omega (in the table's values, for a lookup), any number of times; also under
    vmap, jvp and func.grad, where the reference runs. `torch.ops.lgd.guided_score`, the raw operator, is not.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, device or impl.

    Source: Ho and Salimans, arXiv 2207.12598; omega per sample: arXiv 2510.00815, Eq. 5.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.guided_score(torch.tensor([[2.0]]), torch.tensor([[1.0]]), omega=0.5)
    tensor([[2.5000]])
    """
    checks.samples("guided_score", cond=cond, uncond=uncond)
    checks.omega("guided_score", omega, "cond", cond)
    a = GuidedScore(cond, uncond, Omega.of(omega, cond))
    return score.guided_score(a, impl) if rule is None else run.guided_score(a, rule, impl)


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    *,
    prediction: Prediction = "x0",
    churn: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    rule: Rule | None = None,
    rule_space: Literal["prediction", "x0"] = "prediction",
    impl: Impl | None = None,
) -> Tensor:
    """One guided denoising step from t to s, in a single pass over memory and one launch.

        g   = cond + omega (cond - uncond)
        q   = gap / (signal_s noise_t),  r = 1 - q,  h = 1 - churn^2 q
        x_s = (noise_s / noise_t) h x + signal_s q (1 + churn^2 r) x0(x, g) + noise_s sqrt(churn^2 q (2 - churn^2 q)) z

    where x0(x, g) reads the prediction p = g, with a = signal_t and n = noise_t, as

        "x0": p    "eps": (x - n p) / a    "v": a x / (a^2 + n^2) - n p / sqrt(a^2 + n^2)
        "flow" (p = z - x0): (x - n p) / (a + n)

    churn = 0 is DDIM (Euler for rectified flow), churn = 1 the DDPM posterior. The step preserves the marginals: if x
    is distributed as at t and x0(x, g) is the data, x_s is distributed as at s. s = t is the identity.

    Args:
        x: the sample at t, `[B, ...]`.
        cond, uncond: predictions with and without the condition, shaped like x. x, cond, uncond and noise are float32,
            bfloat16, float16 or float64, mixed as you like, with any strides.
        omega: a float; a tensor `[B]` of any float dtype; or `OmegaTable.at(c, s, t)`, looked up inside the kernel.
            omega = 0 is the conditional prediction alone (`w = 1 + omega` elsewhere).
        levels: `schedule.levels(t, s)`; every sample may have its own times.
        prediction: "x0", "eps", "v" (as in diffusers) or "flow".
        churn: in [0, 1], a float or `[B]`. Above 0 (or as a tensor) it needs `noise` or `seed`. None means 0, and
            raises ValueError for `noise` or `seed`; churn=0.0 ignores them. For DDIM's eta, `churn_from_eta(eta,
            levels)`.
        noise: standard normals shaped like x.
        seed: an int64 number, 0-dim tensor or `[B]`: z is drawn inside the kernel and never stored;
            `philox_normal(x.shape, seed, stream=1)` is the same noise. With a seed for each sample a sample's noise
            does not depend on its place in the batch.
        first_sample: index of x[0] in the whole batch, where that is split over processes. Of no effect on `[B]` seeds.
        rule: another rule for g than the one above, from `lgd_kernels.rules` or your own: a combination of x, cond and
            cond - uncond with coefficients made of omega and, in a pass of their own, of moments. It runs on "triton",
            "cpu" and "reference".
        rule_space: where the rule takes its moments: "prediction", as predicted, or "x0", which for other predictions
            is a pass of its own. (Linear rules, such as the one above, are the same in both.)
        impl: "triton", "cuda", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns x_s `[B, ...]`, contiguous, in the dtype of x. Arithmetic is float32 (float64 where a tensor is), rounded
    once; the coefficients are computed in the dtype of the levels.

    Differentiable in x, cond, uncond, noise and omega (in the table's values, for a lookup), any number of times, but
    not in levels and churn; also under vmap, jvp and func.grad, where the reference runs. Under vmap pass `noise`: a
    seed is refused there (compiled, it is not noticed, and every entry draws the same).
    `torch.ops.lgd.guided_step`, the raw operator, is not differentiable. Same inputs, same bits, on any thread count.

    Raises TypeError or ValueError, naming the argument, before anything is written. Values (s after t, churn outside
    [0, 1], "eps" at signal_t = 0) raise where they can be seen without a device sync; elsewhere that sample is NaN, as
    is one whose condition is outside the table.

    Source: arXiv 2510.00815, Eq. 2, 8 and 23.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(torch.tensor([1.0]), torch.tensor([0.5]))
    >>> lgd.guided_step(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]]), 1.0, levels)
    tensor([[2.]])
    """
    checks.samples("guided_step", x=x, cond=cond, uncond=uncond, noise=noise)
    checks.omega("guided_step", omega, "x", x)
    checks.levels("guided_step", levels, prediction, "x", x)
    stated, churn = churn, 0.0 if churn is None else churn
    checks.churn("guided_step", churn, "x", x)
    checks.noise("guided_step", churn, noise, seed)
    if seed is not None:
        checks.seed("guided_step", seed, first_sample, x.shape[0], x)
    elif type(first_sample) is not int or first_sample:
        checks.first_sample("guided_step", first_sample)
    if stated is None:
        checks.unused("guided_step", noise, seed)
    if not isinstance(rule_space, str) or rule_space not in ("prediction", "x0"):
        raise ValueError(f"guided_step: `rule_space` is {rule_space!r}, expected one of prediction, x0")
    a = GuidedStep.of(
        x,
        cond,
        uncond,
        omega,
        levels,
        prediction=prediction,
        churn=churn,
        noise=noise,
        seed=seed,
        first_sample=first_sample,
    )
    return step.guided_step(a, impl) if rule is None else run.guided_step(a, rule, rule_space, impl)
