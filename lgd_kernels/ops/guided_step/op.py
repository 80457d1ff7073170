"""The operator `torch.ops.lgd.guided_step`, and the differentiable op on top of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgd_kernels.ops.guided_step import reference
from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import empty_sums, to_leaf
from lgd_kernels.runtime.levels import widest
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {
    "cuda": impls.FLOATS,
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}


def forward(a: GuidedStep, impl: str | None) -> Tensor:
    noise_dtype = () if a.noise is None else (a.noise.dtype,)
    impl = impls.choose("guided_step", impl, a.x.device, a.x.dtype, a.cond.dtype, a.uncond.dtype, *noise_dtype)
    if impl == "reference":
        return reference.guided_step(a)
    x_s = torch.empty_like(a.x, memory_format=torch.contiguous_format)  # takes half as long as new_empty
    if x_s.numel():
        impls.launcher("guided_step", impl).forward(x_s, a)
    return x_s


def backward(b: GuidedStepBackward, impl: str | None) -> list[Tensor | None]:
    """Compute the gradients to x, cond, uncond, noise and omega (or the table); None for one that is not wanted."""
    impl = impls.choose("guided_step", impl, b.upstream.device, *b.dtypes)
    if impl == "reference" or not b.upstream.numel():
        return [grad if want else None for grad, want in zip(backward_reference(b), b.wanted, strict=True)]
    grads = [
        torch.empty_like(b.upstream, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for dtype, want in zip(b.dtypes, b.wanted, strict=False)
    ]
    d_omega = empty_sums(b.upstream, b.scalars.omega, widest(*b.dtypes)) if b.wanted[4] else None
    impls.launcher("guided_step", impl).backward((*grads, d_omega), b)
    return [*grads, None if d_omega is None else to_leaf(d_omega, b.scalars.omega, impl)]


def backward_reference(b: GuidedStepBackward) -> tuple[Tensor | None, ...]:
    d = b.upstream.to(widest(*b.dtypes))
    *to_data, d_omega = reference.guided_step_backward(b._replace(upstream=d))
    rounded = (grad.to(dtype).contiguous() for grad, dtype in zip(to_data, b.dtypes, strict=True))
    return *rounded, to_leaf(d_omega, b.scalars.omega) if b.wanted[4] and d_omega is not None else None


def fake_backward(b: GuidedStepBackward) -> list[Tensor | None]:
    likes: list[tuple[Any, torch.dtype | None]] = [(b.upstream.shape, dtype) for dtype in b.dtypes]
    leaf = b.scalars.omega.leaf
    likes.append((0, None) if leaf is None else (leaf.shape, leaf.dtype))
    return [
        b.upstream.new_empty(shape, dtype=dtype) if want else None
        for (shape, dtype), want in zip(likes, b.wanted, strict=True)
    ]


def save(a: GuidedStep, x_s: Tensor, wanted: list[bool]) -> GuidedStepBackward:
    cond, uncond = (a.cond, a.uncond) if wanted[4] else (None, None)
    noise_dtype = a.x.dtype if a.noise is None else a.noise.dtype
    return GuidedStepBackward(x_s, cond, uncond, a.scalars, a.cond.dtype, a.uncond.dtype, noise_dtype, wanted)


raw = define(GuidedStep, "guided_step", "Tensor", forward, lambda a: a.x.new_empty(a.x.shape))
raw_backward = define(
    GuidedStepBackward,
    "guided_step_backward",
    "(Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_omega)",
    backward,
    fake_backward,
)
guided_step = Operator(
    "guided_step",
    raw,
    reference=reference.guided_step,
    leaves=lambda a: (a.x, a.cond, a.uncond, a.noise, a.scalars.omega.leaf),
    saved=shape_of(GuidedStepBackward),
    save=save,
    backward=raw_backward.run,
    reference_backward=backward_reference,
)
