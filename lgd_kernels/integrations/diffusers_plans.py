"""Convert a diffusers scheduler to the StepPlan of the same run, and to the times that omega is a function of.

Everything is read from the scheduler's own tables after its `set_timesteps`, and computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from torch import Tensor

from lgd_kernels.runtime.checks import DIFFUSERS_PREDICTIONS
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.runtime.shown import brief
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.churn import churn_from_eta
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule
from lgd_kernels.sampling.step_plan import StepPlan

DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
KINDS = (DDIM, FLOW, EULER, ANCESTRAL, DPM)
LINEAR: dict[str, dict[str, Any]] = {  # settings of a step that is linear, with factors of the times alone
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
ROUNDING = 1e-5  # relative: the most that sigmas may rise where spacings meet


class VPSigma(Schedule):
    """Preserve the variance at sigma = noise / signal: signal 1 / sqrt(1 + sigma^2). The time is sigma.

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


def check_kind(kind: str) -> None:
    """Raise ValueError unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"FusedScheduler: `scheduler` is a {kind}, expected one of {', '.join(KINDS)}")


def kind_of(scheduler: Any) -> str:
    """Return the one of `KINDS` that a scheduler is an instance of, or raise ValueError."""
    made = type(scheduler)
    known = (kind for kind in KINDS if isinstance(scheduler, getattr(diffusers, kind)))
    kind = next(known, f"{made.__module__}.{made.__qualname__}")
    check_kind(kind)
    return kind


def check(scheduler: Any) -> str:
    """Raise ValueError that names the remedy unless a StepPlan can take a scheduler's step. Returns the kind."""
    kind, made = kind_of(scheduler), type(scheduler)
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
    return kind


def plan_of(scheduler: Any, eta: float = 0.0, *, begins: bool = False) -> StepPlan:
    """Convert the run that `scheduler.set_timesteps` defined to a plan.

    Args:
        scheduler: of one of `KINDS`.
        eta: of DDIM.
        begins: whether each step is the first of a run, so that solvers with a history have none yet.
    """
    kind, config = kind_of(scheduler), scheduler.config
    prediction = _prediction(kind, config)
    if kind == DDIM:
        t = scheduler.timesteps.cpu().long()
        if not bool(((t >= 0) & (t < config["num_train_timesteps"])).all()):
            raise ValueError(f"timesteps are {brief(t)}, expected 0 to {config['num_train_timesteps'] - 1}")
        s = t - config["num_train_timesteps"] // scheduler.num_inference_steps
        s = s.clamp(min=-1 if config["set_alpha_to_one"] else 0)
        table = Discrete(scheduler.alphas_cumprod.cpu(), dtype=torch.float64)
        churn = churn_from_eta(float(eta), table.levels(t, s)) if eta else 0.0
        return solvers.one_step(table, t, to=s, prediction=prediction, churn=churn)
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
    schedule: Schedule = RectifiedFlow() if kind == FLOW else EDM()
    return solvers.one_step(schedule, sigmas, prediction=prediction, churn=float(kind == ANCESTRAL))


def _prediction(kind: str, config: dict[str, Any]) -> Prediction:
    """Return our name for a scheduler's prediction_type. Raises ValueError if its step takes no such prediction."""
    if kind == FLOW:
        return "flow"
    name, flow = config["prediction_type"], kind == DPM and config["use_flow_sigmas"]
    names: dict[str, Any] = {**DIFFUSERS_PREDICTIONS, **({"original_sample": "x0"} if kind == EULER else {})}
    names.pop("v_prediction" if flow else "flow_prediction")
    if name not in names:
        when = " with use_flow_sigmas=True" if flow else ""
        raise ValueError(
            f"FusedScheduler: {kind} has prediction_type={name!r}{when}, expected one of {', '.join(names)}"
        )
    return names[name]


def _falling(sigmas: Tensor) -> Tensor:
    """Replace a rise of sigmas within rounding, where a spacing meets its last sigma, by a step of length 0."""
    lowest = sigmas.cummin(0).values
    return lowest if bool((sigmas - lowest <= ROUNDING * lowest).all()) else sigmas


def times_of(scheduler: Any) -> Tensor:
    """Return the times of omega(c, s, t) in the run of any diffusers scheduler: `[N + 1]` float32.

    The times belong to the model, and are the same for every scheduler that samples it: `timesteps`, indices of the
    training table, and then -1, the data, as in `Discrete`; for flow matching timesteps / num_train_timesteps, t in
    [0, 1] of `RectifiedFlow`, and then 0.
    """
    times, flow = scheduler.timesteps.float(), is_flow(scheduler)
    if flow:
        times = times / scheduler.config["num_train_timesteps"]
    return torch.cat((times, times.new_full((1,), 0.0 if flow else -1.0)))


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler samples a flow-matching model."""
    config = scheduler.config
    flow = any("FlowMatch" in kind.__name__ for kind in type(getattr(scheduler, "inner", scheduler)).__mro__)
    return bool(flow or config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction")
