"""From a diffusers scheduler to the StepPlan that does the same, and to the times that omega is a function of.

Everything is read off the scheduler's own tables after its `set_timesteps`, and worked out in float64.
"""

from __future__ import annotations

import math

import diffusers
import torch
from torch import Tensor

from lgd_kernels.runtime.checks import DIFFUSERS_PREDICTIONS
from lgd_kernels.runtime.shown import brief
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.churn import churn_from_eta
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule
from lgd_kernels.sampling.step_plan import StepPlan

DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
KINDS = (DDIM, FLOW, EULER, ANCESTRAL, DPM)
LINEAR = {  # settings with which a step is no longer linear with factors of the times alone, or another solver
    DDIM: {"clip_sample": False, "thresholding": False},
    FLOW: {"invert_sigmas": False},
    EULER: {},
    ANCESTRAL: {},
    DPM: {
        "thresholding": False,
        "variance_type": None,
        "solver_type": "midpoint",
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    },
}
STEP = (  # a subclass with the same step does not override these
    "step",
    "scale_model_input",
    "convert_model_output",
    "dpm_solver_first_order_update",
    "multistep_dpm_solver_second_order_update",
    "_sigma_to_alpha_sigma_t",
    "_get_variance",
)
ROUNDING = 1e-5  # relative: how far two sigmas may differ where spacings meet


class VPSigma(Schedule):
    """Variance preserving, by sigma = noise / signal: signal 1 / sqrt(1 + sigma^2). The time is sigma.

    >>> import torch
    >>> VPSigma().signal_noise(torch.tensor([0.75]))
    (tensor([0.8000]), tensor([0.6000]))
    """

    span = (0.0, math.inf)

    def signal_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal = torch.rsqrt(1 + t * t)
        return signal, t * signal

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        return (t - s) * torch.rsqrt(1 + t * t) * torch.rsqrt(1 + s * s)


def check_kind(kind: str | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"FusedScheduler: `scheduler` is a {kind}, expected one of {', '.join(KINDS)}")


def kind_of(scheduler) -> str | None:
    """The one of `KINDS` that a scheduler is an instance of, or None."""
    return next((kind for kind in KINDS if isinstance(scheduler, getattr(diffusers, kind))), None)


def check(scheduler) -> None:
    """Whether a scheduler's step is a StepPlan's. Raises ValueError that says what to change."""
    kind, made = kind_of(scheduler), type(scheduler)
    if kind is None:
        check_kind(f"{made.__module__}.{made.__qualname__}")
    base, config = getattr(diffusers, kind), scheduler.config
    for name in STEP:
        if getattr(made, name, None) is not getattr(base, name, None):
            raise ValueError(
                f"FusedScheduler: `scheduler` is a {made.__qualname__}, whose {name} is its own, expected {kind}'s"
            )
    _prediction(kind, config)
    for name, value in LINEAR[kind].items():
        if config[name] not in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(
                f"FusedScheduler: {kind} has {name}={config[name]!r}, expected {value!r}: "
                f"{kind}.from_config(scheduler.config, {name}=...)"
            )


def plan_of(scheduler, eta: float = 0.0, *, begins: bool = False) -> StepPlan:
    """The run that `scheduler.set_timesteps` laid out, as a plan.

    Args:
        scheduler: of one of `KINDS`.
        eta: DDIM's.
        begins: the plan of a first step, wherever it is taken: solvers that remember have nothing to remember yet.
    """
    kind, config = kind_of(scheduler), scheduler.config
    prediction = _prediction(kind, config)
    if kind == DDIM:
        t = scheduler.timesteps.cpu().long()
        if not bool(((t >= 0) & (t < config["num_train_timesteps"])).all()):
            raise ValueError(f"timesteps are {brief(t)}, expected 0 to {config['num_train_timesteps'] - 1}")
        s = t - config["num_train_timesteps"] // scheduler.num_inference_steps
        s = s.clamp(min=-1 if config["set_alpha_to_one"] else 0)
        schedule = Discrete(scheduler.alphas_cumprod.cpu(), dtype=torch.float64)
        churn = churn_from_eta(float(eta), schedule.levels(t, s)) if eta else 0.0
        return solvers.one_step(schedule, t, to=s, prediction=prediction, churn=churn)
    sigmas = _falling(scheduler.sigmas[: len(scheduler.timesteps) + 1].cpu().double())
    if kind == FLOW and config["stochastic_sampling"]:
        return solvers.consistency(RectifiedFlow(), sigmas, prediction=prediction)
    if kind == DPM:
        flow = config["use_flow_sigmas"]
        first = torch.full((sigmas.numel() - 1,), begins or config["solver_order"] == 1, device="cpu")
        first[-1] |= config["euler_at_final"] or (config["lower_order_final"] and first.numel() < 15)
        return solvers.dpm_solver_2m(
            RectifiedFlow() if flow else VPSigma(),
            sigmas,
            prediction=prediction,
            stochastic=config["algorithm_type"] == "sde-dpmsolver++",
            first_order=first,
        )
    schedule = RectifiedFlow() if kind == FLOW else EDM()
    return solvers.one_step(schedule, sigmas, prediction=prediction, churn=float(kind == ANCESTRAL))


def _prediction(kind: str, config: dict) -> str:
    """Our name for a scheduler's prediction_type. Raises ValueError if its step takes no such prediction."""
    if kind == FLOW:
        return "flow"
    name, flow = config["prediction_type"], kind == DPM and config["use_flow_sigmas"]
    names = {**DIFFUSERS_PREDICTIONS} | ({"original_sample": "x0"} if kind == EULER else {})
    names.pop("v_prediction" if flow else "flow_prediction")
    if name not in names:
        when = " with use_flow_sigmas=True" if flow else ""
        raise ValueError(
            f"FusedScheduler: {kind} has prediction_type={name!r}{when}, expected one of {', '.join(names)}"
        )
    return names[name]


def _falling(sigmas: Tensor) -> Tensor:
    """Sigmas that rise by no more than rounding, where a spacing meets its last sigma, made a step of length 0."""
    lowest = sigmas.cummin(0).values
    return lowest if bool((sigmas - lowest <= ROUNDING * lowest).all()) else sigmas


def times_of(scheduler) -> Tensor:
    """What t and s an omega is asked about: `[N + 1]` float32, of any diffusers scheduler's run.

    They are times of the model, the same for every scheduler that samples it: `timesteps`, indices of its training
    table, and at last -1, the data, as in `Discrete`; for flow matching timesteps / num_train_timesteps, t in [0, 1] of
    `RectifiedFlow`, and at last 0.
    """
    times, config = scheduler.timesteps.float(), scheduler.config
    flow = any("FlowMatch" in kind.__name__ for kind in type(getattr(scheduler, "inner", scheduler)).__mro__)
    flow = flow or config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    if flow:
        times = times / config["num_train_timesteps"]
    return torch.cat((times, times.new_full((1,), 0.0 if flow else -1.0)))
