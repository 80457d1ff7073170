"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.moments` itself is not differentiable; the function below is, and it is what the api calls. Its backward
is a combine, as the backward of a combine is made of moments: each calls the other by the operator's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.moments import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad
from lgd_kernels.runtime.levels import arithmetic_dtype

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

_library = torch.library.Library("lgd", "FRAGMENT")
_library.define(
    "moments(Tensor[] tensors, int[] columns, int[] pairs, Tensor? source, int gathered, str? impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


_library.define(
    "centred_moments(Tensor[] tensors, int[] columns, str? impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def moments(tensors: list[Tensor], columns: list[int], pairs: list[int], impl: str | None) -> Tensor:
    """The differentiable op: `[B, M]`, an entry for each pair."""
    if impls.through_reference("moments", impl):
        return reference.moments(tensors, columns, pairs)
    if torch.is_grad_enabled() and requires_grad(*tensors):
        return _Moments.apply(columns, pairs, impl, *tensors)
    forward = _forward if impls.direct(*tensors) else torch.ops.lgd.moments
    return forward(tensors, columns, pairs, None, 0, impl)


def centred_moments(tensors: list[Tensor], columns: list[int], impl: str | None) -> Tensor:
    """The differentiable op: `[B, K K + K]`, products of deviations, then means."""
    if impls.through_reference("moments", impl):
        return reference.centred_moments(tensors, columns)
    if torch.is_grad_enabled() and requires_grad(*tensors):
        return _CentredMoments.apply(columns, impl, *tensors)
    forward = _forward_centred if impls.direct(*tensors) else torch.ops.lgd.centred_moments
    return forward(tensors, columns, impl)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, pairs, impl, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.options = columns, pairs, impl
        forward = _forward if impls.direct(*tensors) else torch.ops.lgd.moments
        return forward(list(tensors), columns, pairs, None, 0, impl)

    @staticmethod
    def backward(ctx, upstream):
        tensors, (columns, pairs, impl) = ctx.saved_tensors, ctx.options
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or impls.transforms_active() or impls.batched(upstream):
            grads = reference.moments_backward(upstream, tensors, columns, pairs)
            grads = [grad.to(t.dtype) if want else None for grad, t, want in zip(grads, tensors, wanted, strict=True)]
            return None, None, None, *grads
        coefficients, constant = reference.to_combine(upstream, len(tensors), columns, pairs)
        chosen = [n for n, want in enumerate(wanted) if want]
        dtypes = {tensors[n].dtype for n in chosen}
        dtype = dtypes.pop() if len(dtypes) == 1 else arithmetic_dtype(*tensors)
        found = torch.ops.lgd.combine(
            list(tensors), coefficients[:, chosen], columns, constant[:, chosen], None, None, None, 0, None,
            -torch.inf, torch.inf, dtype, impl,
        )  # fmt: skip
        grads = [None] * len(tensors)
        for n, grad in zip(chosen, found.unbind(0), strict=True):
            grads[n] = grad.to(tensors[n].dtype)
        return None, None, None, *grads


class _CentredMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, impl, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.columns = columns
        forward = _forward_centred if impls.direct(*tensors) else torch.ops.lgd.centred_moments
        return forward(list(tensors), columns, impl)

    @staticmethod
    def backward(ctx, upstream):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        grads = reference.centred_backward(upstream, tensors, ctx.columns)
        found = (grad.to(t.dtype) if want else None for grad, t, want in zip(grads, tensors, wanted, strict=True))
        return None, None, *found


def _forward(tensors, columns, pairs, source, gathered, impl):
    impl = impls.choose("moments", impl, tensors[0].device, *(tensor.dtype for tensor in tensors))
    if impl == "reference":
        return reference.moments(tensors, columns, pairs, source, gathered).contiguous()
    found = _allocate(tensors, columns, pairs, source, gathered, impl)
    if not found.numel() or not tensors[-1].numel():
        return found.zero_()
    impls.launcher("moments", impl).forward(found, tensors, columns, pairs, source, gathered)
    return found


def _forward_centred(tensors, columns, impl):
    impl = impls.choose("moments", impl, tensors[0].device, *(tensor.dtype for tensor in tensors))
    if impl == "reference":
        return reference.centred_moments(tensors, columns).contiguous()
    found = _allocate_centred(tensors, columns, impl)
    if not found.numel() or not tensors[0].numel():
        return found.zero_()
    impls.launcher("moments", impl).centred(found, tensors, columns)
    return found


def _allocate_centred(tensors, columns, impl):
    size = len(columns) // 2
    return tensors[0].new_empty((tensors[0].shape[0], size * size + size), dtype=reference.centred_dtype(tensors[0]))


def _allocate(tensors, columns, pairs, source, gathered, impl):
    batch = tensors[0].shape[0] if source is None else source.shape[0]
    return tensors[0].new_empty((batch, len(pairs) // 2), dtype=arithmetic_dtype(*tensors))


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("moments", _forward, _device)
    _library.impl("centred_moments", _forward_centred, _device)
torch.library.register_fake("lgd::moments", _allocate, lib=_library)
torch.library.register_fake("lgd::centred_moments", _allocate_centred, lib=_library)
