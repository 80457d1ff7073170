"""The operator `torch.ops.lgd.guided_score`, and the differentiable op on top of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgd_kernels.ops.guided_score import reference
from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward
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


def forward(a: GuidedScore, impl: str | None) -> Tensor:
    impl = impls.choose("guided_score", impl, a.cond.device, a.cond.dtype, a.uncond.dtype)
    if impl == "reference":
        return reference.guided_score(a)
    guided = torch.empty_like(a.cond, memory_format=torch.contiguous_format)  # takes half as long as new_empty
    if guided.numel():
        impls.launcher("guided_score", impl).forward(guided, a)
    return guided


def backward(b: GuidedScoreBackward, impl: str | None) -> list[Tensor | None]:
    """Compute the gradients to cond, uncond and omega (or the table); None for one that is not wanted."""
    impl = impls.choose("guided_score", impl, b.upstream.device, *b.dtypes)
    if impl == "reference" or not b.upstream.numel():
        return [grad if want else None for grad, want in zip(backward_reference(b), b.wanted, strict=True)]
    grads = [
        torch.empty_like(b.upstream, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for dtype, want in zip(b.dtypes[1:], b.wanted, strict=False)
    ]
    d_omega = empty_sums(b.upstream, b.omega, widest(*b.dtypes)) if b.wanted[2] else None
    impls.launcher("guided_score", impl).backward((*grads, d_omega), b)
    return [*grads, None if d_omega is None else to_leaf(d_omega, b.omega, impl)]


def backward_reference(b: GuidedScoreBackward) -> tuple[Tensor | None, ...]:
    d = b.upstream.to(widest(*b.dtypes))
    d_cond, d_uncond, d_omega = reference.guided_score_backward(b._replace(upstream=d))
    to_data = d_cond.to(b.cond_dtype).contiguous(), d_uncond.to(b.uncond_dtype).contiguous()
    return *to_data, to_leaf(d_omega, b.omega) if b.wanted[2] and d_omega is not None else None


def fake_backward(b: GuidedScoreBackward) -> list[Tensor | None]:
    likes: list[tuple[Any, torch.dtype | None]] = [(b.upstream.shape, dtype) for dtype in b.dtypes[1:]]
    leaf = b.omega.leaf
    likes.append((0, None) if leaf is None else (leaf.shape, leaf.dtype))
    return [
        b.upstream.new_empty(shape, dtype=dtype) if want else None
        for (shape, dtype), want in zip(likes, b.wanted, strict=True)
    ]


def save(a: GuidedScore, guided: Tensor, wanted: list[bool]) -> GuidedScoreBackward:
    cond, uncond = (a.cond, a.uncond) if wanted[2] else (None, None)
    return GuidedScoreBackward(guided, cond, uncond, a.omega, a.cond.dtype, a.uncond.dtype, wanted)


raw = define(GuidedScore, "guided_score", "Tensor", forward, lambda a: a.cond.new_empty(a.cond.shape))
raw_backward = define(
    GuidedScoreBackward,
    "guided_score_backward",
    "(Tensor d_cond, Tensor d_uncond, Tensor d_omega)",
    backward,
    fake_backward,
)
guided_score = Operator(
    "guided_score",
    raw,
    reference=reference.guided_score,
    leaves=lambda a: (a.cond, a.uncond, a.omega.leaf),
    saved=shape_of(GuidedScoreBackward),
    save=save,
    backward=raw_backward.run,
    reference_backward=backward_reference,
)
