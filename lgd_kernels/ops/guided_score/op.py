"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_score` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels import impls
from lgd_kernels.arguments import contiguous, join_omega, split_omega, to_omega
from lgd_kernels.levels import OmegaLookup, widest
from lgd_kernels.ops.guided_score import reference

IMPLEMENTATIONS = {
    "cuda": impls.FLOATS,
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

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
    forward = _forward if impls.direct(cond, uncond, omega, *table) else torch.ops.lgd.guided_score
    return forward(cond, uncond, omega, omega_value, table, impl)


class _GuidedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cond, uncond, omega, omega_value, impl, *table):
        to_omega = ctx.needs_input_grad[5] if table else ctx.needs_input_grad[2]
        ctx.save_for_backward(*((cond, uncond) if to_omega else (None, None)), omega, *table)
        ctx.options = omega_value, cond.dtype, uncond.dtype, [*ctx.needs_input_grad[:2], to_omega], impl
        forward = _forward if impls.direct(cond, uncond, omega, *table) else torch.ops.lgd.guided_score
        return forward(cond, uncond, omega, omega_value, list(table), impl)

    @staticmethod
    def backward(ctx, upstream):
        cond, uncond, omega, *table = ctx.saved_tensors
        omega_value, cond_dtype, uncond_dtype, wanted, impl = ctx.options
        arguments = upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted
        if torch.is_grad_enabled() or impls.transforms_active() or impls.batched(upstream):
            grads = _backward_reference(*arguments)  # a formula that autograd and vmap can go through again
        elif impls.direct(upstream, cond, uncond, omega, *table):
            grads = _backward(*arguments, impl)
        else:
            grads = torch.ops.lgd.guided_score_backward(*arguments, impl)
        d_cond, d_uncond, d_omega = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        if table:
            return d_cond, d_uncond, None, None, None, d_omega, *(None,) * 5
        return d_cond, d_uncond, d_omega, None, None


def _forward(cond, uncond, omega, omega_value, table, impl):
    impl = impls.choose("guided_score", impl, cond, uncond)
    if impl == "reference":
        return reference.guided_score(cond, uncond, join_omega(omega, omega_value, table))
    guided = cond.new_empty(cond.shape)
    if guided.numel():
        impls.launcher("guided_score", impl).forward(guided, cond, uncond, omega, omega_value, contiguous(table))
    return guided


def _backward(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    arguments = upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted
    d_cond, d_uncond, _ = grads = _allocate(*arguments, impl)
    impl = impls.choose("guided_score", impl, upstream, d_cond, d_uncond)
    if impl == "reference" or not upstream.numel():
        found = _backward_reference(*arguments)
        return tuple(value if want else grad for value, grad, want in zip(found, grads, wanted, strict=True))
    d_omega = upstream.new_empty(upstream.shape[:1], dtype=widest(upstream.dtype, cond_dtype, uncond_dtype))
    outputs = (grad if want else None for grad, want in zip((d_cond, d_uncond, d_omega), wanted, strict=True))
    launcher = impls.launcher("guided_score", impl)
    launcher.backward(*outputs, upstream, cond, uncond, omega, omega_value, contiguous(table))
    return d_cond, d_uncond, to_omega(d_omega, omega, table) if wanted[2] else grads[2]


def _backward_reference(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted):
    d = upstream.to(widest(upstream.dtype, cond_dtype, uncond_dtype))
    grads = reference.guided_score_backward(d, cond, uncond, join_omega(omega, omega_value, table))
    d_omega = to_omega(grads[2], omega, table) if wanted[2] else None
    return grads[0].to(cond_dtype).contiguous(), grads[1].to(uncond_dtype).contiguous(), d_omega


def _allocate(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    """One tensor for each gradient, empty where it is not wanted. The third is that of omega, or of the table."""
    like = table[0] if table else omega
    return (
        upstream.new_empty(upstream.shape if wanted[0] else 0, dtype=cond_dtype),
        upstream.new_empty(upstream.shape if wanted[1] else 0, dtype=uncond_dtype),
        upstream.new_empty(like.shape, dtype=like.dtype) if wanted[2] else upstream.new_empty(0),
    )


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("guided_score", _forward, _device)
    _library.impl("guided_score_backward", _backward, _device)
torch.library.register_fake("lgd::guided_score", lambda cond, *_: cond.new_empty(cond.shape), lib=_library)
torch.library.register_fake("lgd::guided_score_backward", _allocate, lib=_library)
