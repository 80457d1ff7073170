"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_score` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_score import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import contiguous, empty_sums, join_omega, requires_grad, split_omega, to_omega
from lgd_kernels.runtime.levels import OmegaLookup, widest

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
    if torch.is_grad_enabled() and requires_grad(cond, uncond, omega, *table[:1]):
        return _GuidedScore.apply(cond, uncond, omega, omega_value, impl, *table)
    forward = _forward if impls.direct(cond, uncond, omega, *table) else torch.ops.lgd.guided_score
    return forward(cond, uncond, omega, omega_value, table, impl)


class _GuidedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cond, uncond, omega, omega_value, impl, *table):
        to_omega = ctx.needs_input_grad[5] if table else ctx.needs_input_grad[2]
        ctx.save_for_backward(*((cond, uncond) if to_omega else (None, None)), omega, *table)
        ctx.options = omega_value, cond.dtype, uncond.dtype, [*ctx.needs_input_grad[:2], to_omega], impl
        ctx.plain = impls.direct(cond, uncond, omega, *table)
        forward = _forward if ctx.plain else torch.ops.lgd.guided_score
        return forward(cond, uncond, omega, omega_value, list(table), impl)

    @staticmethod
    def backward(ctx, upstream):
        cond, uncond, omega, *table = ctx.saved_tensors
        omega_value, cond_dtype, uncond_dtype, wanted, impl = ctx.options
        arguments = upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted
        again = torch.is_grad_enabled() or impls.transforms_active() or impls.batched(upstream)
        if ctx.plain and not again and impls.direct(upstream):
            grads = _launch_backward(*arguments, impl)
        else:  # again: a formula that autograd and vmap can go through
            grads = _backward_reference(*arguments) if again else torch.ops.lgd.guided_score_backward(*arguments, impl)
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        d_cond, d_uncond, d_omega = grads
        if table:
            return d_cond, d_uncond, None, None, None, d_omega, *(None,) * 5
        return d_cond, d_uncond, d_omega, None, None


def _forward(cond, uncond, omega, omega_value, table, impl):
    impl = impls.choose("guided_score", impl, cond.device, cond.dtype, uncond.dtype)
    if impl == "reference":
        return reference.guided_score(cond, uncond, join_omega(omega, omega_value, table))
    guided = torch.empty_like(cond, memory_format=torch.contiguous_format)  # half as long as new_empty
    if guided.numel():
        impls.launcher("guided_score", impl).forward(guided, cond, uncond, omega, omega_value, contiguous(table))
    return guided


def _backward(*arguments):
    upstream, grads = arguments[0], _launch_backward(*arguments)
    return tuple(upstream.new_empty(0) if grad is None else grad for grad in grads)


def _launch_backward(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    """Gradients to cond, uncond and omega (or the table); None where one is not wanted."""
    dtypes = cond_dtype, uncond_dtype
    impl = impls.choose("guided_score", impl, upstream.device, upstream.dtype, *dtypes)
    if impl == "reference" or not upstream.numel():
        found = _backward_reference(upstream, cond, uncond, omega, omega_value, table, *dtypes, wanted)
        return [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    grads = [
        torch.empty_like(upstream, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for dtype, want in zip(dtypes, wanted, strict=False)
    ]
    grads.append(empty_sums(upstream, omega, widest(upstream.dtype, *dtypes)) if wanted[2] else None)
    launcher = impls.launcher("guided_score", impl)
    launcher.backward(*grads, upstream, cond, uncond, omega, omega_value, contiguous(table))
    if wanted[2]:
        grads[2] = to_omega(grads[2], omega, table, impl)
    return grads


def _backward_reference(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted):
    d = upstream.to(widest(upstream.dtype, cond_dtype, uncond_dtype))
    grads = reference.guided_score_backward(d, cond, uncond, join_omega(omega, omega_value, table))
    d_omega = to_omega(grads[2], omega, table) if wanted[2] else None
    return grads[0].to(cond_dtype).contiguous(), grads[1].to(uncond_dtype).contiguous(), d_omega


def _fake_backward(upstream, cond, uncond, omega, omega_value, table, cond_dtype, uncond_dtype, wanted, impl):
    """Shapes alone; the last gradient is that of omega, or of the table."""
    like = table[0] if table else omega
    return (
        upstream.new_empty(upstream.shape, dtype=cond_dtype) if wanted[0] else upstream.new_empty(0),
        upstream.new_empty(upstream.shape, dtype=uncond_dtype) if wanted[1] else upstream.new_empty(0),
        upstream.new_empty(like.shape, dtype=like.dtype) if wanted[2] else upstream.new_empty(0),
    )


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("guided_score", _forward, _device)
    _library.impl("guided_score_backward", _backward, _device)
torch.library.register_fake("lgd::guided_score", lambda cond, *_: cond.new_empty(cond.shape), lib=_library)
torch.library.register_fake("lgd::guided_score_backward", _fake_backward, lib=_library)
