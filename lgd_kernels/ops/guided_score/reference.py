"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward
from lgd_kernels.runtime.levels import arithmetic_dtype, omega_at, per_sample, sum_samples


def guided_score(a: GuidedScore) -> Tensor:
    """Compute `cond + omega (cond - uncond)` in float32 (float64 where a tensor is), rounded once."""
    dtype = arithmetic_dtype(a.cond, a.uncond)
    c, u = a.cond.to(dtype), a.uncond.to(dtype)
    w = per_sample(omega_at(a.omega.given(), c), c)
    return (c + w * (c - u)).to(a.cond.dtype).contiguous()


def guided_score_backward(b: GuidedScoreBackward) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients to cond, to uncond and, if these two are given, to omega `[B]`, in the arithmetic dtype."""
    dtype = arithmetic_dtype(b.upstream, b.cond, b.uncond)
    d = b.upstream.to(dtype)
    w = per_sample(omega_at(b.omega.given(), d), d)
    d_omega = None
    if b.cond is not None and b.uncond is not None:
        d_omega = sum_samples(d * (b.cond.to(dtype) - b.uncond.to(dtype)))
    return (1 + w) * d, -w * d, d_omega
