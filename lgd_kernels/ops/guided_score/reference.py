"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.runtime.levels import OmegaLookup, arithmetic_dtype, omega_at, per_sample, sum_samples


def guided_score(cond: Tensor, uncond: Tensor, omega: float | Tensor | OmegaLookup) -> Tensor:
    """`cond + omega (cond - uncond)`, in float32 (float64 where a tensor is), rounded once to the dtype of cond."""
    dtype = arithmetic_dtype(cond, uncond)
    c, u = cond.to(dtype), uncond.to(dtype)
    w = per_sample(omega_at(omega, c), c)
    return (c + w * (c - u)).to(cond.dtype).contiguous()


def guided_score_backward(
    upstream: Tensor, cond: Tensor | None, uncond: Tensor | None, omega: float | Tensor | OmegaLookup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to cond, to uncond and, where these two are given, to omega `[B]`; in the arithmetic dtype."""
    dtype = arithmetic_dtype(upstream, cond, uncond)
    g = upstream.to(dtype)
    w = per_sample(omega_at(omega, g), g)
    d_omega = None
    if cond is not None:
        d_omega = sum_samples(g * (cond.to(dtype) - uncond.to(dtype)))
    return (1 + w) * g, -w * g, d_omega
