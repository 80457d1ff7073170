"""diffusers (0.36 or newer): a guider whose weight is learned, and schedulers that step in one pass.

pipe.update_components(guider=LearnedGuidance(omega, scheduler=pipe.scheduler))     # modular pipelines
pipe.scheduler = FusedScheduler(pipe.scheduler)                                     # any pipeline
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels import rules
from lgd_kernels.checks import readable
from lgd_kernels.impls import Impl
from lgd_kernels.integrations.diffusers_plans import times_of
from lgd_kernels.integrations.diffusers_scheduler import FusedScheduler
from lgd_kernels.rules import Rule

__all__ = ["FusedScheduler", "LearnedGuidance"]


class LearnedGuidance(BaseGuidance):
    """Guidance with a weight for each sample and step: `cond + omega(c, s, t) (cond - uncond)`, or any rule with it.

    Args:
        omega: a float; a tensor `[B]`, one weight for each sample; or a function `omega(c, s, t) -> [B]`, an nn.Module
            or an `OmegaTable`. omega = guidance_scale - 1: 0 is the conditional prediction alone.
        scheduler: the pipeline's, for functions and intervals: t and s are neighbours in its timesteps, as
            `diffusers_times_of` makes times of them: indices of the training table and -1 for the data, or for
            flow matching t in [0, 1]; float32 `[B]`.
        times: `times(scheduler) -> [N + 1]`, other times than those.
        condition: the name of the pipeline's input that is c, such as "prompt_embeds"; None takes the first. Set
            `guider.condition_value` to give c itself, e.g. int64 labels `[B]`: a table needs integers.
        interval: `(low, high)`: no guidance but for low < t <= high, and no unconditional call where t is on the host.
        rule: a rule, or its name in `lgd_kernels.rules`, applied to the predictions as they come; `rule_options` are
            its parameters. beta_cfg's `progress` is step / (steps - 1), and cfg_zero_star's `zero` holds in step 0.
        start, stop, enabled: as in every guider: shares of the steps.
        impl: as in `guided_score`.

    omega does not depend on the sample, so a function is called once for a run, with N * B rows. In a loop of your own:
    `set_state`, `prepare_inputs` (or set `condition_value`), then `forward(pred_cond, pred_uncond).pred`.

    Saved by `save_pretrained` are numbers and names only; load with
    `LearnedGuidance.from_pretrained(folder, omega=network, scheduler=pipe.scheduler)`.

    >>> guider = LearnedGuidance(torch.tensor([0.0, 2.0]))
    >>> guider.forward(torch.ones(2, 1), torch.zeros(2, 1)).pred
    tensor([[1.],
            [3.]])
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(
        self,
        omega: float | Tensor | Callable[[Tensor | None, Tensor, Tensor], Tensor] | None = None,
        scheduler: SchedulerMixin | None = None,
        times: Callable[[SchedulerMixin], Tensor] | None = None,
        condition: str | None = None,
        interval: tuple[float, float] | None = None,
        rule: str | Rule | None = None,
        rule_options: dict | None = None,
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
        if isinstance(rule, str) and not hasattr(rules, rule):
            raise ValueError(f"LearnedGuidance: `rule` is {rule!r}, expected the name of a function in rules, or one")
        self.omega, self.scheduler, self.times = omega if number is None else number, scheduler, times
        self.condition, self.interval, self.impl = condition, interval, impl
        function = getattr(rules, rule) if isinstance(rule, str) else rule
        self.rule, self.rule_options = function, dict(rule_options or {})
        self.condition_value, self._stashed, self._run, self._rows = None, None, None, None
        named = rule if isinstance(rule, str) else None
        self.register_to_config(
            omega=number, condition=condition, interval=interval, rule=named, rule_options=dict(self.rule_options),
            start=start, stop=stop, enabled=enabled, impl=impl,
        )  # fmt: skip

    def new(self, **options) -> LearnedGuidance:
        """A copy, with other options; also of what a configuration cannot hold."""
        kept = {"omega": self.omega, "scheduler": self.scheduler, "times": self.times, "rule": self.rule}
        return type(self)(**{**{name: self.config[name] for name in self.config if name[0] != "_"}, **kept, **options})

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """As every guider: before each step."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._run = self._rows = None
            if hasattr(self.rule, "reset"):
                self.rule.reset()

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list:
        """The conditional inputs, then the unconditional ones; the condition is kept for omega."""
        values = (value[0] if isinstance(value, tuple) else value for value in data.values())
        self._stash(dict(zip(data, values, strict=True)))
        return [self._prepare_batch(data, *which) for which in self._calls()]

    def prepare_inputs_from_block_state(self, data, input_fields: dict[str, str | tuple[str, str]]) -> list:
        named = {name: field[0] if isinstance(field, tuple) else field for name, field in input_fields.items()}
        self._stash({name: getattr(data, field, None) for name, field in named.items()})
        return [self._prepare_batch_from_block_state(input_fields, data, *which) for which in self._calls()]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, `[B, ...]` in the dtype of `pred_cond`."""
        pred = pred_cond
        if pred_uncond is not None and self._guides():
            pred = lgd.guided_score(pred_cond, pred_uncond, self._omega(pred_cond), rule=self._rule(), impl=self.impl)
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
        if self.condition is not None and self.condition not in values:
            raise ValueError(
                f"LearnedGuidance: `condition` is {self.condition!r}, expected one of the pipeline's inputs: "
                f"{', '.join(values)}"
            )
        found = next(iter(values.values()), None) if self.condition is None else values[self.condition]
        if found is not self._stashed:
            self._stashed, self._rows = found, None

    def _guides(self) -> bool:
        """Whether the unconditional prediction is of use in this step, as far as the host can know."""
        never = isinstance(self.omega, float) and self.omega == 0 and self.rule is None
        if not self._enabled or never:
            return False
        if self._step is None:
            return True
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        if not first <= self._step < last:
            return False
        if self.interval is None or not readable(self._times()):
            return True
        low, high = self.interval
        return low < float(self._times()[self._place()]) <= high

    def _times(self) -> Tensor:
        if self._run is None:
            if self.scheduler is None:
                raise ValueError("LearnedGuidance: functions and intervals need times; pass scheduler=pipe.scheduler")
            self._run = (self.times or times_of)(self.scheduler)
        return self._run

    def _place(self) -> int | Tensor:
        """Which call of the run this is: counted from the scheduler's begin_index, or found by its timestep, on the
        device, for schedulers that have none. (Pipelines that begin in the middle count their own steps from 0.)"""
        if self._step is None:
            raise ValueError("LearnedGuidance: call set_state(step, steps, timestep) before each step, as pipelines do")
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return begin + self._step
        timesteps = self.scheduler.timesteps
        if timesteps.numel() == self._num_inference_steps or self._timestep is None:
            return self._step
        at = torch.as_tensor(self._timestep).to(timesteps.device, timesteps.dtype).reshape(-1)[:1]
        return (timesteps == at).int().argmax()

    def _omega(self, pred: Tensor) -> float | Tensor:
        if isinstance(self.omega, float) and self.interval is None:
            return self.omega
        if isinstance(self.omega, Tensor) and self.interval is None:
            return self.omega.to(pred.device)
        if self._rows is None:
            self._rows = self._table(pred)
        place = self._place()
        return self._rows[place] if isinstance(place, int) else self._rows.index_select(0, place.view(1))[0]

    def _table(self, pred: Tensor) -> Tensor:
        """omega of the whole run, `[N, B]`."""
        times, batch = self._times().to(pred.device), pred.shape[0]
        t, s = (one.repeat_interleave(batch) for one in (times[:-1], times[1:]))  # [N B]
        steps = times.numel() - 1
        if not callable(self.omega) or isinstance(self.omega, Tensor):
            found = torch.as_tensor(self.omega, dtype=torch.float32, device=pred.device).expand(steps, batch).flatten()
        else:
            c = self._stashed if self.condition_value is None else self.condition_value
            c = c if c is None else c.repeat(steps, *(1,) * (c.ndim - 1))
            found = self.omega(c, s, t)
            if not isinstance(found, Tensor) or found.shape != t.shape:
                said = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"LearnedGuidance: `omega` returned {said}, expected a tensor {list(t.shape)}, as t")
        if self.interval is not None:
            low, high = self.interval
            found = torch.where((t > low) & (t <= high), found, torch.zeros_like(found))
        return found.view(steps, batch)

    def _rule(self) -> Rule | None:
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
