"""Guide in the classic pipelines of diffusers: a guidance_scale that is looked up in every step."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from lgd_kernels.integrations.diffusers_run import Run

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


class LearnedScale:
    """Guide a classic pipeline with a weight for each sample and step: a guidance_scale that is 1 + omega(c, s, t).

        scale = LearnedScale(omega, pipe, condition)
        pipe(prompt, guidance_scale=scale)              # or true_cfg_scale=scale, where the pipeline takes it

    A pipeline compares guidance_scale with 1, and multiplies `cond - uncond` by it. In a comparison the scale, and
    every scale computed from it, counts as 2, so that the pipeline evaluates both predictions; a product with a tensor
    `[B, ...]` looks omega up at the scheduler's next step and weighs every sample by its own, in float32 (float64 for
    float64), rounded once to the dtype of the tensor. `torch.lerp` works likewise. A sum, difference or product with a
    number is another scale.

    Args:
        omega: a float; a tensor `[B]`, one weight for each sample or prompt; or a function `omega(c, s, t) -> [B]`, an
            nn.Module or an `OmegaTable`. t and s are float32 times, as `diffusers_plans.times_of` converts the
            scheduler's timesteps: indices of the training table and -1 for the data, or t in [0, 1] for flow matching.
            s is the next time below t, also in the second call of a step of Heun's.
        scheduler: the pipeline, whose scheduler may be replaced later, or its scheduler. Pass the pipeline if you can:
            then a pipeline that only embeds the scale is refused here. Schedulers that do not count their steps (DDIM,
            DDPM, PNDM) get a `step` that notes the timestep, and does nothing else. Where a run begins is then known
            only after its first step: the scale takes the pipeline's word for it, and the step raises ValueError if it
            is another one.
        condition: c, the first argument of omega: a tensor with an entry for each sample, or for each prompt of
            `num_images_per_prompt` samples; e.g. int64 labels for a table, or embeddings for a network. None, if omega
            does not depend on it. May be set between runs: `scale.condition = ...`.
        base: the guidance_scale that means omega = 0: 1 where the pipeline computes `uncond + scale (cond - uncond)`,
            0 where it computes `cond + scale (cond - uncond)`, as Cosmos, Kandinsky 3 and Krea 2 do. By default that of
            the pipeline, and 1 for a scheduler.

    Raises ValueError for a pipeline that has no unconditional prediction because its network embeds guidance_scale, and
    for a pipeline that guides the samples of a batch one by one (Z-Image: use LearnedGuidance with its modular
    pipeline). A scale that a pipeline embeds nevertheless (`torch.full([1], scale)`) raises TypeError there. A scale
    that a pipeline compared and never looked up gives a warning: in the last step, or when it is deleted.

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
        self._run = Run(omega, scheduler, condition)
        self._factor, self._shift = 1.0, 1.0 if base is None else float(base)  # scale = factor * omega + shift
        self._kept: tuple[Tensor, tuple[bool, int], Tensor, tuple[Tensor, ...]] | None = None  # weights of the run

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
        return STAND_IN

    def __float__(self) -> float:
        pipe = self._run.source
        if getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds", False):
            raise TypeError(_embeds(type(pipe).__name__))  # torch.tensor([scale] * n, dtype=...)
        warnings.warn(
            f"LearnedScale: float(scale) is {STAND_IN:g}, which stands for every weight in comparisons; where that "
            "number guides, omega is not looked up",
            stacklevel=2,
        )
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

    def __deepcopy__(self, memo: Any) -> LearnedScale:
        return self._affine(1.0, 0.0)  # of the same run: a copy of the pipeline would stand still

    def _affine(self, factor: Any, shift: Any) -> LearnedScale:
        """Return factor * scale + shift."""
        made = object.__new__(type(self))
        made._run, made._kept = self._run, None
        made._factor, made._shift = float(factor) * self._factor, float(factor) * self._shift + float(shift)
        return made

    def _weight(self, x: Tensor) -> Tensor:
        """Return the scale of this step for each sample of x, in the shape that multiplies it: `[B, 1, ...]`."""
        if x.ndim == 0:
            raise ValueError("LearnedScale: the scale was multiplied by a single number, expected a tensor [B, ...]")
        rows, place = self._run.lookup(x)
        made_for, kept = (x.dtype == torch.float64, x.ndim), self._kept
        if kept is None or kept[0] is not rows or kept[1] != made_for:
            weights = self._factor * rows.to(torch.float64 if made_for[0] else torch.float32) + self._shift
            weights = weights.view(*weights.shape, *(1,) * (x.ndim - 1))
            self._kept = kept = rows, made_for, weights, weights.unbind(0)
        if isinstance(place, int):
            return kept[3][place]
        return kept[2].index_select(0, place.to(x.device).view(1))[0]

    def _product(self, x: Tensor) -> Tensor:
        weight = self._weight(x)
        return x * weight if x.dtype == weight.dtype else (x.to(weight.dtype) * weight).to(x.dtype)


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
