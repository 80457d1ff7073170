"""Guide in the classic pipelines of diffusers: a guidance_scale that is looked up in every step."""

from __future__ import annotations

import inspect
import numbers
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from lgd_kernels.integrations.diffusers_omega import Condition, RunOmega, times_for
from lgd_kernels.integrations.diffusers_scheduler import FusedScheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PRODUCTS = ("mul", "multiply", "mul_", "multiply_", "__mul__", "__rmul__")
LERPS = ("lerp", "lerp_")
FACTORIES = ("full", "full_like", "new_full", "tensor", "new_tensor", "as_tensor", "fill_")
FROM_COND = (
    "Cosmos2",
    "CosmosTextToWorld",
    "CosmosVideoToWorld",
    "Kandinsky3",
    "Krea2",
)  # cond + scale (cond - uncond)
APART = ("ZImage",)  # guide each sample of the batch alone
STAND_IN = 2.0  # what comparisons see: above 1, so that pipelines evaluate both predictions
MANY = 4  # steps: in a shorter run, as many lookups in one step are no sign of a scheduler that stands still


class LearnedScale:
    """Guide a classic pipeline with a weight for each sample and step: a guidance_scale that is 1 + omega(c, s, t).

        scale = LearnedScale(omega, pipe, condition)
        pipe(prompt, guidance_scale=scale)              # or true_cfg_scale=scale, where the pipeline takes it

    A pipeline compares guidance_scale with 1, and multiplies `cond - uncond` by it. In a comparison the scale counts as
    2, so that the pipeline evaluates both predictions; a product with a tensor `[B, ...]` looks omega up at the
    scheduler's next step and weighs every sample by its own, in float32 (float64 for float64), rounded once to the
    dtype of the tensor. `torch.lerp` works likewise. A sum, difference or product with a number is another scale.

    Args:
        omega: a float; a tensor `[B]`, one weight for each sample or prompt; or a function `omega(c, s, t) -> [B]`, an
            nn.Module or an `OmegaTable`. t and s are float32 times, as `diffusers_plans.times_of` converts the
            scheduler's timesteps: indices of the training table and -1 for the data, or t in [0, 1] for flow matching.
            s is the next time below t, also in the second call of a step of Heun's.
        scheduler: the pipeline, whose scheduler may be replaced later, or its scheduler. Pass the pipeline if you can:
            then a pipeline that only embeds the scale is refused here, and a run that begins in the middle is followed
            with schedulers that do not count steps too (DDIM, DDPM, PNDM).
        condition: c, the first argument of omega: a tensor with an entry for each sample, or for each prompt of
            `num_images_per_prompt` samples; e.g. int64 labels for a table, or embeddings for a network. None, if omega
            does not depend on it. May be set between runs: `scale.condition = ...`.
        base: the guidance_scale that means omega = 0: 1 where the pipeline computes `uncond + scale (cond - uncond)`,
            0 where it computes `cond + scale (cond - uncond)`, as Cosmos, Kandinsky 3 and Krea 2 do. By default that of
            the pipeline, and 1 for a scheduler.

    Raises ValueError for a pipeline that has no unconditional prediction because its network embeds guidance_scale, and
    for a pipeline that guides the samples of a batch one by one (Z-Image: use LearnedGuidance with its modular
    pipeline). A scale that a pipeline embeds nevertheless (`torch.full([1], scale)`) raises TypeError there. A scale
    that was never looked up, although its scheduler ran, gives a warning when the scale is deleted.

    Differentiable in omega, where the pipeline's call is.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> scheduler = FlowMatchEulerDiscreteScheduler()
    >>> scheduler.set_timesteps(4)
    >>> scale = LearnedScale(lambda c, s, t: c * t, scheduler, condition=torch.tensor([0.0, 2.0]))
    >>> scale > 1, scale * torch.ones(2, 3)
    (True, tensor([[1., 1., 1.],
            [3., 3., 3.]]))
    """

    def __init__(
        self,
        omega: float | Tensor | Callable[[Any, Tensor, Tensor], Tensor],
        scheduler: DiffusionPipeline | SchedulerMixin,
        condition: Tensor | None = None,
        *,
        base: float | None = None,
    ) -> None:
        if not isinstance(omega, (int, float, Tensor)) and not callable(omega):
            raise TypeError(
                f"LearnedScale: `omega` is a {type(omega).__name__}, expected a number, a tensor [B] or a function "
                "omega(c, s, t)"
            )
        if condition is not None and not isinstance(condition, Tensor):
            raise TypeError(
                f"LearnedScale: `condition` is a {type(condition).__name__}, expected a tensor with an entry for each "
                "sample or prompt, or None"
            )
        name = type(scheduler).__name__
        if hasattr(scheduler, "scheduler"):
            _check_pipeline(scheduler)
            base = float(not name.startswith(FROM_COND)) if base is None else base
        elif not hasattr(scheduler, "timesteps"):
            raise TypeError(f"LearnedScale: `scheduler` is a {name}, expected a pipeline of diffusers or its scheduler")
        self._run = _Run(omega, scheduler, condition)
        self._factor, self._shift = 1.0, 1.0 if base is None else float(base)  # scale = factor * omega + shift

    @property
    def omega(self) -> Any:
        """Return omega, which may be set between runs."""
        return self._run.omega

    @omega.setter
    def omega(self, value: Any) -> None:
        self._run.omega = value
        self._run.rows.forget()

    @property
    def condition(self) -> Tensor | None:
        """Return c, which may be set between runs."""
        return self._run.condition

    @condition.setter
    def condition(self, value: Tensor | None) -> None:
        self._run.condition = value

    def __repr__(self) -> str:
        return f"LearnedScale({self._shift:g} + {self._factor:g} omega, {type(self._run.scheduler).__name__})"

    def __format__(self, form: str) -> str:
        return repr(self)  # pipelines print it in warnings

    # Arithmetic with numbers gives another scale of the same run; with tensors, it looks omega up.

    def __add__(self, other: Any) -> Any:
        return self._affine(1.0, _number("+", other))

    def __sub__(self, other: Any) -> Any:
        return self._affine(1.0, -_number("-", other))

    def __rsub__(self, other: Any) -> Any:
        return self._affine(-1.0, _number("-", other))

    def __neg__(self) -> LearnedScale:
        return self._affine(-1.0, 0.0)

    def __mul__(self, other: Any) -> Any:
        return self._product(other) if isinstance(other, Tensor) else self._affine(_number("*", other), 0.0)

    def __truediv__(self, other: Any) -> Any:
        return self._affine(1 / _number("/", other), 0.0)

    def __rtruediv__(self, other: Any) -> Any:
        raise _refused("/")

    __radd__, __rmul__ = __add__, __mul__

    # Comparisons are those of a number.

    def _value(self) -> float:
        self._run.compared()
        return self._factor * (STAND_IN - 1) + self._shift

    def __float__(self) -> float:
        pipe = self._run.source
        if getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds", False):
            raise TypeError(_embeds(type(pipe).__name__))  # torch.tensor([scale] * n, dtype=...)
        return self._value()

    def __lt__(self, other: Any) -> bool:
        return self._value() < _number("<", other)

    def __le__(self, other: Any) -> bool:
        return self._value() <= _number("<=", other)

    def __gt__(self, other: Any) -> bool:
        return self._value() > _number(">", other)

    def __ge__(self, other: Any) -> bool:
        return self._value() >= _number(">=", other)

    def __eq__(self, other: object) -> bool:
        return self._value() == other if isinstance(other, numbers.Real) else self is other

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Look omega up in products and lerp; refuse every other function of torch."""
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if name in PRODUCTS and len(args) == 2 and not kwargs:
            scale, other = args if isinstance(args[0], cls) else args[::-1]
            found = scale * other
            return other.copy_(found) if name.endswith("l_") or name == "multiply_" else found
        if name in LERPS and (len(args) == 3 or set(kwargs) == {"weight"}):
            start, end, scale = args if len(args) == 3 else (*args, kwargs["weight"])
            if isinstance(scale, cls):
                weight = scale._weight(start)
                found = torch.lerp(start.to(weight.dtype), end.to(weight.dtype), weight).to(start.dtype)
                return start.copy_(found) if name == "lerp_" else found
        if name in FACTORIES:
            raise TypeError(_embeds(f"torch.{name}"))
        raise _refused(f"torch.{name}")

    def _affine(self, factor: Any, shift: Any) -> LearnedScale:
        """Return factor * scale + shift."""
        made = object.__new__(type(self))
        made._run = self._run
        made._factor, made._shift = float(factor) * self._factor, float(factor) * self._shift + float(shift)
        return made

    def _weight(self, x: Tensor) -> Tensor:
        """Return the scale of this step for each sample of x, in the shape that multiplies it: `[B, 1, ...]`."""
        if x.ndim == 0:
            raise ValueError("LearnedScale: the scale was multiplied by a single number, expected a tensor [B, ...]")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        row = self._run.lookup(x).to(dtype)
        return (self._factor * row + self._shift).view(-1, *(1,) * (x.ndim - 1))

    def _product(self, x: Tensor) -> Tensor:
        weight = self._weight(x)
        return (x.to(weight.dtype) * weight).to(x.dtype)


class _Run:
    """Look omega up in the run of a scheduler; shared by a scale and those that were computed from it."""

    def __init__(self, omega: Any, source: Any, condition: Tensor | None) -> None:
        self.omega = float(omega) if isinstance(omega, int) else omega
        self.source, self.follows, self.condition = source, hasattr(source, "scheduler"), condition
        self.rows = RunOmega("LearnedScale")
        self.timesteps: Tensor | None = None  # of the run
        self.times: Tensor | None = None
        self.lookups, self.here, self.last = 0, 0, -1  # in the run; in this step; the place of this step
        self.use = _Use(source, self.scheduler.timesteps)
        weakref.finalize(self, self.use.warn_unless_used)

    @property
    def scheduler(self) -> Any:
        return self.source.scheduler if self.follows else self.source

    def lookup(self, x: Tensor) -> Tensor:
        """Return omega `[B]` of the step that the scheduler takes next."""
        scheduler = self.scheduler
        timesteps = scheduler.timesteps
        if timesteps is not self.timesteps:
            if getattr(scheduler, "num_inference_steps", 0) is None and self.use.first is timesteps:
                raise ValueError(
                    f"LearnedScale: set_timesteps was never called on its scheduler, a {type(scheduler).__name__}; "
                    "pass the pipeline, LearnedScale(omega, pipe), which follows the pipeline's scheduler"
                )
            self.timesteps, self.times, self.lookups, self.last = timesteps, None, 0, -1
            self.rows.forget()
        place = self._place(scheduler)
        self.use.used, self.lookups = True, self.lookups + 1
        if isinstance(place, int):
            self._check_place(place, scheduler)
        return self.rows.row(place, self.omega, None, self._times, x, Condition("condition", self.condition))

    def compared(self) -> None:
        """Warn in the last step of a run in which no product was computed."""
        index = getattr(self.scheduler, "_step_index", None)
        if isinstance(index, int) and index == len(self.scheduler.timesteps) - 1:
            self.use.warn_unless_used()

    def _times(self) -> Tensor:
        if self.times is None:
            self.times = times_for("LearnedScale", self.scheduler, self.omega)
        return self.times

    def _place(self, scheduler: Any) -> int | Tensor:
        """Return the index of the next step: the scheduler's, or a count of lookups if the scheduler has none."""
        if isinstance(scheduler, FusedScheduler):
            place = scheduler._index
            place = scheduler.begin_index if place is None else place
            return self._start() if place is None else place
        if hasattr(scheduler, "step_index"):
            place = scheduler.step_index
            place = getattr(scheduler, "begin_index", None) if place is None else place
            return self._start() if place is None else int(place)
        return self._start() + int(getattr(scheduler, "counter", self.lookups))  # PNDM counts its steps

    def _start(self) -> int:
        """Return the step at which the pipeline begins: pipelines that begin in the middle have get_timesteps."""
        count = getattr(self.source, "_num_timesteps", None)
        if count is None or not self.follows or not hasattr(type(self.source), "get_timesteps"):
            return 0
        return max(len(self.scheduler.timesteps) - count, 0)

    def _check_place(self, place: int, scheduler: Any) -> None:
        """Raise ValueError if the count of steps cannot be that of the pipeline."""
        self.here, self.last = (self.here + 1 if place == self.last else 1), place
        steps, name = len(self.timesteps), type(scheduler).__name__  # type: ignore[arg-type]
        if place >= steps:
            raise ValueError(
                f"LearnedScale: this is lookup {self.lookups} in a run of {steps} steps, and {name} counts no steps: "
                "the pipeline multiplies by guidance_scale more than once in a step; give it a scheduler that counts: "
                "pipe.scheduler = FusedScheduler(pipe.scheduler)"
            )
        if steps >= MANY and self.here >= steps:
            raise ValueError(
                f"LearnedScale: its scheduler, a {name}, stands at step {place} after {self.here} lookups, so it is "
                "not the one that samples; pass the pipeline, LearnedScale(omega, pipe), which follows its scheduler"
            )


