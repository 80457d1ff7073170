"""Take the fast path of `StepPlan.step`: coefficients computed once for a run, the checks, and combine's operator. For
a small sample everything else costs the host more time than the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lgd_kernels.ops.combine import op
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.columns import Column, flat
from lgd_kernels.runtime.levels import OmegaLookup, omega_at, widest

if TYPE_CHECKING:
    from lgd_kernels.sampling.step_plan import StepPlan

OP, MOST = "StepPlan.step", 16
PLACES = (2, 4, 5, 6)  # of the factors of the history, the newest first, in a row of the table


class Rows:
    """Hold the columns that a step reads and the coefficients of a run, `[N, B, P, K]`, or B = 1 where all samples
    share them: `fixed`, except `omega share` in the column of guidance."""

    kept: tuple[float, tuple[Tensor, ...] | None]  # the last omega, and all coefficients with it

    def __init__(self, table: Tensor, guided: bool, depth: int, noise: bool, like: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            shared = table.ndim == 3
            table = table.to(like)[:, None] if shared else table.to(like)
            factors = [0, 1, *([1] if guided else []), *PLACES[:depth], *([3] if noise else [])]
            fixed = table[..., factors]
            if guided:
                share, fixed[..., 2] = table[..., 1:2].clone(), 0.0
                self.guidance = torch.arange(len(factors), device=fixed.device).eq(2)
                self.run, self.steps = (fixed, share), list(zip(fixed.unbind(0), share.unbind(0), strict=True))
            self.shared, self.batch = shared, fixed.shape[1]
            self.kept = 0.0, fixed.unbind(0)
        names: list[Column] = [0, 1, *([(1, 2)] if guided else [])]
        first = 3 if guided else 2
        names += range(first, first + depth + noise)
        self.columns = flat(names, first + depth + noise)
        self.checked: set[int] = set()  # steps whose history and noise are known to be given

    def at(self, index: int, omega: float | Tensor | OmegaLookup) -> Tensor:
        """Return the coefficients of a step, `[B, P, K]`, or B = 1. If omega is the same number in two calls, compute
        and keep the coefficients of the whole run with this omega."""
        if isinstance(omega, (Tensor, OmegaLookup)):
            return self._weighted(*self.steps[index], omega_at(omega, self.run[0]).view(-1, 1, 1))
        kept = self.kept  # read once: another thread may replace it
        if omega != kept[0]:
            self.kept = omega, None
            return self._weighted(*self.steps[index], omega)
        steps = kept[1]
        if steps is None:
            with torch.inference_mode(False), torch.no_grad():
                steps = self._weighted(*self.run, omega).unbind(0)
            self.kept = omega, steps
        return steps[index]

    def _weighted(self, fixed: Tensor, share: Tensor, omega: float | Tensor) -> Tensor:
        """Put `omega share` into the column of guidance. (In a sum, an infinite omega would make the others NaN.)"""
        return torch.where(self.guidance, share * omega, fixed)


def fits(table: Tensor, omega: float | Tensor | OmegaLookup, tensors: list[Tensor]) -> bool:
    """Return whether kept coefficients may be used: no tracer, profiler, dispatch mode, subclass or transform is
    active, no CUDA graph is captured (checked last: the call breaks a compiled graph), and the table requires no
    grad."""
    weights = omega if isinstance(omega, tuple) else (omega,) if isinstance(omega, Tensor) else ()
    if table.requires_grad or not impls.direct(*tensors, *weights) or impls.transforms_active():
        return False
    return not tensors[0].is_cuda or not torch.cuda.is_current_stream_capturing()


def rows(plan: StepPlan, x: Tensor, guided: bool, depth: int, noise: bool, dtype: torch.dtype) -> Rows:
    """Return the rows of a plan, which keeps them: for each version of its table, and for each CUDA stream, since
    streams do not wait for each other."""
    table = plan.table
    kept = plan.__dict__.setdefault("_rows", {})
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    version = 0 if table.is_inference() else table._version
    key = guided, depth, noise, x.device, dtype, version, stream
    found = kept.get(key)
    if found is None:
        if len(kept) >= MOST:
            kept.clear()
        found = kept[key] = Rows(table, guided, depth, noise, x.new_empty(0, dtype=dtype))
    return found


def checked(
    x: Tensor, cond: Tensor, uncond: Tensor | None, history: tuple[Tensor, ...], noise: Tensor | None
) -> list[Tensor]:
    """Check the tensors that were given, and return them in this order."""
    named = {"x": x, "cond": cond}
    if uncond is not None:
        named["uncond"] = uncond
    for n, one in enumerate(history):
        named[f"kept[{n}]" if n else "kept"] = one
    if noise is not None:
        named["noise"] = noise
    checks.samples(OP, **named)
    return list(named.values())


def step(
    plan: StepPlan,
    index: int,
    tensors: list[Tensor],
    omega: float | Tensor | OmegaLookup,
    impl: str | None,
    guided: bool,
    depth: int,
    noise: bool,
) -> Tensor:
    """Return what `StepPlan.step` computes from the tensors of `checked`, `[P, B, ...]`; `depth` is the length of the
    history."""
    x = tensors[0]
    wide = widest(*[tensor.dtype for tensor in tensors])
    found, batch = rows(plan, x, guided, depth, noise, wide), x.shape[0]
    if not found.shared and found.batch != batch:
        raise ValueError(f"{OP}: `x` has {batch} samples, expected {found.batch}, as the plan's times")
    if index not in found.checked:
        plan._check(index, depth, noise, False)
        found.checked.add(index)
    if guided:
        checks.omega(OP, omega, "x", x)
    coefficients = found.at(index, omega if guided else 0.0)
    if found.batch != batch:
        coefficients = coefficients.expand(batch, -1, -1)
    return op.combined(tensors, coefficients, found.columns, impl)
