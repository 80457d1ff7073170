"""The operator `torch.ops.lgd.dynamic_threshold`, and the differentiable op on top of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.dynamic_threshold import reference
from lgd_kernels.ops.dynamic_threshold.structs import DynamicThreshold, DynamicThresholdBackward
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}


def forward(a: DynamicThreshold, impl: str | None) -> tuple[Tensor, Tensor]:
    """Compute the output, and the two elements that each quantile lies between, `[B, 2]`."""
    impl = impls.choose("dynamic_threshold", impl, a.x0.device, a.x0.dtype)
    out, order = outputs = allocated(a)
    if not out.numel():
        return outputs
    if impl == "reference":
        out.copy_(reference.dynamic_threshold(a))
        order.copy_(torch.stack(reference.order_statistics(a.x0.to(order.dtype), a.quantile), 1))
    else:
        impls.launcher("dynamic_threshold", impl).forward(outputs, a)
    return outputs


def allocated(a: DynamicThreshold) -> tuple[Tensor, Tensor]:
    return a.x0.new_empty(a.x0.shape), a.x0.new_empty((a.x0.shape[0], 2), dtype=arithmetic_dtype(a.x0))


def backward(b: DynamicThresholdBackward) -> list[Tensor]:
    """Compute the gradient to x0, in plain PyTorch."""
    x0 = b.call.x0
    if not x0.numel():
        return [torch.zeros_like(x0)]
    if torch.is_grad_enabled():  # again: the statistics are functions of x0 too
        low, high = reference.order_statistics(x0.to(b.order.dtype), b.call.quantile)
    else:
        low, high = b.order.unbind(1)
    return [reference.dynamic_threshold_backward(b.upstream, b.call, low, high).to(x0.dtype)]


dynamic_threshold = Operator(
    "dynamic_threshold",
    define(DynamicThreshold, "dynamic_threshold", "(Tensor out, Tensor order)", forward, allocated),
    reference=reference.dynamic_threshold,
    leaves=lambda a: (a.x0,),
    saved=shape_of(DynamicThresholdBackward),
    save=lambda a, outputs, wanted: DynamicThresholdBackward(outputs[0], outputs[1], a),
    backward=lambda b, impl, direct: backward(b),
    reference_backward=backward,
)
