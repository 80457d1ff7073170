"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_score` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels import impls
from lgd_kernels.arguments import join_omega, split_omega
from lgd_kernels.levels import OmegaLookup, arithmetic_dtype, table_gradient
from lgd_kernels.ops.guided_score import reference

IMPLEMENTATIONS = {"triton": impls.FLOATS, "cpu": impls.ALL_FLOATS, "reference": impls.ALL_FLOATS}

_library = torch.library.Library("lgd", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "guided_score(Tensor cond, Tensor uncond, Tensor? omega, float omega_value, Tensor[] table, str? impl) -> Tensor",
    tags=_tags,
)
_library.define(
    "guided_score_backward(Tensor upstream, Tensor? cond, Tensor? uncond, Tensor? omega, float omega_value, "
    "Tensor[] table, ScalarType cond_dtype, ScalarType uncond_dtype, bool[] wanted, str? impl) "
    "-> (Tensor d_cond, Tensor d_uncond, Tensor d_omega)",
    tags=_tags,
)


def guided_score(cond: Tensor, uncond: Tensor, omega: float | Tensor | OmegaLookup, impl: str | None) -> Tensor:
    """The differentiable op."""
    if impls.through_reference("guided_score", impl):
        return reference.guided_score(cond, uncond, omega)
    omega, omega_value, table = split_omega(omega, cond)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (cond, uncond, omega, *table[:1])):
        return _GuidedScore.apply(cond, uncond, omega, omega_value, impl, *table)
    forward = _forward if impls.direct(cond, uncond) else torch.ops.lgd.guided_score
    return forward(cond, uncond, omega, omega_value, table, impl)


class _GuidedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cond, uncond, omega, omega_value, impl, *table):
        to_omega = ctx.needs_input_grad[5] if table else ctx.needs_input_grad[2]
        ctx.save_for_backward(*((cond, uncond) if to_omega else (None, None)), omega, *table)
        ctx.options = omega_value, cond.dtype, uncond.dtype, [*ctx.needs_input_grad[:2], to_omega], impl
        forward = _forward if impls.direct(cond, uncond) else torch.ops.lgd.guided_score
        return forward(cond, uncond, omega, omega_value, list(table), impl)

    @staticmethod
    def backward(ctx, upstream):
        cond, uncond, omega, *table = ctx.saved_tensors
        omega_value, cond_dtype, uncond_dtype, wanted, impl = ctx.options
        if torch.is_grad_enabled():  # create_graph: a formula that autograd can go through again
            grads = reference.guided_score_backward(upstream, cond, uncond, join_omega(omega, omega_value, table))
        else:
            run = _backward if impls.direct(upstream) else torch.ops.lgd.guided_score_backward
            grads = run(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl)
        d_cond = grads[0].to(cond_dtype) if wanted[0] else None
        d_uncond = grads[1].to(uncond_dtype) if wanted[1] else None
        if table:
            d_values = table_gradient(OmegaLookup(*table), grads[2]) if wanted[2] else None
            return d_cond, d_uncond, None, None, None, d_values, *(None,) * 5
        return d_cond, d_uncond, grads[2].to(omega.dtype) if wanted[2] else None, None, None


def _forward(cond, uncond, omega, omega_value, table, impl):
    impl = impls.choose("guided_score", impl, cond, uncond)
    if impl == "reference":
        return reference.guided_score(cond, uncond, join_omega(omega, omega_value, table)).contiguous()
    guided = cond.new_empty(cond.shape)
    if guided.numel():
        impls.launcher("guided_score", impl).forward(guided, cond, uncond, omega, omega_value, table)
    return guided


def _backward(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    grads = _allocate(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl)
    impl = impls.choose("guided_score", impl, upstream, *grads[:2])
    if impl == "reference" or not upstream.numel():
        found = reference.guided_score_backward(upstream, cond, uncond, join_omega(omega, omega_value, table))
        for grad, value, want in zip(grads, found, wanted, strict=True):
            if want:
                grad.copy_(value)
    else:
        outputs = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        impls.launcher("guided_score", impl).backward(*outputs, upstream, cond, uncond, omega, omega_value, table)
    return grads


def _allocate(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    """One tensor for each gradient, empty where it is not wanted."""
    shape, dtype = upstream.shape, arithmetic_dtype(upstream, cond, uncond)
    return (
        upstream.new_empty(shape if wanted[0] else 0, dtype=cond_dtype),
        upstream.new_empty(shape if wanted[1] else 0, dtype=uncond_dtype),
        upstream.new_empty(shape[:1] if wanted[2] else 0, dtype=dtype),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("guided_score", _forward, _device)
    _library.impl("guided_score_backward", _backward, _device)
torch.library.register_fake("lgd::guided_score", lambda cond, *_: cond.new_empty(cond.shape), lib=_library)
torch.library.register_fake("lgd::guided_score_backward", _allocate, lib=_library)
