"""Hold the run of a solver as a table of coefficients; each step is one combine."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.guidance.api import guided_score
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.ops.combine.api import Combined, combine
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.columns import Column
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup, Prediction, arithmetic_dtype, omega_at, per_sample
from lgd_kernels.runtime.shown import kind, span
from lgd_kernels.sampling import step_rows

_WORDS = ("none", "one", "two", "three", "four")


@dataclass(frozen=True, eq=False, repr=False)
class StepPlan:
    """Hold a run of N calls of the network. After call i, with g the guided prediction at `times[i]` and z fresh noise,

        x    <- table[i, 0] . (x, g, kept, z)
        kept <- table[i, 1] . (x, g, kept, z)      only if the solver keeps a history: P = 2, else P = 1

    `times [N, B]` with a `table [N, B, P, 4]` give each sample its own run. More factors, up to seven in all, are for
    the `kept` of one, two and three calls earlier, which the step passes on and does not write again.

    `ends[i]` is the time at which a step from `times[i]` ends: the sampler calls `omega(c, s, t)` with s = ends[i] and
    t = times[i]. For the second call of a Heun step `ends[i]` is the end of the next step. A plan made by hand may omit
    `ends`.

    `start` is the scale of the noise to add to the first sample, for samplers that add noise before the first call.

    >>> import torch, lgd_kernels as lgd
    >>> plan = lgd.solvers.one_step(lgd.RectifiedFlow(), torch.tensor([1.0, 0.5, 0.0]))
    >>> x = torch.full((1, 1), 2.0)
    >>> for i, t in enumerate(plan.times):
    ...     x, kept = plan.step(i, x, cond=torch.ones(1, 1))
    >>> x
    tensor([[1.]])
    """

    times: Tensor  # [N] or [N, B], of each call of the network
    table: Tensor  # [N, P, 4] or [N, B, P, 4]: factors of x, g, kept and z; 5 to 7: and of the kept of earlier calls
    start: float | Tensor = 0.0  # a number, or [B]
    ends: Tensor | None = None  # as times: where the step from each time ends, the s of omega(c, s, t)
    stays: Tensor | None = None  # bool [N] or [N, B]: calls of a deep plan that keep its whole history
    prediction: Prediction | None = None  # what g is, if known

    def __repr__(self) -> str:
        table = f"table {list(self.table.shape)} {kind(self.table)}"
        return f"StepPlan({len(self)} calls, times {span(self.times)}, {table})"

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def remembers(self) -> bool:
        """Return whether the solver keeps a history."""
        return self.table.shape[-2] == 2

    @property
    def depth(self) -> int:
        """Return of how many calls a step uses the `kept`."""
        return self.table.shape[-1] - 3 if self.remembers else 0

    @property
    def deep(self) -> bool:
        """Return whether a step uses the `kept` of several calls: `kept` is then a tuple, the newest first."""
        return self.table.shape[-1] > 4

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StepPlan:
        """Move times and table to a device, the table in `dtype`. Call it once, before the loop: then no step copies
        the table."""
        start = self.start.to(device) if isinstance(self.start, Tensor) else self.start
        table = self.table.to(device, dtype or self.table.dtype)
        ends, stays = (one if one is None else one.to(device) for one in (self.ends, self.stays))
        return replace(self, times=self.times.to(device), table=table, start=start, ends=ends, stays=stays)

    def step(
        self,
        index: int | Tensor,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        omega: float | Tensor | OmegaLookup = 0.0,
        kept: Tensor | tuple[Tensor, ...] | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
        rule: Rule | None = None,
        impl: Impl | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """Return `(x, kept)` after call `index` of the network: one pass, unless a rule takes moments.

        Args:
            index: of the call: an int, or an int64 tensor on the device of the data, whose value the host does not
                read: 0-dim, or `[B]` for a different call for each sample.
            x, cond, uncond, omega, rule: as in `guided_step`; without uncond, cond is the guided prediction.
            kept: the `kept` that the step before returned; None in the first step. (With `index` a tensor the first
                takes zeros like x; a tuple of `depth` if the plan is `deep`.)
            noise, seed, first_sample: as in `guided_step`, for solvers that draw. z depends on the seed, not on the
                step: pass a different seed to each step.

        Differentiable in x, cond, uncond, omega, kept and noise. Raises TypeError or ValueError as `combine` does.
        """

        if rule is not None:
            checks.function("StepPlan.step", "rule", rule)
            cond, uncond = guided_score(cond, cond if uncond is None else uncond, omega, rule=rule, impl=impl), None
        history = () if kept is None else kept if isinstance(kept, tuple) else (kept,)
        if len(history) > 1 and len(history) > self.depth:
            most = f"{_WORDS[self.depth]}, the newest first" if self.deep else "one: this plan is not `deep`"
            raise ValueError(f"StepPlan.step: `kept` is a tuple of {len(history)}, expected at most {most}")
        if not isinstance(index, (int, Tensor)) or isinstance(index, bool):
            index = _index(index)
        if impl is not None:
            impls.named("StepPlan.step", impl)
        tensors, guided, depth = step_rows.checked(x, cond, uncond, history, noise), uncond is not None, len(history)
        if seed is None and isinstance(index, int) and step_rows.fits(self.table, omega, tensors):
            stacked = step_rows.step(self, index, tensors, omega, impl, guided, depth, noise is not None)
            return self._and_kept(stacked.unbind(0), history, index)
        if isinstance(index, Tensor):
            checks.dense("StepPlan.step", "index", index)
            if index.dtype not in (torch.int64, torch.int32) or index.ndim > 1:
                shape = list(index.shape)
                raise TypeError(
                    f"StepPlan.step: `index` is {index.dtype} of shape {shape}, expected int64, 0-dim or [B]"
                )
        wide, batch = arithmetic_dtype(*tensors), x.shape[0]
        table = self.table.to(x.device, wide)
        row = self._row(table, index, batch)  # [B, P, 4]
        self._check(index, depth, noise is not None, seed is not None)
        factors = [row[..., 0], row[..., 1]]
        columns: list[Column] = [0, 1]
        if guided:
            checks.omega("StepPlan.step", omega, "x", x)
            w = omega_at(omega, x.new_empty(0, dtype=wide))
            factors.append(row[..., 1] * (w[:, None] if w.ndim else w))
            columns.append((1, 2))
        factors += [row[..., place] for place in step_rows.PLACES[:depth]]
        columns += range(2 + guided, 2 + guided + depth)
        drawn: dict[str, Any] = {}
        if noise is not None:
            factors.append(row[..., 3])
            columns.append(2 + guided + depth)
        elif seed is not None:
            drawn = {"noise_scale": row[..., 3], "seed": seed, "first_sample": first_sample}
        found = combine(tensors, torch.stack(factors, -1), columns=columns, impl=impl, **drawn)
        assert not isinstance(found, (Tensor, Combined))  # one tensor for each of the P outputs
        return self._and_kept(found, history, index)

    def _and_kept(
        self, found: tuple[Tensor, ...], history: tuple[Tensor, ...], index: int | Tensor
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """Return the next sample, and the history for the next step."""
        if not self.deep:
            return found[0], found[1] if self.remembers else None
        older = history[: self.depth - 1]
        if self.stays is not None and len(history) > 1:
            stays = self._row(self.stays[..., None, None].to(found[1].device), index, found[1].shape[0])
            stays, pairs = per_sample(stays, found[1]), zip(history[1:], older, strict=False)
            older = (*(torch.where(stays, *pair) for pair in pairs), *older[len(history) - 1 :])
        return found[0], (found[1], *older)

    def _row(self, table: Tensor, index: int | Tensor, batch: int) -> Tensor:
        """Return the row of a step for each sample, `[B, P, 4]`."""
        if table.ndim == 4 and table.shape[1] != batch:
            raise ValueError(f"StepPlan.step: `x` has {batch} samples, expected {table.shape[1]}, as the plan's times")
        if table.ndim == 4 and isinstance(index, Tensor):
            return table[index, torch.arange(batch, device=table.device)]
        row = table.index_select(0, index.reshape(-1)) if isinstance(index, Tensor) else table[index]
        row = row if row.ndim == 3 else row.unsqueeze(0)
        return row.expand(batch, *row.shape[1:])

    def _check(self, index: int | Tensor, depth: int, noise: bool, seed: bool) -> None:
        """Raise ValueError unless the history and the noise that this step uses are given, where the host can read the
        table without a device sync."""
        if noise and seed:
            raise ValueError("StepPlan.step: `noise` and `seed` were both given, expected one of them")
        if isinstance(index, Tensor) or self.table.device.type != "cpu" or torch.compiler.is_compiling():
            return
        asked = self.table[index].reshape(-1, self.table.shape[-1]).abs().sum(0).tolist()
        if any(math.isnan(one) for one in asked):
            raise ValueError(
                f"StepPlan.step: factors of step {index} are NaN, as where the signal is 0, {checks.NO_DATA_IN_EPS}"
            )
        _, _, remembered, drawn, *before = asked
        needed = max((n for n, one in enumerate((remembered, *before), 1) if one), default=0)
        if needed > depth:
            said = "None" if depth == 0 else f"what {_WORDS[depth]} step{'s' * (depth > 1)} returned"
            raise ValueError(f"StepPlan.step: `kept` is {said} in step {index}, expected what the step before returned")
        if drawn and not noise and not seed:
            raise ValueError(f"StepPlan.step: step {index} adds noise but there is none; pass seed=... or noise=...")


def _index(value: Any) -> int:
    """Convert another integer, such as numpy's, or raise TypeError."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"StepPlan.step: `index` is a {type(value).__name__}, expected an int or an int64 tensor")
