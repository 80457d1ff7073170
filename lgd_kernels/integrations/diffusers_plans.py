"""Convert a diffusers scheduler to the StepPlan of the same run, and to the times that omega is a function of.

Everything is read from the scheduler's own tables after its `set_timesteps`, and computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from torch import Tensor

from lgd_kernels.integrations import diffusers_tables as tables
from lgd_kernels.runtime.checks import DIFFUSERS_PREDICTIONS
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.runtime.shown import brief
from lgd_kernels.sampling import plan_checks, solvers
from lgd_kernels.sampling.churn import churn_from_eta
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule
from lgd_kernels.sampling.step_plan import StepPlan

DDIM, DDPM, PNDM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler"
LCM, TCD = "LCMScheduler", "TCDScheduler"
FLOW, FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, LMS = "HeunDiscreteScheduler", "LMSDiscreteScheduler"
DPM, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
BY_INDEX = (DDIM, DDPM, PNDM, LCM, TCD)  # with times that are indices of the model's table
SCALED = (EULER, ANCESTRAL, HEUN, LMS)  # with a sample that is scaled for the network
ETAS = {DDIM: 0.0, TCD: 0.3}  # the default eta of a step; TCD calls it gamma
LINEAR: dict[str, dict[str, Any]] = {  # settings of a step that is linear, with factors of the times alone
    DDIM: {"clip_sample": False, "thresholding": False},
    DDPM: {
        "clip_sample": False,
        "thresholding": False,
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    },
    PNDM: {"skip_prk_steps": True},
    LCM: {"clip_sample": False, "thresholding": False},
    TCD: {},
    FLOW: {"invert_sigmas": False},
    FLOW_HEUN: {},
    EULER: {},
    ANCESTRAL: {},
    HEUN: {"clip_sample": False},
    LMS: {},
    DPM: {
        "thresholding": False,
        "variance_type": None,
        "solver_order": (2, 1, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    },
    SINGLE: {"thresholding": False, "variance_type": None, "algorithm_type": "dpmsolver++"},
    UNIPC: {
        "thresholding": False,
        "predict_x0": True,
        "solver_order": (2, 1),
        "disable_corrector": [],
        "solver_p": None,
    },
    DEIS: {"thresholding": False, "solver_order": (2, 1, 3)},
}
KINDS = tuple(LINEAR)
STEP = (  # a subclass with the same step does not override these
    "step",
    "step_plms",
    "scale_model_input",
    "convert_model_output",
    "dpm_solver_first_order_update",
    "multistep_dpm_solver_second_order_update",
    "multistep_dpm_solver_third_order_update",
    "singlestep_dpm_solver_update",
    "multistep_uni_p_bh_update",
    "multistep_uni_c_bh_update",
    "deis_first_order_update",
    "multistep_deis_second_order_update",
    "multistep_deis_third_order_update",
    "get_lms_coefficient",
    "previous_timestep",
    "_get_prev_sample",
    "_sigma_to_alpha_sigma_t",
    "_get_variance",
)
WARM = {PNDM: 4, LMS: 3, UNIPC: 2}  # calls after which a run no longer depends on where it began
FLOWS = ("LTXEulerAncestralRFScheduler", "FlowMapEulerDiscreteScheduler", "PiflowScheduler")  # of flow matching too
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
        values = value if isinstance(value, tuple) else (value,)
        if config[name] not in values:
            raise ValueError(
                f"FusedScheduler: {kind} has {name}={config[name]!r}, expected {' or '.join(map(repr, values))}: "
                f"{kind}.from_config(scheduler.config, {name}={values[0]!r})"
            )
    return kind


def warm(scheduler: Any) -> int:
    """Return after how many calls the steps of a run no longer depend on where it began."""
    kind = kind_of(scheduler)
    return WARM.get(kind, scheduler.config["solver_order"] - 1 if kind in (DPM, SINGLE, DEIS) else 0)


def plan_of(scheduler: Any, eta: float = 0.0, *, since: int = 4) -> StepPlan:
    """Convert the run that `scheduler.set_timesteps` defined to a plan.

    Args:
        scheduler: of one of `KINDS`.
        eta: of the schedulers in `ETAS`.
        since: how many calls of the run there were before each step, so that solvers with a history know how much of it
            there is; a step i that has fewer before it in the table has i. `warm(scheduler)` or more is all.
    """
    kind, config = kind_of(scheduler), scheduler.config
    prediction = _prediction(kind, config)
    if kind in BY_INDEX:
        t = scheduler.timesteps.cpu().long()
        if not bool(((t >= 0) & (t < config["num_train_timesteps"])).all()):
            raise ValueError(f"timesteps are {brief(t)}, expected 0 to {config['num_train_timesteps'] - 1}")
        model = Discrete(scheduler.alphas_cumprod.cpu(), dtype=torch.float64)
        if kind == DDIM:
            s = tables.index_before(scheduler, t)
            churn = churn_from_eta(float(eta), model.levels(t, s)) if eta else 0.0
            return solvers.one_step(model, t, to=s, prediction=prediction, churn=churn)
        if kind == TCD:
            made = tables.tcd(scheduler, model, prediction, eta)
        elif kind == PNDM:
            made = tables.pndm(scheduler, model, prediction, since)
        else:
            made = (tables.ddpm if kind == DDPM else tables.lcm)(scheduler, model, prediction)
        return StepPlan(t, made, prediction=prediction)
    if kind in (HEUN, FLOW_HEUN):
        sigmas = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1::2]))
    else:
        sigmas = scheduler.sigmas[: len(scheduler.timesteps) + 1]
    sigmas = _falling(sigmas.cpu().double())
    if kind == HEUN:
        return solvers.edm_heun(sigmas, prediction=prediction)
    if kind == FLOW and config["stochastic_sampling"]:
        return solvers.consistency(RectifiedFlow(), sigmas, prediction=prediction)
    if kind in (FLOW, EULER, ANCESTRAL):
        schedule: Schedule = RectifiedFlow() if kind == FLOW else EDM()
        return solvers.one_step(schedule, sigmas, prediction=prediction, churn=float(kind == ANCESTRAL))
    plan_checks.times(kind, "sigmas", sigmas)
    if kind not in (FLOW_HEUN, DPM) and bool((sigmas.diff()[:-1] == 0).any()):
        raise ValueError("two sigmas of the run are equal, expected sigmas that fall")
    if kind == FLOW_HEUN:
        made = tables.flow_heun(sigmas)
    elif kind == LMS:
        made = tables.lms(sigmas, prediction, since)
    else:
        rows = {DPM: tables.dpm_multistep, SINGLE: tables.dpm_singlestep, DEIS: tables.deis, UNIPC: tables.unipc}
        schedule = RectifiedFlow() if config["use_flow_sigmas"] else VPSigma()
        made = rows[kind](scheduler, schedule, sigmas, prediction, since)
    plan_checks.finite(kind, made)
    return StepPlan(scheduler.timesteps.cpu(), made, prediction=prediction)


def draws(scheduler: Any, eta: float) -> list[bool]:
    """Return in which steps of a run diffusers draws noise: in all or in none, also where its factor is 0, but for the
    last step of LCM and TCD, and for index 0 of DDPM."""
    kind, config, steps = kind_of(scheduler), scheduler.config, len(scheduler.timesteps)
    if kind == DDPM:
        return (scheduler.timesteps > 0).tolist()
    if kind in (LCM, TCD):
        return [(kind == LCM or eta > 0) and i != scheduler.num_inference_steps - 1 for i in range(steps)]
    sde = kind == DPM and config["algorithm_type"] == "sde-dpmsolver++"
    return [kind == ANCESTRAL or sde or eta > 0 or (kind == FLOW and config["stochastic_sampling"])] * steps


def _prediction(kind: str, config: dict[str, Any]) -> Prediction:
    """Return our name for a scheduler's prediction_type. Raises ValueError if its step takes no such prediction."""
    if kind in (FLOW, FLOW_HEUN):
        return "flow"
    name, flow = config["prediction_type"], config.get("use_flow_sigmas", False)
    names: dict[str, Any] = {**DIFFUSERS_PREDICTIONS, **({"original_sample": "x0"} if kind == EULER else {})}
    names.pop("v_prediction" if flow else "flow_prediction")
    if kind == PNDM:
        names.pop("sample")
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
    names = [kind.__name__ for kind in type(getattr(scheduler, "inner", scheduler)).__mro__]
    flow = any("FlowMatch" in name or name in FLOWS for name in names)
    return bool(flow or config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction")


def has_indices(scheduler: Any) -> bool:
    """Return whether the timesteps of a scheduler are indices of its training table."""
    return hasattr(scheduler, "alphas_cumprod") and scheduler.config.get("timestep_type", "discrete") == "discrete"
