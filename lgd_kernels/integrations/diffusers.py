"""Guide in diffusers (0.36 or newer) with a learned weight, and step its schedulers in one pass.

pipe(prompt, guidance_scale=LearnedScale(omega, pipe, condition))                   # classic pipelines
pipe.update_components(guider=LearnedGuidance(omega, scheduler=pipe))               # modular pipelines
pipe.scheduler = FusedScheduler(pipe.scheduler)                                     # any pipeline
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from lgd_kernels.guidance import rules
from lgd_kernels.guidance.api import guided_score
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.integrations.diffusers_omega import Condition, RunOmega, ordinary, repeated, shares, times_for
from lgd_kernels.integrations.diffusers_scale import LearnedScale
from lgd_kernels.integrations.diffusers_scheduler import FusedScheduler
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.shown import readable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModularPipeline

__all__ = ["FusedScheduler", "LearnedGuidance", "LearnedScale"]


class LearnedGuidance(BaseGuidance):
    """Guide with a weight for each sample and step: `cond + omega(c, s, t) (cond - uncond)`, or any rule with omega.

    Args:
        omega: a float; a tensor `[B]`, one weight for each sample or prompt; or a function `omega(c, s, t) -> [B]`, an
            nn.Module or an `OmegaTable`. omega = guidance_scale - 1: 0 is the conditional prediction alone.
        scheduler: the pipeline, whose scheduler may be replaced later, or its scheduler. Functions and intervals need
            it: t and s, float32 `[B]`, are a time of the run and the next one below it, as `diffusers_plans.times_of`
            converts them: indices of the training table and -1 for the data, or t in [0, 1] for flow matching. A step
            whose timestep this scheduler does not have raises ValueError (on a GPU, where the host reads none: omega is
            NaN).
        times: `times(scheduler) -> [N + 1]`, to use other times.
        condition: the name of the pipeline's input that is c, such as "prompt_embeds"; None takes the first. Set
            `guider.condition_value` to give c itself, e.g. int64 labels `[B]`: a table needs integers.
        interval: `(low, high)`: guide only for low < t <= high; elsewhere skip the unconditional call, if t is on the
            host.
        rule: a rule, or its name in `lgd_kernels.rules`, applied to the predictions of the model, whatever they are;
            `rule_options` are its parameters. beta_cfg gets `progress` = step / (steps - 1), cfg_zero_star `zero` =
            True in step 0.
        start, stop, enabled: as in every guider: start and stop are fractions of the steps.
        impl: as in `guided_score`.

    omega does not depend on the sample, so the guider calls a function once for a run, with N * B rows, or in every
    step if the result requires grad. In a loop of your own, call `set_state`, `prepare_inputs` (or set
    `condition_value`), then `forward(pred_cond, pred_uncond).pred`. With `num_images_per_prompt` n, the guider repeats
    each entry of a tensor omega or `condition_value` that has one entry for each prompt n times, in the order in which
    diffusers repeats prompts.

    `guidance_scale` is 1 + omega, one number for models that embed it (LCM), which read w = guidance_scale - 1. If
    omega is a tensor or a function, set `guidance_scale` yourself; it has no other effect.

    `save_pretrained` saves numbers and names only; load with
    `LearnedGuidance.from_pretrained(folder, omega=network, scheduler=pipe.scheduler)`.

    >>> guider = LearnedGuidance(torch.tensor([0.0, 2.0]))
    >>> guider.forward(torch.ones(2, 1), torch.zeros(2, 1)).pred
    tensor([[1.],
            [3.]])
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # type: ignore[assignment]  # None in the base class
    _timesteps: Any = None  # of the run

    def __init__(
        self,
        omega: float | Tensor | Callable[[Any, Tensor, Tensor], Tensor] | None = None,
        scheduler: SchedulerMixin | DiffusionPipeline | ModularPipeline | None = None,
        times: Callable[[SchedulerMixin], Tensor] | None = None,
        condition: str | None = None,
        interval: tuple[float, float] | None = None,
        rule: str | Rule | None = None,
        rule_options: dict[str, Any] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        impl: Impl | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        number = float(omega) if isinstance(omega, (int, float)) else None
        if number is None and not isinstance(omega, Tensor) and not callable(omega):
            raise TypeError(
                f"LearnedGuidance: `omega` is a {type(omega).__name__}, expected a number, a tensor [B] or a function "
                "omega(c, s, t); a saved guider has numbers only: from_pretrained(folder, omega=...)"
            )
        if isinstance(rule, str) and not callable(getattr(rules, rule, None)):
            raise ValueError(f"LearnedGuidance: `rule` is {rule!r}, expected a rule, or its name in lgd_kernels.rules")
        if rule is not None and not isinstance(rule, str) and not callable(rule):
            raise TypeError(f"LearnedGuidance: `rule` is a {type(rule).__name__}, expected a rule, or a name of one")
        if interval is not None:
            _check_interval(interval)
        self.omega, self.scheduler, self.times = omega if number is None else number, scheduler, times
        self.condition, self.interval, self.impl = condition, interval, impl
        function = getattr(rules, rule) if isinstance(rule, str) else rule
        self.rule, self.rule_options = function, dict(rule_options or {})
        self.condition_value: Tensor | None = None
        self._scale: float | None = None  # guidance_scale, if omega is no number
        self._stashed: Tensor | None = None  # the condition among the inputs
        self._run: Tensor | None = None  # times
        self._rows = RunOmega("LearnedGuidance")
        self._where: int | Tensor | None = None  # the place of this step in the run
        self._offset: int | None = None  # of the first step in the run
        named = rule if isinstance(rule, str) else None
        shared = {"start": start, "stop": stop, "enabled": enabled, "impl": impl}
        ours = {"condition": condition, "interval": interval, "rule": named, "rule_options": dict(self.rule_options)}
        self.register_to_config(omega=number, **ours, **shared)

    def new(self, **options: Any) -> LearnedGuidance:
        """Copy the guider, with other options; also what a configuration cannot hold."""
        kept = {"omega": self.omega, "scheduler": self._sampled_by, "times": self.times, "rule": self.rule}
        known = {name: self.config[name] for name in self.config if name[0] != "_"}
        copied = type(self)(**{**known, **kept, **options})
        copied._scale = self._scale
        return copied

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Set the step; pipelines call this before each step."""
        super().set_state(step, num_inference_steps, timestep)  # type: ignore[arg-type]  # may be floats
        timesteps = getattr(self.scheduler, "timesteps", None)
        if step == 0 or timesteps is not self._timesteps:
            self._timesteps, self._run, self._offset = timesteps, None, None
            self._rows.forget()
        self._where = None
        if step == 0 and self.rule is not None and hasattr(self.rule, "reset"):
            self.rule.reset()

    @property
    def scheduler(self) -> Any:
        """Return the scheduler that samples: the current one of the pipeline, if a pipeline was given."""
        return self._sampled_by.scheduler if self._follows else self._sampled_by

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self._sampled_by, self._follows, self._timesteps = value, hasattr(value, "scheduler"), None

    @property
    def guidance_scale(self) -> float:
        """Return 1 + omega, or the value that was set if omega is no number, for models that embed it."""
        if isinstance(self.omega, float):
            return 1 + self.omega
        if self._scale is None:
            raise ValueError(
                "LearnedGuidance: the model reads `guidance_scale`, one number to embed, but omega is a "
                f"{type(self.omega).__name__}; set guider.guidance_scale = 1 + the weight to embed"
            )
        return self._scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        if isinstance(self.omega, float):
            self.omega = float(value) - 1
            self.register_to_config(omega=self.omega)
        else:
            self._scale = float(value)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """Return the conditional inputs, then the unconditional ones; keep the condition for omega.

        Args:
            data: `{name: (conditional, unconditional)}`.
        """
        values = (value[0] if isinstance(value, tuple) else value for value in data.values())
        self._stash(dict(zip(data, values, strict=True)))
        return [self._prepare_batch(data, *which) for which in self._calls()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, str | tuple[str, str]]) -> list[Any]:
        """Return the inputs as `prepare_inputs` does, from the state of a modular pipeline."""
        named = {name: field[0] if isinstance(field, tuple) else field for name, field in input_fields.items()}
        self._stash({name: getattr(data, field, None) for name, field in named.items()})
        return [self._prepare_batch_from_block_state(input_fields, data, *which) for which in self._calls()]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Compute the guided prediction, `[B, ...]` in the dtype of `pred_cond`."""
        pred = pred_cond
        if pred_uncond is not None and self._guides():
            rule = None if self.rule is None else self._rule()
            pred = guided_score(pred_cond, pred_uncond, self._omega(pred_cond), rule=rule, impl=self.impl)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._guides() else 1

    def _calls(self) -> list[tuple[int, str]]:
        return list(enumerate(self._input_predictions))[: self.num_conditions]

    def _stash(self, values: dict[str, Tensor | None]) -> None:
        """Keep the condition of omega."""
        if self.condition is not None and self.condition not in values:
            raise ValueError(
                f"LearnedGuidance: `condition` is {self.condition!r}, expected one of the pipeline's inputs: "
                f"{', '.join(values)}"
            )
        self._stashed = next(iter(values.values()), None) if self.condition is None else values[self.condition]

    def _guides(self) -> bool:
        """Return whether this step uses the unconditional prediction, as far as the host can know."""
        never = isinstance(self.omega, float) and self.omega == 0 and self.rule is None
        if not self._enabled or never:
            return False
        if self._step is None:
            return True
        steps = self._num_inference_steps
        if not int(self._start * steps) <= self._step < int(self._stop * steps):
            return False
        if self.interval is None:
            return True
        place, (low, high) = self._place(), self.interval
        return not isinstance(place, int) or not readable(self._times()) or low < float(self._times()[place]) <= high

    def _times(self) -> Tensor:
        """Return the times of the run."""
        run = self._run
        if run is None:
            with ordinary():
                own = self.times
                times = own(self.scheduler) if own else times_for("LearnedGuidance", self.scheduler, self.omega)
                self._run = run = times.clone() if times.is_inference() else times
        return run

    def _place(self) -> int | Tensor:
        """Return the index of this call in the run, found once in each step."""
        if self.scheduler is None:
            raise ValueError(
                "LearnedGuidance: functions and intervals need times; pass scheduler=pipe or pipe.scheduler"
            )
        if self._step is None:
            raise ValueError("LearnedGuidance: call set_state(step, steps, timestep) before each step, as pipelines do")
        place = self._where
        if place is None:
            self._where = place = self._found()
        return place

    def _found(self) -> int | Tensor:
        """Find the place of the timestep in the scheduler's timesteps.

        Pipelines pass a view of the timesteps, whose offset gives the place. For a copy, count from begin_index, or
        search for the value if the scheduler has no begin_index. (Pipelines that begin in the middle count their own
        steps from 0.) A timestep that is not there is of another scheduler: raise ValueError if the host can read it;
        on a device, return the index of the row after the last, which is NaN.
        """
        timesteps, given = self.scheduler.timesteps, self._timestep
        begin, place = getattr(self.scheduler, "begin_index", None), None
        if begin is not None:
            place = begin + self._step
        elif given is None or timesteps.numel() == self._num_inference_steps:
            place = self._step
        if place is not None and (given is None or torch.compiler.is_compiling()):
            return place
        if self._unset() or (place is not None and place >= timesteps.numel()):
            raise ValueError(self._another())
        at = torch.as_tensor(given, device=getattr(given, "device", timesteps.device)).reshape(-1)[:1]
        if not torch.compiler.is_compiling() and shares(at, timesteps):
            return (at.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        compared = at.dtype if at.is_floating_point() else timesteps.dtype
        hits = timesteps.to(at.device, compared) == at
        if readable(timesteps) and readable(at):
            hits = hits.tolist()
            if place is None and self._offset is None and any(hits):
                places = [index for index, hit in enumerate(hits) if hit]
                self._offset = places[:2][-1] - self._step  # the second of a repeated timestep, as in diffusers
            if place is None and self._offset is not None:
                place = self._step + self._offset
            if place is None or not 0 <= place < len(hits) or not hits[place]:
                raise ValueError(self._another())
            return place
        if place is None:
            seen = hits.int().cumsum(0)
            there, place = hits.any(), (hits & (seen == seen[-1].clamp(max=2))).int().argmax()
        else:
            there = hits[place]
        return torch.where(there, place, self._times().numel() - 1)

    def _unset(self) -> bool:
        """Return whether the scheduler's timesteps are still those of its training table."""
        unset = getattr(self.scheduler, "num_inference_steps", None) is None
        count = self.scheduler.timesteps.numel()
        return unset and count == self.scheduler.config.get("num_train_timesteps") != self._num_inference_steps

    def _another(self) -> str:
        """Return the error message for a timestep of another scheduler."""
        why = "set_timesteps was never called on it" if self._unset() else "it has another timestep there"
        return (
            f"LearnedGuidance: step {self._step} of {self._num_inference_steps} is no step of the guider's scheduler, "
            f"a {type(self.scheduler).__name__}: {why}; set guider.scheduler = pipe, which follows the "
            "pipeline's scheduler, or guider.scheduler = pipe.scheduler"
        )

    def _omega(self, pred: Tensor) -> float | Tensor:
        """Return omega of this step."""
        if isinstance(self.omega, float) and self.interval is None:
            return self.omega
        if isinstance(self.omega, Tensor) and self.interval is None:
            return repeated("LearnedGuidance", "omega", self.omega.to(pred.device), pred.shape[0])
        named = self.condition_value is not None
        c = Condition("condition_value", self.condition_value) if named else Condition("condition", self._stashed)
        place = self._place()
        rows = self._rows.of_run(self.omega, self.interval, self._times, pred, c)
        return rows[place] if isinstance(place, int) else rows.index_select(0, place.to(pred.device).view(1))[0]

    def _rule(self) -> Rule | None:
        """Return the rule with its options for this step."""
        if self.rule is None:
            return None
        known = inspect.signature(self.rule).parameters
        options = dict(self.rule_options)
        if self._step is not None:
            if "progress" in known:
                options.setdefault("progress", self._step / max(self._num_inference_steps - 1, 1))
            if "zero" in known:
                options.setdefault("zero", self._step == 0)
        return functools.partial(self.rule, **options) if options else self.rule


def _check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError unless the interval is two times in order."""
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low, high = 0.0, -1.0
    if not low <= high:
        raise ValueError(
            f"LearnedGuidance: `interval` is {interval!r}, expected two times (low, high) with low <= high; guidance "
            "is for low < t <= high"
        )
