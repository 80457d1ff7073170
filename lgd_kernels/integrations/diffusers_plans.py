"""From a diffusers scheduler to the StepPlan that does the same, and to the times that omega is a function of.

Everything is read off the scheduler's own tables after its `set_timesteps`, and worked out in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels import solvers
from lgd_kernels.churn import churn_from_eta
from lgd_kernels.schedules import EDM, Discrete, RectifiedFlow, Schedule
from lgd_kernels.solvers import StepPlan

DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
KINDS = (DDIM, FLOW, EULER, ANCESTRAL, DPM)
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
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


def check(kind: str, config: dict) -> None:
    """Whether a scheduler's step is a StepPlan's. Raises ValueError that says what to change."""
    check_kind(kind)
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
    kind, config = type(scheduler).__name__, scheduler.config
    prediction = "flow" if kind == FLOW else PREDICTIONS[config["prediction_type"]]
    if eta and kind != DDIM:
        raise ValueError(f"FusedScheduler: `eta` is {eta} for {kind}, expected 0: it is a parameter of {DDIM}")
    if kind == DDIM:
        t = scheduler.timesteps.cpu().long()
        s = t - config["num_train_timesteps"] // scheduler.num_inference_steps
        s = s.clamp(min=-1 if config["set_alpha_to_one"] else 0)
        schedule = Discrete(scheduler.alphas_cumprod.cpu(), dtype=torch.float64)
        churn = churn_from_eta(float(eta), schedule.levels(t, s)) if eta else 0.0
        return solvers.one_step(schedule, t, to=s, prediction=prediction, churn=churn)
    sigmas = scheduler.sigmas.cpu().double()
    if kind == FLOW and config["stochastic_sampling"]:
        return solvers.consistency(RectifiedFlow(), sigmas, prediction=prediction)
    if kind == DPM:
        flow = config["use_flow_sigmas"]
        first = torch.full((sigmas.numel() - 1,), begins or config["solver_order"] == 1)
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


def times_of(scheduler) -> Tensor:
    """What t and s an omega is asked about: `[N + 1]` float32, of any diffusers scheduler's run.

    They are times of the model, the same for every scheduler that samples it: `timesteps`, indices of its training
    table, and at last -1, the data, as in `Discrete`; for flow matching timesteps / num_train_timesteps, t in [0, 1] of
    `RectifiedFlow`, and at last 0.
    """
    times, config = scheduler.timesteps.float(), scheduler.config
    flow = "FlowMatch" in type(scheduler).__name__ or "FlowMatch" in config.get("fused", "")
    flow = flow or config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    if flow:
        times = times / config["num_train_timesteps"]
    return torch.cat((times, times.new_full((1,), 0.0 if flow else -1.0)))
