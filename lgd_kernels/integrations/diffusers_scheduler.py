"""Take the steps of a diffusers scheduler in one pass over memory, with a table of factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lgd_kernels.guidance.rules import Rule
from lgd_kernels.integrations import diffusers_plans as plans
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup, arithmetic_dtype
from lgd_kernels.runtime.shown import readable
from lgd_kernels.sampling.step_plan import StepPlan


class FusedScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # config_name differs in these bases
    """Take the steps of a diffusers scheduler in one pass over memory, without a device sync, also for samples at
    different steps.

        pipe.scheduler = FusedScheduler(pipe.scheduler)

    Args:
        scheduler: DDIM, DDPM, PNDM (with skip_prk_steps), LCM, TCD, EulerDiscrete, EulerAncestralDiscrete,
            HeunDiscrete, LMSDiscrete, DPMSolverMultistep, DPMSolverSinglestep, UniPCMultistep (order 1 or 2),
            DEISMultistep, FlowMatchEulerDiscrete or FlowMatchHeunDiscrete, or a subclass that does not override the
            step, with settings that keep a step linear: no clip_sample, no thresholding, no learned variance.
            docs/integrations.md lists them. FusedScheduler takes its configuration and forwards all other attributes
            (timesteps, add_noise, ...) to it.

    Steps count up from `begin_index`, or from the place of the first timestep, as in diffusers. Timesteps `[B]` of the
    run give each sample its own step, and do not change the count.

    Noise is drawn as in diffusers, from `generator`: the same numbers for the same seed. With `scheduler.seed` set (an
    int, a 0-dim int64 tensor or `[B]`) the kernel draws it: the noise of sample b depends on seed + b (or seed[b])
    and the step, not on the rest of the batch; seeds that differ by less than 2^32 share no noise.

    `FusedScheduler.from_config(pipe.scheduler.config)`, `save_pretrained` and `from_pretrained` work as in diffusers;
    the configuration is that of the scheduler, with its class under "fused". `torch.compile` compiles a step without
    graph breaks.

    >>> scheduler = FusedScheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    >>> scheduler.set_timesteps(4)
    >>> scheduler.step(torch.ones(2, 3), scheduler.timesteps[[0, 2]], torch.zeros(2, 3)).prev_sample[:, 0]
    tensor([-0.3330, -0.3330])
    """

    order: int  # of the scheduler: calls of the network in a step, which pipelines read
    inner: Any
    begin_index: int | None
    _index: int | Tensor | None  # of the next step
    _since: int  # calls of the run so far, at most `_warm`
    _kept: Tensor | tuple[Tensor, ...] | None
    _listed: list[float]  # the timesteps of the run
    _times: Tensor | None  # the same, on the device of the samples
    _scales: Tensor | None  # of the input of the network
    _scaled: list[float]  # the same numbers
    _made: dict[tuple[Any, ...], StepPlan]
    _draws: dict[float, list[bool]]  # by eta: whether each step draws noise

    def __init__(self, scheduler: SchedulerMixin) -> None:
        inner: Any = scheduler.inner if isinstance(scheduler, FusedScheduler) else scheduler  # a cell that is run twice
        self.inner, self.kind = inner, plans.check(inner)
        self.order, self._warm, self._eta = inner.order, plans.warm(inner), plans.ETAS.get(self.kind)
        self.seed: int | Tensor | None = None
        self._reset()
        known = {name: value for name, value in inner.config.items() if not name.startswith("_")}
        self.register_to_config(**known | {"fused": self.kind, "_class_name": type(self).__name__})

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make a FusedScheduler from the configuration of one, or of a scheduler that it takes."""
        config = {**(config or {}), **kwargs}
        kind, fused = config.get("_class_name"), config.pop("fused", None)
        if kind not in plans.KINDS:  # else "fused" is left from a FusedScheduler that another scheduler was made from
            kind = fused or kind
        if kind is None:
            raise ValueError(
                "FusedScheduler.from_config: `config` names no class, expected a `_class_name`, which diffusers writes "
                "when it saves a scheduler; pass the scheduler itself: FusedScheduler(scheduler)"
            )
        plans.check_kind(kind)
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        scheduler = cls(getattr(diffusers, kind).from_config(config))
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @property
    def _internal_dict(self) -> Any:
        """Return the configuration. Pipelines replace it in place, to mend old settings."""
        if "_settings" not in self.__dict__:
            raise AttributeError("_internal_dict")  # not yet registered
        return self.__dict__["_settings"]

    @_internal_dict.setter
    def _internal_dict(self, settings: dict[str, Any]) -> None:
        ours = self.__dict__.setdefault("_settings", settings)
        changed = {name: one for name, one in settings.items() if name in self.inner.config and one != ours[name]}
        if changed:
            before = self.inner._internal_dict
            self.inner.register_to_config(**changed)
            try:
                plans.check(self.inner)
            except ValueError:
                self.inner._internal_dict = before
                raise
        self.__dict__["_settings"] = settings

    @property
    def compatibles(self) -> list[type]:
        """Return the classes of schedulers that may replace the scheduler."""
        return self.inner.compatibles

    def __getattr__(self, name: str) -> Any:
        if "inner" not in self.__dict__:
            return super().__getattr__(name)
        found = getattr(self.__dict__["inner"], name)
        return self._at_our_step(found) if name in ("add_noise", "scale_noise") else found

    def __len__(self) -> int:
        return len(self.inner)

    def _at_our_step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap add_noise or scale_noise, so that they add the noise of the next step once a run has started."""

        @functools.wraps(method)
        def at_our_step(*args: Any, **kwargs: Any) -> Any:
            if hasattr(self.inner, "_step_index"):
                self.inner._step_index = self.step_index
            return method(*args, **kwargs)

        return at_our_step

    @property
    def step_index(self) -> int | None:
        """Return the index of the next step: a device sync."""
        return None if self._index is None else int(self._index)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the step at which the run begins, for pipelines that begin in the middle."""
        self.begin_index = begin_index
        if hasattr(self.inner, "set_begin_index"):
            self.inner.set_begin_index(begin_index)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """Set up a run and compute its factors. `others` are those of the scheduler, such as LCM's
        `original_inference_steps`; it refuses arguments that it does not take. Raises ValueError for a run without
        steps, with sigmas that rise or are NaN, or with an eps prediction at signal 0.
        """
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(
                f"FusedScheduler.set_timesteps: `num_inference_steps` is {num_inference_steps}, expected 1 or more"
            )
        options = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, **others}
        options = {name: value for name, value in options.items() if value is not None}
        self.inner.set_timesteps(num_inference_steps, device=device, **options)
        self._reset()
        self._listed = self.inner.timesteps.tolist()
        if not self._listed:
            raise ValueError(f"FusedScheduler.set_timesteps: {self.kind} made no timesteps, expected 1 or more")
        self._plan(self._eta or 0.0)
        if self.kind in plans.SCALED:
            self._scales = torch.rsqrt(self.inner.sigmas.double().square() + 1)
            self._scaled = self._scales.tolist()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return the input of the network: the sample, for Euler, Heun and LMS divided by sqrt(1 + sigma^2)."""
        if self.kind not in plans.SCALED:
            return sample
        if self._scales is None:
            raise ValueError(
                "FusedScheduler.scale_model_input: no run is set up; call set_timesteps(steps, device=...) first"
            )
        place = self._place(timestep, sample)
        if isinstance(place, int):
            return sample * self._scaled[place]
        wide = arithmetic_dtype(sample)
        if self._scales.device != sample.device or self._scales.dtype != wide:
            self._scales = self._scales.to(sample.device, wide)
        scale = self._scales.index_select(0, place.reshape(-1)).to(sample.dtype)
        return sample * scale.view(-1, *(1,) * (sample.ndim - 1))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        uncond: Tensor | None = None,
        omega: float | Tensor | OmegaLookup = 0.0,
        rule: Rule | None = None,
        impl: Impl | None = None,
    ) -> SchedulerOutput | LCMSchedulerOutput | tuple[Any, ...]:
        """Return the next sample, in the dtype of `sample`; of LCM also the denoised one.

        Args:
            model_output: the guided prediction; or, with `uncond`, the conditional prediction, guided in the same pass
                with `omega` and `rule` as in `guided_step`.
            timestep: of this run: a number, 0-dim, or `[B]`.
            eta: in [0, 1], for DDIM (0 unless given) and TCD (its gamma, 0.3). The others ignore eta, since pipelines
                pass it to every scheduler that takes it.
            generator, variance_noise: of schedulers that draw; or set `seed`.

        Raises ValueError for a timestep other than the next one (`[B]`: not of this run), if the host can read the
        timestep without a device sync; otherwise timesteps `[B]` that are not of this run give NaN.
        """
        if not self._made:
            raise ValueError("FusedScheduler.step: no run is set up; call set_timesteps(steps, device=...) first")
        index, own = self._place(timestep, sample), self._eta
        eta = 0.0 if own is None else own if eta is None else float(eta)
        if self.order == 2 and self._kept is None and isinstance(index, int) and index % 2:
            raise ValueError(
                f"FusedScheduler: call {index} is the second of a step of {self.kind}, expected a run that begins with "
                f"a first call; set_timesteps(n), then set_begin_index({index - 1})"
            )
        if isinstance(index, int) and index == 0:  # the plan of a whole run counts the calls itself
            self._since = self._warm
        plan = self._on(eta, sample)
        drawn = self._noise(eta, index, sample, model_output, generator, variance_noise)
        kept: Any
        moved, kept = plan.step(index, sample, model_output, uncond, omega, self._kept, rule=rule, impl=impl, **drawn)
        self._since = min(self._since + 1, self._warm)
        if isinstance(index, int) or index.ndim == 0:
            self._index = index + 1
        if self.kind == plans.LCM:  # its pipeline reads the denoised sample, which is no history
            return LCMSchedulerOutput(prev_sample=moved, denoised=kept) if return_dict else (moved, kept)
        self._kept = kept
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _reset(self) -> None:
        """Forget the run."""
        self._index, self._kept, self.begin_index, self._since = None, None, None, 0
        self._listed, self._scales, self._times, self._made, self._draws = [], None, None, {}, {}

    def _plan(self, eta: float) -> None:
        """Make the plans of this run in float64, one for each number of calls so far, with a row of NaN for timesteps
        that are not in the run."""
        try:
            found = [plans.plan_of(self.inner, eta, since=since) for since in range(self._warm + 1)]
        except ValueError as error:
            raise ValueError(f"FusedScheduler: the run of {self.kind} is refused: {error}") from error
        self._draws[eta] = plans.draws(self.inner, eta)
        for since, plan in enumerate(found):
            nothing = torch.full_like(plan.table[:1], torch.nan)
            self._made[eta, since] = StepPlan(plan.times, torch.cat((plan.table, nothing)))

    def _on(self, eta: float, sample: Tensor) -> StepPlan:
        """Return the plan of this call on the device of the sample, copied there once."""
        key = eta, self._since, sample.device, sample.dtype
        plan = self._made.get(key)
        if plan is None:
            if (eta, 0) not in self._made:
                self._plan(eta)
            plan = self._made[key] = self._made[eta, self._since].to(sample.device, arithmetic_dtype(sample))
        return plan

    def _place(self, timestep: float | Tensor, sample: Tensor) -> int | Tensor:
        """Return the step of a timestep: an int if the host can know it, else 0-dim on the device of the sample; `[B]`
        for timesteps `[B]`."""
        place = self.begin_index if self._index is None else self._index
        if type(place) is int and sample.is_cpu and not torch.compiler.is_compiling():  # most calls end here
            plain = timestep.ndim == 0 and timestep.is_cpu if isinstance(timestep, Tensor) else True
            if plain and place < len(self._listed) and self._listed[place] == float(timestep):
                self._index = place
                return place
        many = isinstance(timestep, Tensor) and timestep.ndim == 1 and timestep.numel() > 1
        if many or place is None:
            found = self._found(timestep, sample, many)
            return int(found) if not many and readable(found) else found
        on_host = sample.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host:
            place = int(place)
        elif isinstance(place, int):
            place = torch.full((), place, dtype=torch.int64, device=sample.device)
        self._index = place
        if on_host and not (isinstance(timestep, Tensor) and timestep.device.type != "cpu"):
            self._expect(timestep)
        return place

    def _found(self, timestep: float | Tensor, sample: Tensor, many: bool) -> Tensor:
        """Find the place of timesteps in the run; of a repeated timestep the second place, as in diffusers."""
        if many and len(set(self._listed)) < len(self._listed):
            raise ValueError("FusedScheduler: `timestep` is [B], but this run has timesteps twice: they name no step")
        times = self._times
        if times is None or times.device != sample.device:
            self._times = times = self.inner.timesteps.to(sample.device)
        at = torch.as_tensor(timestep, dtype=times.dtype, device=sample.device).reshape(-1, 1)
        hits = torch.eq(at, times).int()
        seen = hits.cumsum(1)
        place = (hits * (seen == seen[:, -1:].clamp(max=2))).argmax(1)
        there = seen[:, -1] > 0
        if readable(there) and not bool(there.all()):
            raise ValueError(
                f"FusedScheduler: `timestep` is {timestep}, expected timesteps of this run: {self._listed}"
            )
        place = torch.where(there, place, len(self._listed))
        return place if many else place[0]

    def _expect(self, timestep: float | Tensor) -> None:
        """Raise ValueError unless the timestep is that of the next step."""
        index = self.step_index or 0
        wanted = self._listed[index] if index < len(self._listed) else None
        if float(timestep) != wanted:
            twice = len(set(self._listed)) < len(self._listed)
            hint = "; timesteps repeat here, and set_begin_index(0) begins at the first of them" if twice else ""
            raise ValueError(
                f"FusedScheduler: `timestep` is {float(timestep)}, expected {wanted}, step {index} of this run; "
                "set_timesteps(n) starts at the first, and set_begin_index(k) right after it at step k; timesteps [B] "
                "of two samples or more may be any of the run" + hint
            )

    def _noise(
        self,
        eta: float,
        index: int | Tensor,
        sample: Tensor,
        prediction: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: Tensor | None,
    ) -> dict[str, Any]:
        """Return the noise arguments of a step: none, the given noise, a seed for each sample, or diffusers' noise."""
        drawn = self._draws[eta]
        if not (drawn[index] if isinstance(index, int) else any(drawn)):
            return {}
        if noise is not None:
            return {"noise": noise}
        if self.seed is not None:
            each = torch.arange(sample.shape[0], device=sample.device)
            seed = self.seed if isinstance(self.seed, Tensor) and self.seed.ndim else each + self.seed
            return {"seed": seed + (index << 32)}
        dtype = prediction.dtype
        if self.kind in (plans.DPM, plans.FLOW):
            dtype = torch.float32
        elif self.kind in (plans.LCM, plans.TCD):
            dtype = torch.promote_types(dtype, sample.dtype)
        return {"noise": randn_tensor(prediction.shape, generator=generator, device=prediction.device, dtype=dtype)}
