"""The short way of a `StepPlan.step`: coefficients laid out once for a run, checks in the caller's words, and combine's
operator. For a small sample everything else costs the host more than the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels import checks, impls
from lgd_kernels.columns import flat
from lgd_kernels.levels import OmegaLookup, omega_at, widest
from lgd_kernels.ops.combine import op

OP, MOST = "StepPlan.step", 16


class Rows:
    """The columns that a step reads, and for each step of a run their coefficients: `fixed + omega share`."""

    def __init__(self, table: Tensor, batch: int, guided: bool, depth: int, noise: bool, like: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            table = table.to(like)
            factors = [0, 1, *([1] if guided else []), *(2, 4)[:depth], *([3] if noise else [])]
            fixed = table[..., factors]
            fixed = fixed if fixed.ndim == 4 else fixed[:, None].expand(-1, batch, -1, -1).contiguous()
            share = torch.zeros_like(fixed)
            if guided:
                share[..., 2], fixed[..., 2] = fixed[..., 2], 0.0
            self.fixed, self.share, self.weighted = fixed, share, (0.0, fixed.unbind(0))
        names = [0, 1, *([(1, 2)] if guided else [])]
        first = 3 if guided else 2
        names += range(first, first + depth + noise)
        self.columns, self.checked = flat(names, first + depth + noise), set()

    def at(self, index: int, omega: float | Tensor | OmegaLookup) -> Tensor:
        """`[B, P, K]`; for a number they are worked out for the whole run, and kept for the last one."""
        if isinstance(omega, (Tensor, OmegaLookup)):
            fixed = self.fixed[index]
            return torch.addcmul(fixed, omega_at(omega, fixed).view(-1, 1, 1), self.share[index])
        if omega != self.weighted[0]:
            with torch.inference_mode(False), torch.no_grad():
                self.weighted = omega, torch.add(self.fixed, self.share, alpha=omega).unbind(0)
        return self.weighted[1][index]


def fits(table: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing looks on, so that what was laid out may be used again: also no CUDA graph, whose replay would not
    know of it, and no gradient to the table itself."""
    if table.requires_grad or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return impls.direct(x, *others) and not impls.transforms_active()


def rows(plan, batch: int, guided: bool, depth: int, noise: bool, device: torch.device, dtype: torch.dtype) -> Rows:
    """Of a plan, whose tables nobody changes; kept with it, for a few batches."""
    kept = plan.__dict__.setdefault("_rows", {})
    key = batch, guided, depth, noise, device, dtype
    found = kept.get(key)
    if found is None:
        if plan.table.ndim == 4 and plan.table.shape[1] != batch:
            raise ValueError(f"{OP}: `x` has {batch} samples, expected {plan.table.shape[1]}, as the plan's times")
        if len(kept) == MOST:
            kept.clear()
        like = torch.empty(0, dtype=dtype, device=device)
        found = kept[key] = Rows(plan.table, batch, guided, depth, noise, like)
    return found


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
    named = {"x": x, "cond": cond}
    if uncond is not None:
        named["uncond"] = uncond
    for n, one in enumerate(history):
        named[f"kept[{n}]" if n else "kept"] = one
    if noise is not None:
        named["noise"] = noise
    checks.samples(OP, **named)
    tensors = list(named.values())
    wide = widest(*[tensor.dtype for tensor in tensors])
    found = rows(plan, x.shape[0], uncond is not None, len(history), noise is not None, x.device, wide)
    if index not in found.checked:
        plan._check(index, len(history), noise, None)
        found.checked.add(index)
    if uncond is not None:
        checks.omega(OP, omega, "x", x)
    coefficients = found.at(index, omega if uncond is not None else 0.0)
    return op.combined(tensors, coefficients, found.columns, impl)
