"""A run of a solver as a table of coefficients, computed once; each step is one combine."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lgd_kernels.guidance.api import guided_score
from lgd_kernels.guidance.rules import Rule
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import OmegaLookup, Prediction, arithmetic_dtype, omega_at, per_sample
from lgd_kernels.runtime.shown import kind, span
from lgd_kernels.sampling import step_rows


@dataclass(frozen=True, eq=False, repr=False)
class StepPlan:
    """A run of N calls of the network. After call i, with g the guided prediction at `times[i]` and z fresh noise,

        x    <- table[i, 0] . (x, g, kept, z)
        kept <- table[i, 1] . (x, g, kept, z)      only where the solver remembers something: P = 2, else P = 1

    `times [N, B]` with a `table [N, B, P, 4]` are a run of its own for each sample. A table of five factors has one
    more, for what was kept a call earlier, which is passed on and not written again.

    `ends` are the times at which a step from `times[i]` ends: the sampler calls `omega(c, s, t)` with s = ends[i] and
    t = times[i]. For the second call of a Heun step that is the end of the next step. A plan made by hand may omit
    them.

    `start` is the noise to add to the first sample, for samplers that add noise before they call the network.

    >>> import torch, lgd_kernels as lgd
    >>> plan = lgd.solvers.one_step(lgd.RectifiedFlow(), torch.tensor([1.0, 0.5, 0.0]))
    >>> x = torch.full((1, 1), 2.0)
    >>> for i, t in enumerate(plan.times):
    ...     x, kept = plan.step(i, x, cond=torch.ones(1, 1))
    >>> x
    tensor([[1.]])
    """

    times: Tensor  # [N] or [N, B], of each call of the network
    table: Tensor  # [N, P, 4] or [N, B, P, 4]: factors of x, g, kept and z; 5: and of what was kept before
    start: float | Tensor = 0.0  # a number, or [B]
    ends: Tensor | None = None  # as times: where a step that starts at each of them ends, the s of omega(c, s, t)
    stays: Tensor | None = None  # bool [N] or [N, B]: calls of a deep plan that keep its whole history
    prediction: Prediction | None = None  # what g is, if known

    def __repr__(self) -> str:
        table = f"table {list(self.table.shape)} {kind(self.table)}"
        return f"StepPlan({len(self)} calls, times {span(self.times)}, {table})"

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def remembers(self) -> bool:
        return self.table.shape[-2] == 2

    @property
    def deep(self) -> bool:
        """Whether a step also uses what was kept a call earlier: `kept` is then a tuple, the newest first."""
        return self.table.shape[-1] == 5

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StepPlan:
        """Move times and table to a device, the table in `dtype`. Do it once, before the loop: then a step copies
        nothing."""
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
        """One step: `(x, kept)` after call `index` of the network. One pass, without a rule that takes moments.

        Args:
            index: of the call: an int, or an int64 tensor on the device of the data, whose value the host does not
                read: 0-dim, or `[B]` for a different call for each sample.
            x, cond, uncond, omega, rule: as in `guided_step`; without uncond, cond is the guided prediction.
            kept: what the step before returned; None in the first. (With `index` a tensor: zeros like x, there; a tuple
                of two where the plan is `deep`.)
            noise, seed, first_sample: as in `guided_step`, for solvers that draw. `step` draws z from the seed alone:
                pass a different one to each step.

        Differentiable in x, cond, uncond, omega, kept and noise. Raises TypeError or ValueError as `combine` does.
        """

        if rule is not None:
            checks.function("StepPlan.step", "rule", rule)
            cond, uncond = guided_score(cond, cond if uncond is None else uncond, omega, rule=rule, impl=impl), None
        history = () if kept is None else kept if isinstance(kept, tuple) else (kept,)
        if len(history) > 1 and len(history) > 1 + self.deep:
            most = "two, the newest first" if self.deep else "one: this plan is not `deep`"
            raise ValueError(f"StepPlan.step: `kept` is a tuple of {len(history)}, expected at most {most}")
        if not isinstance(index, (int, Tensor)) or isinstance(index, bool):
            index = _index(index)
        if impl is not None:
            impls.named("StepPlan.step", impl)
        short = seed is None and isinstance(index, int)
        if short and step_rows.fits(self.table, x, omega, cond, uncond, noise, *history):
            found = step_rows.step(self, index, x, cond, uncond, omega, history, noise, impl)
            return self._and_kept(found.unbind(0), history, index)
        tensors = step_rows.checked(x, cond, uncond, history, None)
        if noise is not None:
            checks.samples("StepPlan.step", x=x, noise=noise)
        if isinstance(index, Tensor):
            checks.dense("StepPlan.step", "index", index)
        if isinstance(index, Tensor) and (index.dtype not in (torch.int64, torch.int32) or index.ndim > 1):
            raise TypeError(
                f"StepPlan.step: `index` is {index.dtype} of shape {list(index.shape)}, expected int64, 0-dim or [B]"
            )
        wide, batch = arithmetic_dtype(*tensors, noise), x.shape[0]
        table = self.table.to(x.device, wide)
        row = self._row(table, index, batch)  # [B, P, 4]
        self._check(index, len(history), noise, seed)
        factors, columns = [row[..., 0], row[..., 1]], [0, 1]
        if uncond is not None:
            checks.omega("StepPlan.step", omega, "x", x)
            w = omega_at(omega, x.new_empty(0, dtype=wide))
            factors.append(row[..., 1] * (w[:, None] if w.ndim else w))
            columns.append((1, 2))
        for place in range(len(history)):
            factors.append(row[..., (2, 4)[place]])
            columns.append(len(tensors) - len(history) + place)
        drawn = {}
        if noise is not None:
            factors.append(row[..., 3])
            columns.append(len(tensors))
            tensors.append(noise)
        elif seed is not None:
            drawn = {"noise_scale": row[..., 3], "seed": seed, "first_sample": first_sample}
        found = combine(tensors, torch.stack(factors, -1), columns=columns, impl=impl, **drawn)
        return self._and_kept(found, history, index)

    def _and_kept(self, found: tuple[Tensor, ...], history: tuple[Tensor, ...], index: int | Tensor):
        """The next sample, and the history for the next step."""
        if not self.deep:
            return found if self.remembers else (found[0], None)
        if self.stays is not None and len(history) == 2:
            stays = self._row(self.stays[..., None, None].to(found[1].device), index, found[1].shape[0])
            history = (torch.where(per_sample(stays, found[1]), history[1], history[0]),)
        return found[0], (found[1], *history[:1])

    def _row(self, table: Tensor, index: int | Tensor, batch: int) -> Tensor:
        if table.ndim == 4 and table.shape[1] != batch:
            raise ValueError(f"StepPlan.step: `x` has {batch} samples, expected {table.shape[1]}, as the plan's times")
        if table.ndim == 4 and isinstance(index, Tensor):
            return table[index, torch.arange(batch, device=table.device)]
        row = table.index_select(0, index.reshape(-1)) if isinstance(index, Tensor) else table[index]
        row = row if row.ndim == 3 else row.unsqueeze(0)
        return row.expand(batch, *row.shape[1:])

    def _check(self, index, depth, noise, seed) -> None:
        """If the host can read the table without waiting, check that the history and noise that this row uses are
        given."""
        if noise is not None and seed is not None:
            raise ValueError("StepPlan.step: `noise` and `seed` were both given, expected one of them")
        if isinstance(index, Tensor) or self.table.device.type != "cpu" or torch.compiler.is_compiling():
            return
        asked = self.table[index].reshape(-1, self.table.shape[-1]).abs().sum(0).tolist()
        if any(math.isnan(one) for one in asked):
            raise ValueError(
                f"StepPlan.step: factors of step {index} are NaN, as where the signal is 0, {checks.NO_DATA_IN_EPS}"
            )
        _, _, remembered, drawn, *before = asked
        if (remembered and depth == 0) or (any(before) and depth < 2):
            said = "None" if depth == 0 else "what one step returned"
            raise ValueError(f"StepPlan.step: `kept` is {said} in step {index}, expected what the step before returned")
        if drawn and noise is None and seed is None:
            raise ValueError(f"StepPlan.step: step {index} adds noise but there is none; pass seed=... or noise=...")


def _index(value) -> int:
    """An integer of another kind, as numpy's."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"StepPlan.step: `index` is a {type(value).__name__}, expected an int or an int64 tensor")
