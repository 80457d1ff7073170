"""The short way of a `StepPlan.step`: coefficients laid out once for a run, checks in the caller's words, and combine's
operator. For a small sample everything else costs the host more than the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.combine import op
from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.columns import flat
from lgd_kernels.runtime.levels import OmegaLookup, omega_at, widest

OP, MOST = "StepPlan.step", 16


class Rows:
    """The columns that a step reads, and for each step of a run their coefficients, `[N, B, P, K]`, or B = 1 where all
    samples share them: `fixed`, and in the column of guidance `omega share`."""

    def __init__(self, table: Tensor, guided: bool, depth: int, noise: bool, like: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            shared = table.ndim == 3
            table = table.to(like)[:, None] if shared else table.to(like)
            factors = [0, 1, *([1] if guided else []), *(2, 4)[:depth], *([3] if noise else [])]
            fixed, share = table[..., factors], table[..., 1:2].clone()
            self.guidance = torch.arange(len(factors), device=fixed.device).eq(2) & guided
            if guided:
                fixed[..., 2] = 0.0
            self.shared, self.batch = shared, fixed.shape[1]
            self.run, self.steps = (fixed, share), list(zip(fixed.unbind(0), share.unbind(0), strict=True))
            self.kept = 0.0, fixed.unbind(0)  # omega, and all coefficients with it
        names = [0, 1, *([(1, 2)] if guided else [])]
        first = 3 if guided else 2
        names += range(first, first + depth + noise)
        self.columns, self.checked = flat(names, first + depth + noise), set()

    def at(self, index: int, omega: float | Tensor | OmegaLookup) -> Tensor:
        """`[B, P, K]`, or B = 1; for a number that comes twice in a row they are worked out for the whole run, and kept
        until another does."""
        if isinstance(omega, (Tensor, OmegaLookup)):
            return self._weighted(*self.steps[index], omega_at(omega, self.run[0]).view(-1, 1, 1))
        kept = self.kept  # looked up once: another thread may put its own there
        if omega != kept[0]:
            self.kept = omega, None
            return self._weighted(*self.steps[index], omega)
        if kept[1] is None:
            with torch.inference_mode(False), torch.no_grad():
                kept = self.kept = omega, self._weighted(*self.run, omega).unbind(0)
        return kept[1][index]

    def _weighted(self, fixed: Tensor, share: Tensor, omega: float | Tensor) -> Tensor:
        """No sum, in which an infinite omega would be NaN elsewhere."""
        return torch.where(self.guidance, share * omega, fixed)


def fits(table: Tensor, x: Tensor, omega: float | Tensor | OmegaLookup, *others: Tensor | None) -> bool:
    """Whether nothing looks on, so that what was laid out may be used again: also no CUDA graph, whose replay would not
    know of it (asked last: the question breaks a compiled graph), and no gradient to the table itself."""
    weights = omega if isinstance(omega, tuple) else (omega,) if isinstance(omega, Tensor) else ()
    if (
        table.requires_grad
        or not isinstance(x, Tensor)
        or not impls.direct(x, *weights, *others)
        or impls.transforms_active()
    ):
        return False
    return not x.is_cuda or not torch.cuda.is_current_stream_capturing()


def rows(plan, x: Tensor, guided: bool, depth: int, noise: bool, dtype: torch.dtype) -> Rows:
    """Of a plan, kept with it: for what its table holds now, and for each CUDA stream, as none waits for another."""
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
    """Check the given tensors by name, and return them in this order."""
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
    plan,
    index: int,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    omega: float | Tensor | OmegaLookup,
    history: tuple[Tensor, ...],
    noise: Tensor | None,
    impl: str | None,
) -> Tensor:
    """What `StepPlan.step` makes of the same, `[P, B, ...]`."""
    tensors = checked(x, cond, uncond, history, noise)
    wide = widest(*[tensor.dtype for tensor in tensors])
    found, batch = rows(plan, x, uncond is not None, len(history), noise is not None, wide), x.shape[0]
    if not found.shared and found.batch != batch:
        raise ValueError(f"{OP}: `x` has {batch} samples, expected {found.batch}, as the plan's times")
    if index not in found.checked:
        plan._check(index, len(history), noise, None)
        found.checked.add(index)
    if uncond is not None:
        checks.omega(OP, omega, "x", x)
    coefficients = found.at(index, omega if uncond is not None else 0.0)
    if found.batch != batch:
        coefficients = coefficients.expand(batch, -1, -1)
    return op.combined(tensors, coefficients, found.columns, impl)
