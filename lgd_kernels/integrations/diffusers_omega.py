"""Compute omega(c, s, t) for every step of a run in diffusers, once for a batch and its conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.integrations.diffusers_plans import has_indices, is_flow, times_of
from lgd_kernels.sampling.schedules import Discrete, RectifiedFlow


def times_for(where: str, scheduler: Any, omega: Any) -> Tensor:
    """Return the times of a run, `[N + 1]`, as `times_of` does. Raise ValueError for an omega of other times."""
    schedule, flow = getattr(omega, "schedule", None), is_flow(scheduler)
    known = flow or has_indices(scheduler)
    if schedule is not None and (not known or not isinstance(schedule, RectifiedFlow if flow else Discrete)):
        takes = "t in [0, 1] of flow matching" if flow else "indices of its training table, those of Discrete"
        takes = takes if known else f"timesteps of its own, such as {float(scheduler.timesteps[0]):.4g}"
        raise ValueError(
            f"{where}: omega was learned with times of {type(schedule).__name__}, but this {type(scheduler).__name__} "
            f"has {takes}; learn omega for this model, or pass a function of (c, s, t) that converts the times"
        )
    return times_of(scheduler)


class Condition(NamedTuple):
    """Hold c, and the name of the argument that it came from, for error messages."""

    name: str
    value: Tensor | None


class RunOmega:
    """Keep omega of a whole run, `[N + 1, B]`: the steps, and a row of NaN for a step that is not of the run.

    omega does not depend on the sample, so a function is called once, with N * B rows, and again if the batch, the
    device, the grad mode or the condition changes; or in every step, if the result requires grad.
    """

    def __init__(self, where: str) -> None:
        self.where = where  # the name in error messages
        self.forget()

    def forget(self) -> None:
        """Forget the rows: a run begins."""
        self._rows: Tensor | None = None
        self._made_for: tuple[Any, ...] = ()  # what the rows depend on

    def of_run(
        self,
        omega: float | Tensor | Callable[[Any, Tensor, Tensor], Tensor] | None,
        interval: tuple[float, float] | None,
        times: Callable[[], Tensor],
        pred: Tensor,
        c: Condition,
    ) -> Tensor:
        """Return the rows, `[N + 1, B]`: the same tensor until something changes.

        Args:
            interval: (low, high): omega is 0 unless low < t <= high.
            times: returns the times of the run, `[N + 1]`.
            pred: a prediction `[B, ...]`.
        """
        made_for, rows = (pred.shape[0], pred.device, torch.is_grad_enabled()), self._rows
        fresh = self._made_for[:-1] == made_for and self._made_for[-1] is c.value
        if rows is None or not fresh or rows.requires_grad:  # a backward pass frees the graph of these rows
            with ordinary():
                self._rows = rows = self._table(omega, interval, times().to(pred.device), pred.shape[0], c)
            self._made_for = *made_for, c.value
        return rows

    def _table(self, omega: Any, interval: tuple[float, float] | None, run: Tensor, batch: int, c: Condition) -> Tensor:
        """Compute omega of the whole run, and a row of NaN: `[N + 1, B]`."""
        t, s = (one.repeat_interleave(batch) for one in (run[:-1], _next(run)))  # [N B]
        steps = run.numel() - 1
        if not callable(omega) or isinstance(omega, Tensor):
            found = torch.as_tensor(omega, dtype=torch.float32, device=run.device)
            found = repeated(self.where, "omega", found, batch).expand(steps, batch).flatten()
        else:
            value = c.value
            if value is not None:
                value = repeated(self.where, c.name, value, batch).to(run.device)
                value = value.repeat(steps, *(1,) * (value.ndim - 1))
            if isinstance(omega, torch.nn.Module) and isinstance(getattr(omega, "schedule", None), Discrete):
                s, t = s.round().long(), t.round().long()  # some schedulers stop between two indices
            found = omega(value, s, t)
            if not isinstance(found, Tensor) or found.shape != t.shape:
                said = str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{self.where}: `omega` returned {said}, expected a tensor {list(t.shape)}, as t")
        if interval is not None:
            low, high = interval
            found = torch.where((t > low) & (t <= high), found, torch.zeros_like(found))
        found = found.view(steps, batch)
        return torch.cat((found, torch.full_like(found[:1], torch.nan)))


def _next(run: Tensor) -> Tensor:
    """Return s of every call, `[N]`: the largest time of the run below t. Heun and PNDM call twice at a time, and s = t
    would be no step that omega has learned."""
    below = run < run[:-1, None]  # [N, N + 1]
    highest = torch.where(below, run, -torch.inf).amax(1)
    return torch.where(below.any(1), highest, run[1:])


def repeated(where: str, name: str, value: Tensor, batch: int) -> Tensor:
    """Repeat the entries of prompts for their samples: diffusers keeps the images of a prompt together."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: `{name}` is a {type(value).__name__}, expected a tensor [B, ...]"
            + ("; set guider.condition_value to what omega takes" if where == "LearnedGuidance" else "")
        )
    count = value.shape[0] if value.ndim else 1
    if count == 0 or batch % count:
        raise ValueError(
            f"{where}: `{name}` has {count} entries for a batch of {batch}, expected one for each sample, or "
            "one for each prompt of num_images_per_prompt samples"
        )
    value = value.reshape(1) if value.ndim == 0 else value
    return value if count == batch else value.repeat_interleave(batch // count, 0)


def shares(at: Tensor, timesteps: Tensor) -> bool:
    """Return whether `at` is an entry of `timesteps` in memory, which the host knows without reading values."""
    same = at.dtype == timesteps.dtype and at.device == timesteps.device and timesteps.ndim == 1
    return same and at.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Leave inference mode, without grad, so that training can later use the tensors that are kept between steps."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
