"""Take the steps of public policy-gradient trainers for diffusion, with their signatures, in the kernels.

    from lgd_kernels.integrations.rl import sde_step_with_logprob     # Flow-GRPO, and Flow-CPS with sde_type="cps"
    from lgd_kernels.integrations.rl import ddim_step_with_logprob    # DDPO
    SchedulerRLMixin.flow_sde_sampling = rl.flow_sde_sampling         # SGLang's rollouts

Each function computes the formulas of the library that it is named after. Three things differ:

* log p is that of x_s as it is stored. x_s is drawn, rounded to its dtype, and then scored, in float64. So a score of
  the stored x_s gives the same number, and the first ratio of an update is exactly 1. The public codes score x_s before
  it is rounded.
* log p is float64; `.float()` rounds it.
* Where the standard deviation is 0, log p of a drawn x_s is 0, and of a given x_s NaN. (In the public codes it is NaN
  or infinite.)

Tensors may have any float dtype; no copy in float32 is needed.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.integrations.rl_coefficients import cps_coefficients, ddim_coefficients, sde_coefficients
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup, StepCoefficients, per_sample
from lgd_kernels.sampling import density

Generators = torch.Generator | list[torch.Generator]


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators | None = None,
    sde_type: Literal["sde", "cps"] = "sde",
    return_sqrt_dt: bool = False,
    *,
    uncond: Tensor | None = None,
    omega: float | Tensor | OmegaLookup | None = None,
    normalized: bool | None = None,
    with_mean: bool = True,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[Any, ...]:
    """Take Flow-GRPO's step of a flow model, or score one: the function of this name in its repository.

        "sde"   mean = x + (v + s_t^2 / (2 t) (x + (1 - t) v)) (s - t)      std = s_t sqrt(t - s)
                s_t = noise_level sqrt(t / (1 - t)), at t = 1 with the second sigma of the schedule in 1 - t
        "cps"   mean = (1 - s) (x - t v) + s cos(a) (x + (1 - t) v)         std = s sin(a),  a = noise_level pi / 2

    "cps" is Flow-CPS. Its code returns `-(x_s - mean)^2` as log p, and so does this function unless `normalized` is
    set. "sde" adds more noise than the marginals of the flow hold, at its last step too.

    Args:
        self: a FlowMatchEulerDiscreteScheduler, or any object with `sigmas` and `index_for_timestep`.
        model_output: v, `[B, ...]`; guided already, unless `uncond` is given.
        timestep: the scheduler's, one for all samples or `[B]`.
        sample: x at this timestep, `[B, ...]`.
        noise_level: 0 or more; for "cps" in [0, 1].
        prev_sample: the x_s to score; None draws one.
        generator: draws the noise of Flow-GRPO, in float32; a list has one for each sample. None is torch's own.
        return_sqrt_dt: whether to return sqrt(t - s) too.
        uncond, omega: guide in the kernel: v = model_output + omega (model_output - uncond), with omega = w - 1 for a
            `guidance_scale` of w. The gradient reaches all three.
        normalized: whether log p is the density of the normal distribution, or `-(x_s - mean)^2`. None is True for
            "sde" and False for "cps".
        with_mean: whether to compute the mean. It is one more pass, and only a KL penalty reads it.
        seed, first_sample: draw the noise in the kernel, as in `guided_step`, instead of `generator`.
        dtype: that x_s is stored in; None is the dtype of `sample`. Set it where x_s is rounded after this call.
        impl: "triton", "cpu" or "reference"; None chooses.

    Returns `(x_s, log p, mean, s_t)`, and sqrt(t - s) if asked for: x_s in `dtype`, log p `[B]` in float64, averaged
    over elements, mean in float32 (None without `with_mean`), s_t (for "cps" std) and sqrt(t - s) in float32, `[B, 1,
    ...]`. Differentiable in model_output, uncond, omega and sample, through the mean.

    Raises TypeError or ValueError, naming the argument.

    Source: arXiv 2505.05470 (Flow-GRPO), arXiv 2509.05952 (Flow-CPS).

    >>> import torch
    >>> from types import SimpleNamespace as Scheduler  # stands for diffusers' FlowMatchEulerDiscreteScheduler
    >>> sigmas = torch.tensor([1.0, 0.5, 0.0])
    >>> scheduler = Scheduler(sigmas=sigmas, index_for_timestep=lambda t: [1000, 500].index(int(t)))
    >>> x, v = torch.zeros(1, 4), torch.ones(1, 4)
    >>> x_s, log_p, mean, _ = sde_step_with_logprob(scheduler, v, 500, x, seed=0)
    >>> mean[0, 0], torch.equal(log_p, sde_step_with_logprob(scheduler, v, 500, x, prev_sample=x_s)[1])
    (tensor(-0.6225), True)
    """
    op = "sde_step_with_logprob"
    if not isinstance(sde_type, str) or sde_type not in ("sde", "cps"):
        raise ValueError(f"{op}: `sde_type` is {sde_type!r}, expected sde or cps")
    checks.number(op, "noise_level", noise_level, 0, 1 if sde_type == "cps" else math.inf)
    _check(op, model_output, sample, prev_sample, uncond, omega, generator, seed)
    t, s = _sigmas(op, self, timestep, sample)
    noise = None
    if prev_sample is None and seed is None:
        noise = _randn(sample, generator, torch.float32)
    if sde_type == "sde":
        coefficients, spread = sde_coefficients(t, s, noise_level, self.sigmas[1].to(t.device, torch.float64))
    else:
        coefficients = cps_coefficients(t, s, noise_level)
        spread = coefficients.noise
    guided = _Guided(model_output, uncond, omega)
    normalized = sde_type == "sde" if normalized is None else normalized
    drawn = _Drawn(prev_sample, noise, seed, first_sample, dtype)
    x_s, log_prob = _scored(op, sample, guided, coefficients, drawn, normalized, impl)
    mean = density.mean(sample, *guided, coefficients, impl) if with_mean else None
    found = (x_s, log_prob, mean, per_sample(spread.float(), sample))
    return (*found, per_sample(torch.sqrt(t - s).float(), sample)) if return_sqrt_dt else found


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators | None = None,
    prev_sample: Tensor | None = None,
    *,
    uncond: Tensor | None = None,
    omega: float | Tensor | OmegaLookup | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Take DDPO's step of an eps, x0 or v model, or score one: the function of this name in ddpo-pytorch, and TRL's.

        std  = eta sqrt((1 - a_s) / (1 - a_t) (1 - a_t / a_s))           a = alphas_cumprod
        mean = sqrt(a_s) x0 + sqrt(1 - a_s - std^2) eps

    s is t less `num_train_timesteps // num_inference_steps`, and 0 where that is below 0.

    Args:
        self: a DDIMScheduler, without `clip_sample` and `thresholding`: they make x0 a function of the data, and the
            mean no longer linear.
        model_output: the prediction, `[B, ...]`; guided already, unless `uncond` is given.
        timestep: the scheduler's, one for all samples or `[B]`.
        sample: x at this timestep, `[B, ...]`.
        eta: in [0, 1]. 0, the default of DDPO's code, draws no noise, and has no density.
        use_clipped_model_output: of no effect without clipping.
        generator, prev_sample, uncond, omega, seed, first_sample, dtype, impl: as in `sde_step_with_logprob`. The noise
            of `generator` has the dtype of model_output.

    Returns `(x_s, log p)`: x_s in `dtype`, log p `[B]` in float64, averaged over elements.

    Raises TypeError or ValueError, naming the argument; for a scheduler that clips, or that has no timesteps yet.

    Source: arXiv 2305.13301 (DDPO), arXiv 2010.02502, Eq. 12 and 16.

    >>> import torch
    >>> from types import SimpleNamespace as Scheduler  # stands for diffusers' DDIMScheduler
    >>> config = Scheduler(num_train_timesteps=4, prediction_type="epsilon", clip_sample=False, thresholding=False)
    >>> alphas = torch.tensor([0.9, 0.6, 0.3, 0.1])
    >>> scheduler = Scheduler(config=config, num_inference_steps=4, alphas_cumprod=alphas)
    >>> x = torch.ones(1, 4)
    >>> x_s, log_p = ddim_step_with_logprob(scheduler, x, 3, x, eta=1.0, seed=0)
    >>> torch.equal(log_p, ddim_step_with_logprob(scheduler, x, 3, x, eta=1.0, prev_sample=x_s)[1])
    True
    """
    op = "ddim_step_with_logprob"
    checks.number(op, "eta", eta, 0, 1)
    _check(op, model_output, sample, prev_sample, uncond, omega, generator, seed)
    for name in ("clip_sample", "thresholding"):
        if getattr(self.config, name, False):
            raise ValueError(
                f"{op}: `self.config.{name}` is True, which clips x0 by its values, expected False; "
                f"DDIMScheduler.from_config(scheduler.config, {name}=False), as Stable Diffusion has it"
            )
    if self.num_inference_steps is None:
        raise ValueError(f"{op}: `self.num_inference_steps` is None; scheduler.set_timesteps(n) sets it")
    prediction = checks.DIFFUSERS_PREDICTIONS.get(self.config.prediction_type, "flow")
    if prediction == "flow":
        kind = self.config.prediction_type
        raise ValueError(f"{op}: `self.config.prediction_type` is {kind!r}, expected epsilon, sample or v_prediction")
    t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
    s = (t - self.config.num_train_timesteps // self.num_inference_steps).clamp(min=0)
    alphas = self.alphas_cumprod.to(sample.device, torch.float64)
    coefficients = ddim_coefficients(alphas[t], alphas[s], eta, prediction)
    noise = None
    if prev_sample is None and seed is None:
        noise = _randn(sample, generator, model_output.dtype)
    guided = _Guided(model_output, uncond, omega)
    drawn = _Drawn(prev_sample, noise, seed, first_sample, dtype)
    return _scored(op, sample, guided, coefficients, drawn, True, impl)


def flow_sde_sampling(
    self: Any,
    batch: Any,
    model_output: Tensor,
    sample: Tensor,
    current_sigma: Tensor,
    next_sigma: Tensor,
    generator: Generators,
) -> Tensor:
    """Take a step of SGLang's rollouts: the method of this name of its SchedulerRLMixin.

    `batch.rollout_sde_type` is "sde" or "cps", as in `sde_step_with_logprob`, or "ode", the plain step. So is a step
    that `batch.rollout_sde_step_indices` leaves out. The noise is SGLang's, and log p goes where SGLang puts it. x_s
    has the dtype of model_output, to which SGLang's scheduler rounds it.

    To train on a rollout, score its latents with `sde_step_with_logprob`, from a scheduler with its sigmas.

    Raises ValueError for a type of step that is not one of the three, and under sequence parallelism, where a process
    holds a part of each sample.
    """
    op = "flow_sde_sampling"
    session, kind = self._get_rollout_session_data(batch), batch.rollout_sde_type
    if kind not in ("sde", "cps", "ode"):
        raise ValueError(f"{op}: `batch.rollout_sde_type` is {kind!r}, expected sde, cps or ode")
    if session.latents_shape is not None and math.prod(session.latents_shape) != model_output.numel():
        raise ValueError(
            f"{op}: `model_output` has shape {list(model_output.shape)}, expected {list(session.latents_shape)}, whole "
            "samples; without sequence parallelism a process holds these"
        )
    chosen, at = (getattr(batch, name, None) for name in ("rollout_sde_step_indices", "_rollout_loop_step_index"))
    if chosen is not None and at is not None and at not in chosen:
        kind = "ode"
    count, size = model_output.shape[0], math.prod(model_output.shape[1:])
    t, s = (_each(one, count, sample).double() for one in (current_sigma, next_sigma))
    debugged = getattr(batch, "rollout_debug_mode", False)
    mean: Tensor | None = None
    if kind == "ode":
        x_s = mean = sample + (next_sigma - current_sigma) * model_output  # with the bits of the scheduler's own step
        noise, std = torch.zeros_like(model_output), torch.zeros_like(t)
        log_prob = torch.zeros(count, dtype=torch.float64, device=sample.device)
    else:
        level, normalized = float(batch.rollout_noise_level), not batch.rollout_log_prob_no_const
        drawn_as = model_output.new_empty(model_output.shape, dtype=torch.float32)
        noise = self._rollout_variance_noise(batch, drawn_as, generator)
        coefficients = (
            sde_coefficients(t, s, level, torch.as_tensor(session.sigma_max, device=t.device, dtype=torch.float64))[0]
            if kind == "sde"
            else cps_coefficients(t, s, level)
        )
        guided, std = _Guided(model_output), coefficients.noise
        x_s, log_prob = _scored(
            op, sample, guided, coefficients, _Drawn(noise=noise, dtype=model_output.dtype), normalized, None
        )
        mean = density.mean(sample, *guided, coefficients, None) if debugged else None
    if debugged:
        self.append_local_rollout_debug_tensors(
            batch, variance_noise=noise, prev_sample_mean=mean, noise_std_dev=per_sample(std.float(), sample),
            model_output=model_output,
        )  # fmt: skip
    if len(inspect.signature(self.append_local_rollout_log_probs).parameters) == 3:  # sums and counts
        self.append_local_rollout_log_probs(batch, log_prob * size, torch.full_like(log_prob, size))
    else:
        self.append_local_rollout_log_probs(batch, log_prob)
    return x_s


class _Guided(NamedTuple):
    """Hold a prediction, and what guides it."""

    cond: Tensor
    uncond: Tensor | None = None
    omega: float | Tensor | OmegaLookup | None = None


class _Drawn(NamedTuple):
    """Hold an x_s to score, or what draws one."""

    x_s: Tensor | None = None
    noise: Tensor | None = None
    seed: int | Tensor | None = None
    first_sample: int = 0
    dtype: torch.dtype | None = None


def _check(
    op: str,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    uncond: Tensor | None,
    omega: float | Tensor | OmegaLookup | None,
    generator: Generators | None,
    seed: int | Tensor | None,
) -> None:
    """Check what two of the functions share."""
    named = {"sample": sample, "model_output": model_output, "prev_sample": prev_sample, "uncond": uncond}
    checks.samples(op, **{name: one for name, one in named.items() if one is not None or name == "model_output"})
    density.check_weight(op, uncond, omega, "sample", sample)
    sources = {"prev_sample": prev_sample, "generator": generator, "seed": seed}
    given = [name for name, one in sources.items() if one is not None]
    if len(given) > 1:
        raise ValueError(f"{op}: `{given[0]}` and `{given[1]}` were both given, expected one of them")


def _scored(
    op: str,
    sample: Tensor,
    guided: _Guided,
    coefficients: StepCoefficients,
    given: _Drawn,
    normalized: bool,
    impl: Impl | None,
) -> tuple[Tensor, Tensor]:
    """Draw x_s if it is not given, and round it to its dtype; return it with its log p, averaged over elements."""
    x_s, noise, seed, first_sample, dtype = given
    if x_s is None:
        if seed is not None:
            checks.seed(op, seed, first_sample, sample.shape[0], sample)
        dtype = sample.dtype if dtype is None else dtype
        wide = sample.to(torch.promote_types(sample.dtype, dtype))
        x_s = density.draw(wide, *guided, coefficients, noise, seed, first_sample, impl).to(dtype)
    x_s = x_s.detach()
    squares = density.residual(x_s, sample, *guided, coefficients, impl)
    count = math.prod(sample.shape[1:])
    if not normalized:
        return x_s, -squares / count
    return x_s, density.log_normal(squares, coefficients.noise, count, given.x_s is None) / count


def _sigmas(op: str, scheduler: Any, timestep: float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Look t and s up in the scheduler, each `[B]` in float64."""
    steps = timestep.reshape(-1) if isinstance(timestep, Tensor) else [timestep]
    try:
        index = torch.tensor([scheduler.index_for_timestep(one) for one in steps], device=scheduler.sigmas.device)
    except (IndexError, ValueError):
        raise ValueError(
            f"{op}: `timestep` is {timestep}, expected one or [B] of scheduler.timesteps; scheduler.set_timesteps(n) "
            "makes them"
        ) from None
    t, s = (_each(scheduler.sigmas[one], sample.shape[0], sample).double() for one in (index, index + 1))
    return t, s


def _each(values: Tensor, batch: int, like: Tensor) -> Tensor:
    """Return one value, or one for each sample, as `[B]` on the device of `like`."""
    return torch.as_tensor(values, device=like.device).reshape(-1).expand(batch)


def _randn(like: Tensor, generator: Generators | None, dtype: torch.dtype) -> Tensor:
    """Draw normals of the shape of `like`, where the generator is, as diffusers does; a list draws sample by sample."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([_randn(one, each, dtype) for one, each in zip(like.split(1), generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)