class _Use:
    """Remember whether a scale was used, for the warning when it is deleted."""

    def __init__(self, source: Any, first: Tensor) -> None:
        self.source, self.first, self.used = source, first, False  # first: the timesteps before the run

    def warn_unless_used(self) -> None:
        """Warn if the scheduler ran, but the scale was never looked up."""
        scheduler = getattr(self.source, "scheduler", self.source)
        if self.used or scheduler.timesteps is self.first:
            return
        self.used = True
        warnings.warn(
            "LearnedScale: the scheduler ran, but omega was never looked up: the pipeline did not guide. Pass a "
            "negative prompt where the pipeline wants one, and LearnedScale as true_cfg_scale where it has that (Flux, "
            "Qwen-Image); a guidance-distilled model only embeds guidance_scale, and takes a number",
            stacklevel=2,
        )


def _check_pipeline(pipe: Any) -> None:
    """Raise ValueError for a pipeline without a product of a batch and guidance_scale."""
    name = type(pipe).__name__
    if name.startswith(APART):
        raise ValueError(
            f"LearnedScale: {name} guides the samples of a batch one by one, which a scale cannot tell apart; use "
            "LearnedGuidance with its modular pipeline"
        )
    unet, transformer = (getattr(getattr(pipe, part, None), "config", {}) for part in ("unet", "transformer"))
    own = getattr(pipe, "config", {})
    embeds = unet.get("time_cond_proj_dim") is not None or own.get("is_distilled", False)
    if transformer.get("guidance_embeds", False):
        embeds |= "true_cfg_scale" not in inspect.signature(type(pipe).__call__).parameters
    if embeds:
        raise ValueError(_embeds(name))


def _number(operation: str, value: Any) -> float:
    """Return a number, or raise TypeError."""
    if isinstance(value, numbers.Real):
        return float(value)
    raise _refused(operation, f" of a scale and a {type(value).__name__}")


def _refused(operation: str, of: str = " of a scale") -> TypeError:
    return TypeError(
        f"LearnedScale: {operation}{of} is not defined, expected a product with a tensor [B, ...], the weight of "
        "torch.lerp, or a sum, difference, product or comparison with a number"
    )


def _embeds(what: str) -> str:
    """Return the error message for a model that embeds the scale."""
    return (
        f"LearnedScale: {what} takes guidance_scale as one number that the network embeds; a guidance-distilled model "
        "has no unconditional prediction to guide from. Pass a number as guidance_scale; where the pipeline takes "
        "true_cfg_scale, pass LearnedScale there, with a negative prompt"
    )
