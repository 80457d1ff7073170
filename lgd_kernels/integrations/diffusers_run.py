"""Follow the run of a diffusers scheduler: which step comes next, and omega there."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.integrations.diffusers_omega import Condition, RunOmega, shares, times_for
from lgd_kernels.integrations.diffusers_scheduler import FusedScheduler

MANY = 4  # steps: in a shorter run, as many lookups in one step are no sign of a scheduler that stands still
COUNTER = "_lgd_counter"


class Run:
    """Look omega up in the run of a scheduler; shared by a LearnedScale and those that were computed from it."""

    def __init__(self, omega: Any, source: Any, condition: Tensor | None) -> None:
        self.omega = float(omega) if isinstance(omega, int) else omega
        self.source, self.follows, self.condition = source, hasattr(source, "scheduler"), condition
        self.rows = RunOmega("LearnedScale")
        self.timesteps: Tensor | None = None  # of the run
        self.times: Tensor | None = None
        self.here, self.last = 0, -1  # lookups in this step; the place of this step
        self.use = _Use(source, self.scheduler.timesteps)
        weakref.finalize(self, self.use.warn_unless_used)
        if not _counts(self.scheduler):
            counter_of(self.scheduler)

    @property
    def scheduler(self) -> Any:
        """Return the scheduler that samples."""
        return self.source.scheduler if self.follows else self.source

    def lookup(self, x: Tensor) -> tuple[Tensor, int | Tensor]:
        """Return omega of the whole run `[N + 1, B]`, and the index of the step that the scheduler takes next."""
        scheduler = self.scheduler
        timesteps = scheduler.timesteps
        if timesteps is not self.timesteps:
            if getattr(scheduler, "num_inference_steps", 0) is None and self.use.first is timesteps:
                raise ValueError(
                    f"LearnedScale: set_timesteps was never called on its scheduler, a {type(scheduler).__name__}; "
                    "pass the pipeline, LearnedScale(omega, pipe), which follows the pipeline's scheduler"
                )
            self.timesteps, self.times, self.last = timesteps, None, -1
            self.rows.forget()
        place = self._place(scheduler)
        self.use.used = True
        if isinstance(place, int):
            self._check_place(place, scheduler)
        return self.rows.of_run(self.omega, None, self._times, x, Condition("condition", self.condition)), place

    def compared(self) -> None:
        """Note that a pipeline compared the scale. Warn in the last step of a run without a lookup."""
        self.use.compared = True
        index = getattr(self.scheduler, "_step_index", None)
        if isinstance(index, int) and index == len(self.scheduler.timesteps) - 1:
            self.use.warn_unless_used()

    def _times(self) -> Tensor:
        if self.times is None:
            self.times = times_for("LearnedScale", self.scheduler, self.omega)
        return self.times

    def _place(self, scheduler: Any) -> int | Tensor:
        """Return the index of the next step, 0-dim if only the device knows it."""
        if isinstance(scheduler, FusedScheduler):
            place = scheduler._index
            place = scheduler.begin_index if place is None else place
            return self._start() if place is None else place
        if _counts(scheduler):
            place = scheduler.step_index
            place = getattr(scheduler, "begin_index", None) if place is None else place
            return self._start() if place is None else int(place)
        counter = counter_of(scheduler)
        place = counter.next(scheduler.timesteps)
        if place is None:
            place = self._start()
            counter.expected = scheduler.timesteps, place
        return place

    def _start(self) -> int:
        """Return the step at which the pipeline begins: pipelines that begin in the middle have get_timesteps."""
        count = getattr(self.source, "_num_timesteps", None)
        if count is None or not self.follows or not hasattr(type(self.source), "get_timesteps"):
            return 0
        return max(len(self.scheduler.timesteps) - count, 0)

    def _check_place(self, place: int, scheduler: Any) -> None:
        """Raise ValueError if the scheduler stands still."""
        self.here, self.last = (self.here + 1 if place == self.last else 1), place
        steps = len(scheduler.timesteps)
        if steps >= MANY and self.here >= steps:
            raise ValueError(
                f"LearnedScale: its scheduler, a {type(scheduler).__name__}, stands at step {place} after {self.here} "
                "lookups, so it is not the one that samples; pass the pipeline, LearnedScale(omega, pipe), which "
                "follows its scheduler"
            )


class Counter:
    """Note the steps of a scheduler that does not count them."""

    run: Tensor | None = None  # the timesteps of the run
    place = -1  # of the last step
    expected: tuple[Tensor, int] | None = None  # timesteps of a run, and its first step, as a scale took it

    def next(self, timesteps: Tensor) -> int | None:
        """Return the index of the next step; None before the first one of a run."""
        return self.place + 1 if self.run is timesteps and self.place + 1 < len(timesteps) else None

    def note(self, scheduler: Any, timestep: Any) -> None:
        """Note a step. Raise ValueError if it is the first one, and not where omega was looked up."""
        timesteps, expected, self.expected = scheduler.timesteps, self.expected, None
        places = _places(timestep, timesteps)
        if not places:
            return  # no step of this run: the scheduler may refuse it
        taken = expected[1] if expected is not None and expected[0] is timesteps else None
        following = self.place + 1 if self.run is timesteps else taken
        place = following if following in places else places[0]
        if taken is not None and place != taken:
            raise ValueError(
                f"LearnedScale: this run begins at step {place} of {len(timesteps)}, and omega was looked up at step "
                f"{taken}: a {type(scheduler).__name__} does not count its steps, so the scale cannot tell; give the "
                "pipeline a scheduler that does: pipe.scheduler = FusedScheduler(pipe.scheduler)"
            )
        self.run, self.place = timesteps, place


def counter_of(scheduler: Any) -> Counter:
    """Return the counter of a scheduler, whose `step` notes its steps from now on."""
    found = scheduler.__dict__.get(COUNTER)
    if found is None:
        scheduler.__dict__[COUNTER] = found = Counter()
        scheduler.step = types.MethodType(_noting(type(scheduler).step), scheduler)  # a copy's is bound to the copy
    return found


@functools.cache
def _noting(step: Any) -> Any:
    """Return a `step` that notes its timestep, with the same signature."""

    @functools.wraps(step)
    def noting(scheduler: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler.__dict__[COUNTER].note(scheduler, timestep)
        return step(scheduler, model_output, timestep, *args, **kwargs)

    return noting


def _counts(scheduler: Any) -> bool:
    return hasattr(scheduler, "step_index")


def _places(timestep: Any, timesteps: Tensor) -> list[int]:
    """Return where a timestep is among those of a run, without reading values if it is an entry of them in memory."""
    at = torch.as_tensor(timestep, device=getattr(timestep, "device", timesteps.device)).reshape(-1)[:1]
    if shares(at, timesteps):
        return [(at.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)]
    return (timesteps.to(at.device) == at).nonzero().flatten().tolist()


class _Use:
    """Remember whether a scale was used, for the warning when it is deleted. Keeps no pipeline alive."""

    def __init__(self, source: Any, first: Tensor) -> None:
        self.source, self.first = weakref.ref(source), first  # first: the timesteps before the run
        self.compared, self.used = False, False

    def warn_unless_used(self) -> None:
        """Warn if a pipeline compared the scale and its scheduler ran, but the scale was never looked up."""
        source = self.source()
        if self.used or not self.compared or source is None:
            return
        if getattr(source, "scheduler", source).timesteps is self.first:
            return
        self.used = True
        warnings.warn(
            "LearnedScale: the scheduler ran, but omega was never looked up: the pipeline did not guide. Pass a "
            "negative prompt where the pipeline wants one, and LearnedScale as true_cfg_scale where it has that (Flux, "
            "Qwen-Image); a guidance-distilled model only embeds guidance_scale, and takes a number",
            stacklevel=2,
        )
