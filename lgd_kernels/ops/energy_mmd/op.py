"""The operator `torch.ops.lgd.energy_mmd`, and the differentiable op on top of it.

The pass that computes the value also computes the gradients that are wanted, for an upstream gradient of 1: distances
are the cost, and are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd, EnergyMmdBackward
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {"triton": impls.FLOATS, "cpu": impls.ALL_FLOATS, "reference": impls.ALL_FLOATS}


def forward(a: EnergyMmd, impl: str | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss `[B]` and its gradients to x and y; None for one that is not wanted."""
    loss, d_x, d_y = unrounded(a, impl)
    return loss.to(a.dtype, copy=True), d_x, d_y


def unrounded(a: EnergyMmd, impl: str | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the same with the loss in float64, for sums of several calls."""
    impl = impls.choose("energy_mmd", impl, a.x.device, a.x.dtype, a.y.dtype)
    if impl == "reference" or not a.x.numel():
        d_x, d_y = (None if grad is None else grad.contiguous() for grad in reference.energy_mmd_gradients(a))
        return reference.energy_mmd(a).double(), d_x, d_y
    a = a.weighted(reference.scaled(a.x_weights), reference.scaled(a.y_weights))
    loss = a.x.new_empty(a.x.shape[0], dtype=torch.float64)
    d_x, d_y = gradients = allocated(a)
    impls.launcher("energy_mmd", impl).forward((loss, *gradients), a)
    return loss, d_x, d_y


def allocated(a: EnergyMmd) -> list[Tensor | None]:
    pairs = zip((a.x, a.y), a.wanted, strict=True)
    return [points.new_empty(points.shape, dtype=a.dtype) if want else None for points, want in pairs]


def backward(b: EnergyMmdBackward) -> list[Tensor | None]:
    """Compute the gradients to x and y, in plain PyTorch; differentiable where gradients are recorded."""
    a = b.call
    if not torch.is_grad_enabled():
        found = zip((b.d_x, b.d_y), (a.x, a.y), strict=True)
        return [None if d is None else (b.upstream[:, None, None] * d).to(points.dtype) for d, points in found]
    x, y = a.x.view_as(a.x), a.y.view_as(a.y)  # views, since one tensor may be both arguments
    leaves = [leaf for leaf, want in zip((x, y), a.wanted, strict=True) if want]
    loss = reference.energy_mmd(a._replace(x=x, y=y))
    grads = iter(torch.autograd.grad(loss, leaves, b.upstream, create_graph=True))
    return [next(grads) if want else None for want in a.wanted]


energy_mmd = Operator(
    "energy_mmd",
    define(
        EnergyMmd,
        "energy_mmd",
        "(Tensor loss, Tensor d_x, Tensor d_y)",
        forward,
        lambda a: (a.x.new_empty(a.x.shape[0], dtype=a.dtype), *allocated(a)),
    ),
    reference=reference.energy_mmd,
    leaves=lambda a: (a.x, a.y),
    saved=shape_of(EnergyMmdBackward),
    save=lambda a, outputs, wanted: EnergyMmdBackward(outputs[0], outputs[1], outputs[2], a),
    backward=lambda b, impl, direct: backward(b),
    reference_backward=backward,
    recorded=lambda a, wanted: EnergyMmd._make((*a[:-1], list(wanted))),
)
