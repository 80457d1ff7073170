"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.dynamic_threshold` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.ops.dynamic_threshold import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad
from lgd_kernels.runtime.levels import arithmetic_dtype

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

_library = torch.library.Library("lgd", "FRAGMENT")
_library.define(  # order: the two elements that the quantile lies between, [B, 2]
    "dynamic_threshold(Tensor x0, float quantile, float max_value, str? impl) -> (Tensor out, Tensor order)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def dynamic_threshold(x0: Tensor, quantile: float, max_value: float, impl: str | None) -> Tensor:
    """The differentiable op."""
    if max_value > torch.finfo(arithmetic_dtype(x0)).max:
        max_value = math.inf  # the same, to these numbers
    if impls.through_reference("dynamic_threshold", impl):
        return reference.dynamic_threshold(x0, quantile, max_value)
    if torch.is_grad_enabled() and requires_grad(x0):
        return _DynamicThreshold.apply(x0, quantile, max_value, impl)
    forward = _forward if impls.direct(x0) else torch.ops.lgd.dynamic_threshold
    return forward(x0, quantile, max_value, impl)[0]


class _DynamicThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, quantile, max_value, impl):
        forward = _forward if impls.direct(x0) else torch.ops.lgd.dynamic_threshold
        out, order = forward(x0, quantile, max_value, impl)
        ctx.save_for_backward(x0, order)
        ctx.options = quantile, max_value
        return out

    @staticmethod
    def backward(ctx, upstream):
        x0, order = ctx.saved_tensors
        if not x0.numel():
            return torch.zeros_like(x0), None, None, None
        low, high = order.unbind(1)
        if torch.is_grad_enabled():  # again: the statistics are functions of x0 too
            low, high = reference.order_statistics(x0.to(order.dtype), ctx.options[0])
        grad = reference.dynamic_threshold_backward(upstream, x0, low, high, *ctx.options)
        return grad.to(x0.dtype), None, None, None


def _forward(x0, quantile, max_value, impl):
    impl = impls.choose("dynamic_threshold", impl, x0.device, x0.dtype)
    out, order = _allocate(x0, quantile, max_value, impl)
    if not out.numel():
        return out, order
    if impl == "reference":
        out.copy_(reference.dynamic_threshold(x0, quantile, max_value))
        order.copy_(torch.stack(reference.order_statistics(x0.to(order.dtype), quantile), 1))
        return out, order
    place = reference.position(quantile, x0[0].numel())
    impls.launcher("dynamic_threshold", impl).forward(out, order, x0, *place, max_value)
    return out, order


def _allocate(x0, quantile, max_value, impl):
    return x0.new_empty(x0.shape), x0.new_empty((x0.shape[0], 2), dtype=arithmetic_dtype(x0))


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("dynamic_threshold", _forward, _device)
torch.library.register_fake("lgd::dynamic_threshold", _allocate, lib=_library)
